"""A recipe: what to train, and how to run it by default. Text goes in, a typed and checked :class:`Recipe` comes out.

A recipe has the fields of the contract's ``Task`` at its top level, so that they are explained in one place,
the contract.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from galley.contract.errors import UserError
from galley.contract.spec import Cadence, Positive, Task, Tracking
from galley.contract.task_data import DataSource
from galley_launch.base import words
from galley_launch.base.grammar import nearest
from galley_launch.base.options import RESERVED, WRITTEN_OUT, Setting
from galley_launch.base.yaml_text import ONE_OF, Tree, read_value

_LONG = 200  # Characters above which a list of known keys is not printed.
_TYPO = 0.85  # From this ratio of difflib's on a word is a misspelling, and not another trainer's name for a key.

_EXTENDS = "A recipe's name, or a path to a .yaml file: this recipe is that one, with the settings here on top."
"""What ``extends:`` means. It is applied as files are read (``catalogue.py``), so it is no field of a recipe."""


class Recipe(Task):
    """One YAML file: the task, how often to log and save, and defaults of the placement."""

    seeding: Annotated[int, Field(ge=1, le=2)] = 2
    """How data order and dropout follow from the seed. 2: by arithmetic that no library changes. 1: as runs that were
    begun before there was a choice; a run that goes on keeps its own."""
    about: str = ""
    """One line for ``galley recipes``."""
    deepspeed: str = "zero2"
    """DeepSpeed preset that this recipe is paired with, or a path to a JSON file; ``deepspeed=`` overrides it."""
    micro_batch: Positive = 1
    """Samples that one rank takes through one forward and backward."""
    activation_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more computation."""
    threads: Annotated[int, Field(gt=0)] | None = None
    """CPU threads of each rank; null: this machine's cores divided by its ranks."""
    compile: bool = False
    """Compile each layer of the model (torch.compile): a slow first step, quicker ones after it."""
    liger: bool = False
    """Liger's Triton kernels for norms, rotary embeddings and gated layers; needs a GPU and liger-kernel."""
    profile: Annotated[int, Field(ge=0, le=100)] = 0
    """Steps to profile at the beginning of an attempt: a trace, and a table of where time and memory went."""
    cadence: Cadence = Cadence()
    """How often to log, measure and save."""
    tracking: Tracking = Tracking()
    """Experiment trackers beside TensorBoard."""

    def task(self) -> Task:
        """The part that defines what is trained: what may not change when a run goes on."""
        return Task(**{name: getattr(self, name) for name in Task.model_fields})


def _sections(kind: type[BaseModel], prefix: str = "") -> dict[str, type[BaseModel]]:
    """Dotted path to type of every section, those inside sections (``tracking.wandb``, which may be null) too."""
    sections: dict[str, type[BaseModel]] = {}
    for name, field in kind.model_fields.items():
        # get_args opens unions: a section that may be null is `Wandb | None`. A list of parts is no section.
        inner = () if get_origin(field.annotation) is list else get_args(field.annotation)
        for part in (field.annotation, *inner):
            if isinstance(part, type) and issubclass(part, BaseModel):
                sections |= {prefix + name: part} | _sections(part, f"{prefix}{name}.")
    return sections


_SECTIONS = _sections(Recipe)


def section_fields(section: str) -> Mapping[str, FieldInfo]:
    """The fields of a section (``tracking.wandb``) by name; empty where there is no such section."""
    return _SECTIONS[section].model_fields if section in _SECTIONS else {}


def keys() -> dict[str, list[str]]:
    """Every name that an override may use: a dotted path, or a leaf, with the dotted paths that it could mean."""
    paths: dict[str, list[str]] = {}
    every = [*Recipe.model_fields, *(f"{name}.{leaf}" for name in _SECTIONS for leaf in _SECTIONS[name].model_fields)]
    for path in every:
        if path in _SECTIONS:
            continue
        paths[path] = [path]
        leaf = path.rpartition(".")[2]
        if leaf != path and leaf not in RESERVED and not path.startswith(WRITTEN_OUT):
            paths.setdefault(leaf, []).append(path)
    return paths


