"""Completion in bash, zsh and fish: a script for each, which asks ``galley completion words …`` at every press of Tab.

The standard library only, without pydantic and yaml, whose imports take longer than a person waits after a Tab.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from galley.contract.errors import UserError
from galley_launch.base import assets
from galley_launch.base.grammar import Verb
from galley_launch.base.options import RESERVED, WRITTEN_OUT

_BASH = r"""# galley: complete verbs, recipes, runs, clusters and keys
_galley() {
    local line=${COMP_LINE:0:COMP_POINT} words current prefix IFS=$' \t'
    read -r -a words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current=${words[${#words[@]}-1]}
    IFS=$'\n'
    COMPREPLY=($(galley completion words "${words[@]:1}" 2> /dev/null))
    # bash takes "=" for the end of a word: what stands before it must not be written again.
    if [[ $current == *=* && $COMP_WORDBREAKS == *=* ]]; then
        prefix=${current%"${current##*=}"}
        COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
    fi
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2> /dev/null
    return 0
}
complete -o default -F _galley galley
"""
_ZSH = r"""#compdef galley
# galley: complete verbs, recipes, runs, clusters and keys
_galley() {
    local -a candidates
    candidates=("${(@f)$(galley completion words "${(@)words[2,CURRENT]}" 2> /dev/null)}")
    candidates=("${(@)candidates:#}")
    (( ${#candidates} )) || { _files; return }
    compadd -S '' -- "${(@M)candidates:#*=}"
    compadd -- "${(@)candidates:#*=}"
}
(( ${+functions[compdef]} )) || { autoload -Uz compinit && compinit }
compdef _galley galley
"""
_FISH = r"""# galley: complete verbs, recipes, runs, clusters and keys
complete -c galley -f -a '(galley completion words (commandline -opc)[2..] (commandline -ct) 2> /dev/null)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}

# Values of launch options that are fixed words; those of a recipe's keys come from its schema.
_FIXED = {"device": ("cpu", "cuda"), "step": ("last", "best"), "files": ("all", "none"), "yes": ("true",)}


def show(shell: str) -> int:
    """Print the script of ``shell``. Raises ``UserError`` for one that is not known."""
    if shell not in SCRIPTS:
        raise UserError("completion", f"{shell!r} is not a known shell", f"use one of {', '.join(SCRIPTS)}")
    print(SCRIPTS[shell], end="")
    return 0


def candidates(words: list[str], verbs: Mapping[str, Verb]) -> list[str]:
    """What may stand in place of the last of ``words``, sorted.

    ``words``: those after ``galley``; the last is the unfinished one, empty where a new one begins. ``verbs``: the
    table of verbs, by name.
    """
    *before, current = words or [""]
    if not before:
        return _starting(current, [*verbs, "--help", "--version"])
    verb = verbs.get(before[0])
    if verb is None:
        return []
    dashes = "--" if current.startswith("--") else ""
    key, equals, _ = current.removeprefix(dashes).partition("=")
    if before[-1].startswith("--") and "=" not in before[-1]:  # after --key comes its value
        return _starting(current, _values(before[-1][2:].replace("-", "_"), before))
    if equals:
        return _starting(current, (f"{dashes}{key}={value}" for value in _values(key, before)))
    # A new word: first what is positional, and keys once there is a positional word, or where none is expected.
    used = {word.removeprefix("--").partition("=")[0] for word in before[1:] if "=" in word or word.startswith("--")}
    named = [word for word in before[1:] if "=" not in word]
    names = _positional(verb, named, before) if not dashes else []
    keys = _keys(verb) if named or current or not names else []
    return _starting(current, [*names, *(f"{dashes}{key}=" for key in keys if key not in used)])


def _starting(current: str, words: Iterable[str]) -> list[str]:
    return sorted({word for word in words if word.startswith(current)})


def _positional(verb: Verb, named: list[str], before: list[str]) -> list[str]:
    """The candidates for the positional word after ``named``, by its name in the verb's usage (RECIPE, RUN, …)."""
    on_cluster = bool(verb.cluster_words) and named[:1] == ["cluster"]
    words = (verb.cluster_words if on_cluster else verb.words).split()
    more = words and words[-1].endswith("…]")
    word = words[len(named)] if len(named) < len(words) else words[-1] if more else ""
    match word.strip("[…]"):
        case "RECIPE":
            # A verb that takes runs=DIRECTORY also takes a run in place of a recipe, to continue it.
            runs = _runs(before) if "runs" in verb.keys else []
            return [*_recipes(), *runs, *(["cluster"] if verb.cluster_words else [])]
        case "RUN":
            return _runs(before)
        case "NAME":
            return _clusters()
        case "SHELL":
            return list(SCRIPTS)
    return []


def _keys(verb: Verb) -> list[str]:
    """The keys that ``verb`` takes; not ``force``, which only exists to be refused."""
    recipe = list(_settings()) if verb.overrides else []
    return sorted({*verb.keys, *recipe} - {"force"})


def _values(key: str, before: list[str]) -> list[str]:
    if key == "deepspeed":
        return sorted(path.stem for path in assets.folder("ds_configs").glob("*.json"))
    if key == "cluster":
        return _clusters()
    if key == "init_from":
        return _runs(before)
    return [*_FIXED.get(key, ()), *_settings().get(key, ())]


def _recipes() -> list[str]:
    folders = (Path("recipes"), assets.folder("recipes"))
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def _runs(before: list[str]) -> list[str]:
    base = next((word.partition("=")[2] for word in before if word.removeprefix("--").startswith("runs=")), "runs")
    return sorted(path.parent.name for path in Path(base).glob("*/run.json"))


def _clusters() -> list[str]:
    from galley_launch.cluster.profile_files import every

    return sorted(every())


@cache
def _settings() -> dict[str, tuple[str, ...]]:
    """Every key of a recipe, dotted and also by its last part if that is unique, with the words that it may have."""
    # From the shipped JSON schema, because importing the schema itself takes pydantic.
    schema = json.loads((assets.folder("recipes") / "schema.json").read_text(encoding="utf-8"))
    paths = dict(_leaves(schema, schema, ""))
    shortened = {path: values for path, values in paths.items() if not path.startswith(WRITTEN_OUT)}
    leaves = [path.rpartition(".")[2] for path in shortened]
    pairs = zip(leaves, shortened.values(), strict=True)
    short = {leaf: values for leaf, values in pairs if leaves.count(leaf) == 1 and leaf not in RESERVED}
    return short | paths


def _leaves(schema: dict[str, Any], part: dict[str, Any], prefix: str) -> Iterable[tuple[str, tuple[str, ...]]]:
    for name, field in part.get("properties", {}).items():
        # A field is a type, a reference to a section in $defs, or a union of such (anyOf, where it may be null).
        shapes = [field, *field.get("anyOf", ())]
        shapes = [schema["$defs"][shape["$ref"].rpartition("/")[2]] if "$ref" in shape else shape for shape in shapes]
        section = next((shape for shape in shapes if "properties" in shape), None)
        if section:
            yield from _leaves(schema, section, f"{prefix}{name}.")
        elif name != "extends":
            yield prefix + name, tuple(value for shape in shapes for value in _words(shape))


def _words(shape: dict[str, Any]) -> list[str]:
    """The words that a field of this type may have: true and false, or those of an enumeration."""
    if shape.get("type") == "boolean":
        return ["true", "false"]
    return [value for value in shape.get("enum", [shape.get("const")]) if isinstance(value, str)]
