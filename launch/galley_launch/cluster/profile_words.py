"""Short forms that a profile may be written in; and errors of pydantic about a profile, as Galley's own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from galley.contract.errors import UserError
from galley_launch.base import words
from galley_launch.base.grammar import nearest
from galley_launch.base.yaml_text import Tree
from galley_launch.cluster.profile import Cluster, Container, Patience, SideJobs
from galley_launch.recipe.schema import sentence

SECTIONS: dict[str, type[BaseModel]] = {"container": Container, "side": SideJobs, "patience": Patience}
_TYPO = 0.8
"""Similarity (difflib's ratio) from which on a word is taken for a misspelling of another."""
_NUMBER_ERRORS = frozenset(
    [
        "int_parsing",
        "int_parsing_size",
        "int_type",
        "int_from_float",
        "float_parsing",
        "float_type",
        "bool_parsing",
        "bool_type",
    ]
)
"""pydantic's types of errors about a number or a boolean."""
_LISTS = ("modules", "secrets", "directives", "container.mounts")
"""Keys whose lists may be written as one text."""
_EXAMPLES = {
    "container": "container: {runtime: apptainer, image: /shared/train.sif}",
    "side": "side: {partition: cpu}",
    "patience": "patience: {step: 1800}",
    "variables": "variables: {NCCL_DEBUG: WARN}",
}


def normal(tree: Tree) -> Tree:
    """``tree`` without short forms: ``container: /x.sif`` becomes runtime and image, ``modules: a b`` a list."""
    result: dict[str, Any] = dict(tree)
    image = result.get("container")
    if isinstance(image, str) and image:
        result["container"] = {"runtime": _runtime(image), "image": image}
    for path in _LISTS:
        section, _, leaf = path.rpartition(".")
        part = result.get(section) if section else result
        if isinstance(part, dict) and isinstance(part.get(leaf), str):
            # Commas separate names and paths, but are part of a directive: --mail-type=END,FAIL.
            texts = part[leaf].split() if leaf == "directives" else re.split(r"[\s,]+", part[leaf].strip())
            part = part | {leaf: texts}
            result = result | {section: part} if section else part
    return result


def _runtime(image: str) -> str:
    """The runtime for an image: Pyxis for .sqsh files and ``registry#image:tag`` (enroot's form), else Apptainer."""
    return "pyxis" if image.endswith((".sqsh", ".squashfs")) or "#" in image else "apptainer"


def refused(error: ValidationError, file: str, given: Collection[str]) -> UserError:
    """The first error in the profile ``file``, or in the keys ``given`` on the command line (dotted paths)."""
    first, *others = error.errors()
    # "[key]" is how pydantic marks an error in a key of a dict, such as a variable's name.
    parts = [str(part) for part in first["loc"] if part != "[key]"]
    place = ".".join(parts)
    # It was typed if one path contains the other: cluster.side=4 breaks side, cluster.side.cores=x breaks side.cores.
    typed = any(f"{key}.".startswith(f"{place}.") or f"{place}.".startswith(f"{key}.") for key in given)
    where = "command line: cluster" if typed else file
    if first["type"] == "extra_forbidden":
        return UserError(where, f"no such key: {place!r}", _unknown_key(parts))
    at = f"{where}{'.' if typed else ': '}{place}" if place else where
    what, todo = _what_todo(first, others, parts)
    return UserError(at, what, todo)


def _unknown_key(parts: list[str]) -> str:
    """What to do about the unknown key at the path ``parts``."""
    section = SECTIONS.get(parts[0], Cluster)
    # In this order: a misspelling here, the same key at the wrong level, another program's word, the nearest of all.
    near = nearest(parts[-1], section.model_fields)
    elsewhere = [name for name, kind in SECTIONS.items() if parts[-1] in kind.model_fields]
    if difflib.get_close_matches(parts[-1], section.model_fields, n=1, cutoff=_TYPO):
        return near
    if parts[-1] in Cluster.model_fields:
        return f"it belongs at the top level: {parts[-1]}: …"
    if elsewhere:
        return f"it belongs under {elsewhere[0]}: {elsewhere[0]}: {{{parts[-1]}: …}}"
    word = parts[-1].replace("-", "_")
    own = words.cluster_key(word)
    return f"here it is called {own.removeprefix('cluster.')}" if own else words.answer(word) or near


def _what_todo(error: ErrorDetails, others: list[ErrorDetails], parts: list[str]) -> tuple[str, str]:
    """What is wrong at the path ``parts``, and what to do; ``others``: further errors, such as those of a union."""
    value, name = error["input"], parts[0] if parts else ""
    match error["type"]:
        case "missing":
            return "is missing", f"write it ({_EXAMPLES[name]})" if name in _EXAMPLES else "write it"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{value!r} is not a section of keys", f"write {_EXAMPLES.get(name, 'keys and values')}"
        case "list_type":
            return f"{value!r} is not a list", f"write {parts[-1]}: [a, b]"
        case kind if kind in _NUMBER_ERRORS:
            return sentence(error, others), _meaning(parts)
        case "value_error":
            # A validator's message may have the advice behind its last semicolon.
            what, _, todo = str(error["msg"]).removeprefix("Value error, ").rpartition("; ")
            # Without a path it is about the profile as a whole, which is too much to show.
            shown = "" if error["loc"] == () else f"{value!r} "
            return shown + (what or todo), todo if what else "change it"
        case "string_type" if value is None:
            return "is empty", f"write a value, or leave {parts[-1]} out"
        case "string_type":
            return f"{value!r} is more than one value", "write one value there"
        case _:
            return sentence(error, others), "change it"


def _meaning(parts: list[str]) -> str:
    """What the key at the path ``parts`` means, from the docstring of its field; else a general advice."""
    fields: Mapping[str, Any] = Cluster.model_fields
    section, leaf = (SECTIONS.get(parts[0]), parts[-1]) if len(parts) > 1 else (None, parts[0] if parts else "")
    # An index of a list or a key of a dict (modules.0) has no field of its own: the one that holds it is described.
    info = (section.model_fields if section else fields).get(leaf) or fields.get(parts[0] if parts else "")
    description = " ".join((info.description or "").split()).removesuffix(".").replace("``", "") if info else ""
    return f"it means: {description}" if description else "change it"