def _unknown(where: str, key: str, known: Sequence[str]) -> UserError:
    """The error for an unknown key: a misspelling of one of ``known``, else what another trainer calls something."""
    leaf = key.rpartition(".")[2].lower().replace("-", "_")
    own = [name.rpartition(".")[2] for name in known]
    near = difflib.get_close_matches(leaf, [*own, *words.known()], n=1)
    todo = nearest(key, known)
    if not difflib.get_close_matches(leaf, own, n=1, cutoff=_TYPO):
        if words.answer(leaf):
            todo = words.answer(leaf)
        elif near and near[0] in words.known():
            todo = f"did you mean {near[0]!r}? {words.answer(near[0])}"
    if len(todo) > _LONG:
        todo = "galley show RECIPE lists all keys"
    return UserError(where, f"no such key: {key!r}", todo)


def resolve_key(key: str) -> str:
    """The dotted path that ``key`` means. Raises ``UserError`` where it is unknown or could mean several."""
    paths = keys().get(key)
    if key in _SECTIONS:
        raise UserError("command line", f"{key} is a section", f"set one of its keys: {_leaves(key)}")
    if paths is None:
        section, _, leaf = key.rpartition(".")
        known = [f"{section}.{name}" for name in _SECTIONS[section].model_fields] if section in _SECTIONS else keys()
        raise _unknown("command line", key if leaf else section, list(known))
    if len(paths) > 1:
        raise UserError("command line", f"{key!r} could mean {' or '.join(paths)}", "write the whole path")
    return paths[0]


def _leaves(section: str) -> str:
    return ", ".join(path for path in keys() if path.startswith(f"{section}."))


def _part(tree: Tree, section: str) -> Tree:
    """The section of ``tree``, added where there is none; ``""`` is the tree itself."""
    # Only a section inside another one may be null in a file (tracking.wandb); setting a key of it replaces the null.
    for name in section.split(".") if section else ():
        if "." in section and tree.get(name) is None:
            tree[name] = {}
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError("recipe", f"{section} holds {tree!r}", "write it as a section of keys")
    return tree


def override(tree: Tree, settings: Sequence[Setting]) -> Tree:
    """A copy of ``tree`` with each of ``settings`` put in its place."""
    result = deepcopy(tree)
    given: dict[str, str] = {}
    for key, _ in settings:
        path = resolve_key(key)
        if path in given:
            raise UserError("command line", f"{given[path]} and {key} are the same key", "keep one of them")
        given[path] = key
    for key, text in settings:
        section, _, leaf = resolve_key(key).rpartition(".")
        part = _part(result, section)
        # steps=100 takes back the recipe's epochs, unless both are given: then the contract refuses them together.
        for other in ONE_OF.get(section, ()) if leaf in ONE_OF.get(section, ()) else ():
            if f"{section}.{other}" not in given:
                part.pop(other, None)
        part[leaf] = read_value(key, text)
    return result


def _check_names(tree: Tree, where: str, set_by: Mapping[str, str]) -> None:
    for key, value in tree.items():
        if key in RESERVED - set(Recipe.model_fields):
            todo = f"remove it and write {key}=…"
            raise UserError(_where_set(key, where, set_by), f"{key!r} belongs on the command line", todo)
        if key not in Recipe.model_fields:
            raise _unknown(_where_set(key, where, set_by), key, [*Recipe.model_fields, "extends"])
        if key in _SECTIONS:
            _check_section(key, value, where, set_by)


def _check_section(section: str, value: Any, where: str, set_by: Mapping[str, str]) -> None:
    if not isinstance(value, dict):
        place = f"{_where_set(section, where, set_by)}: {section}"
        raise UserError(place, f"{value!r} is not a section", f"set its keys: {_leaves(section)}")
    for leaf, part in value.items():
        path = f"{section}.{leaf}"
        if leaf not in _SECTIONS[section].model_fields:
            raise _unknown(f"{_where_set(path, where, set_by)}: {section}", leaf, list(_SECTIONS[section].model_fields))
        if path in _SECTIONS and part is not None:
            _check_section(path, part, where, set_by)


def _where_set(key: str, where: str, set_by: Mapping[str, str]) -> str:
    """Where ``key`` (a dotted path) was set, as messages name it; of a section, where its first key was set."""
    return set_by.get(key) or next((file for path, file in set_by.items() if path.startswith(f"{key}.")), where)


def _description(path: str) -> str:
    section, _, leaf = path.rpartition(".")
    field = (_SECTIONS[section] if section else Recipe).model_fields.get(leaf)
    return " ".join((field.description or "").split()).removesuffix(".") if field else ""


def sentence(error: ErrorDetails, others: Sequence[ErrorDetails]) -> str:
    """What is wrong with a value, in plain words. ``others``: further errors of the same validation."""
    value = error["input"]
    match error["type"]:
        case "missing":
            return "has too few values" if isinstance(error["loc"][-1], int) else "is missing"
        case "int_parsing" | "int_type" | "int_from_float":
            return f"{value!r} is not a whole number"
        case "int_parsing_size":
            return f"{str(value)[:20]}… has too many digits"
        case "float_parsing" | "float_type":
            return f"{value!r} is not a number"
        case "bool_parsing" | "bool_type":
            return f"{value!r} is not true or false"
        case _:
            reason = error["msg"].removeprefix("Input ")  # "Input should be greater than 0"
            # For a union (a word, or a list of words) pydantic reports an error for each of its members.
            or_list = ", or a list [a,b]" if any(other["type"] == "list_type" for other in others) else ""
            return f"{value!r} {reason}{or_list}"


def _as_user_error(error: ValidationError, where: str, set_by: Mapping[str, str]) -> UserError:
    first, *others = error.errors()
    # `loc` is the path to the value: keys, then indices in lists and names of a union's members, which nobody typed.
    place, *inner = [str(part) for part in first["loc"]] or [""]
    while place in _SECTIONS and inner:
        place = f"{place}.{inner.pop(0)}"
    source = set_by.get(place, where)
    if first["type"] == "extra_forbidden":  # in a list of parts, whose keys `_check_names` has not seen
        todo = nearest(inner[-1], list(DataSource.model_fields))
        return UserError(f"{source}: {place}[{inner[0]}]", f"no such key: {inner[-1]!r}", todo)
    if inner and place == "data.sources":
        leaf = inner[1] if len(inner) > 1 else ""
        field = DataSource.model_fields.get(leaf)
        about = " ".join((field.description or "").split()).removesuffix(".") if field else "write {path: a.jsonl}"
        path = ".".join([f"{place}[{inner[0]}]", *inner[1:]])
        return UserError(f"{source}: {path}", sentence(first, others), f"it means: {about}" if field else about)
    if first["type"] == "value_error":  # The contract's own words: what; what to do.
        what, _, todo = str(first["ctx"]["error"]).rpartition("; ")
        return UserError(f"{source}: {place}".removesuffix(": "), what or todo, todo if what else "keep one of them")
    meaning = f"its keys: {_leaves(place)}" if place in _SECTIONS else f"it means: {_description(place)}"
    return UserError(f"{source}: {place}", sentence(first, others), meaning)


def _not_finite(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of numbers that are NaN or infinite: pydantic accepts "nan" and "inf" for a float."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _not_finite(part, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for part in value:
            yield from _not_finite(part, path)
    elif isinstance(value, float) and not math.isfinite(value):
        yield path


def build(tree: Tree, where: str, set_by: Mapping[str, str] | None = None) -> Recipe:
    """The typed recipe of ``tree`` (strings, from the file ``where`` and others).

    ``set_by``: dotted path to where else it was set (another file, the command line), for messages.
    Raises ``UserError`` for unknown keys, wrong types, lossy conversions and numbers that are out of limits.
    """
    set_by = set_by or {}
    _check_names(tree, where, set_by)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise _as_user_error(error, where, set_by) from None
    for path in _not_finite(recipe.model_dump()):
        raise UserError(
            f"{set_by.get(path, where)}: {path}", "is not a finite number", f"it means: {_description(path)}"
        )
    return recipe


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe's file. Required keys are not required of a file that extends another."""
    body: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    body["title"], body["description"] = "Galley recipe", "What to train; see galley show RECIPE."
    extends = {"type": "string", "title": "Extends", "description": _EXTENDS}
    body["properties"] = {"extends": extends} | body["properties"]
    sections = {name: body["$defs"][kind.__name__].pop("required", None) for name, kind in _SECTIONS.items()}
    needed = {name: {"required": names} for name, names in sections.items() if names and "." not in name}
    # "required" moves into a condition: it holds for a file without `extends`, for top-level keys and one level below.
    body["if"] = {"not": {"required": ["extends"]}}
    body["then"] = {"required": body.pop("required"), "properties": needed}
    return body


def header(text: str) -> str:
    """The comment block that a recipe's text begins with, without its hash signs: the recipe's manual."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if "yaml-language-server" not in line:
            lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines).strip()
