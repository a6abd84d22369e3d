"""The keys and values of a user's DeepSpeed JSON: unknown keys are refused, and old names are replaced by today's.

DeepSpeed itself ignores ``gradient_cliping`` in silence, and fails in every rank at ``"reduce_bucket_size": "5e8"``.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from galley_launch.base.problems import Problem, clip, closest, shown
from galley_launch.deepspeed import values

Config = dict[str, Any]

_ZERO = "zero_optimization"
# Names of DeepSpeed's first releases that its own table of deprecated keys lacks, and that files still have.
_OLD_NAMES = {f"{_ZERO}.cpu_offload_params": "offload_param"}
_OFFLOADS = ("offload_optimizer", "offload_param")
_SENTENCE = 200  # Characters of DeepSpeed's own message about a removed key that are kept: its first sentences.
_WITH_FP16 = ("fp16.loss_scale_window", "fp16.min_loss_scale")
_MANY = 4  # More unknown keys than these are reported as one problem.
# Blocks that may be "auto" as a whole, which means the same as no block.
_WHOLE = ("bf16", "fp16", "data_types", "torch_autocast", "optimizer", "scheduler")


@dataclass
class Read:
    """A configuration with today's names and typed values, with problems and notes."""

    config: Config
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    """Keys whose values are comments."""
    off: dict[str, Problem] = field(default_factory=dict)
    """Problems with removed features that the file switches off, by key: DeepSpeed refuses the key in any case."""


@functools.cache
def table() -> dict[str, Any]:
    """``deepspeed_keys.json``; ``tests/launch/deepspeed_keys.py`` says what is in it and writes it."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("deepspeed_keys.json").read_text(encoding="utf-8"))
    return data


def read_keys(config: Config) -> Read:
    """``config`` as DeepSpeed understands it, and everything in it that DeepSpeed would refuse or ignore."""
    # The order matters: removed keys are not in the table of known keys, and would count as unknown further down. What
    # marks a comment is compared with the known keys as they are nested in the file. Values come last, because their
    # types are listed under today's names.
    read = Read(copy.deepcopy(config))
    _take_out_removed(read)
    _take_out_comments(read.config, table()["keys"], read)
    if read.comments:
        read.notes.append(f"ignored as comments: {', '.join(read.comments[:_MANY])}")
    _rename(read)
    # The first releases had true for stage 1, which DeepSpeed still reads.
    if isinstance(stage := read.config.get(_ZERO), bool):
        read.config[_ZERO] = {"stage": int(stage)}
        read.notes.append(f"{_ZERO} {shown(stage)} is read as stage {int(stage)}, as DeepSpeed does")
    for name in [name for name, value in read.config.items() if value is None or (name in _WHOLE and value == "auto")]:
        del read.config[name]
    read.config = _block(read.config, table()["keys"], "", read)
    return read


def is_on(value: Any) -> bool:
    """Whether a block or a value switches something on: by its ``enabled``, or else by any value that is not empty."""
    if isinstance(value, dict):
        return is_on(value["enabled"]) if "enabled" in value else any(is_on(part) for part in value.values())
    return value not in (None, False, 0, "auto", "") and value != []


def _take_out_removed(read: Read) -> None:
    for path, (since, sentence) in table()["removed"].items():
        block, _, leaf = path.rpartition(".")
        inside = read.config.get(block) if block else read.config
        if not isinstance(inside, dict) or leaf not in inside:
            continue
        value = inside.pop(leaf)
        while len(sentence) > _SENTENCE and ". " in sentence:
            sentence = sentence.rpartition(". ")[0]
        what = f"{path}: {sentence} (refused since DeepSpeed {since})"
        if is_on(value):
            read.problems.append(Problem(what, "remove it", brief=f"{path} was removed from DeepSpeed: remove it"))
        else:
            todo = "it is off here: remove it, or add take=recipe or take=deepspeed"
            brief = f"{path} was removed from DeepSpeed; {todo}"
            read.off[path] = Problem(what, todo, brief=brief)


def is_comment(key: str, known: Iterable[str]) -> bool:
    """Whether a key marks a comment (``_comment``, ``//``, ``#``), and is not a misspelt one of ``known``."""
    if "comment" in key.lower():
        return True
    return key.startswith(("_", "//", "#")) and closest(key.strip("_/# "), known) is None


def _take_out_comments(block: Config, allowed: dict[str, Any], read: Read) -> None:
    for key in list(block):
        if key not in allowed and is_comment(key, allowed):
            del block[key]
            read.comments.append(clip(key))
        elif isinstance(block[key], dict) and isinstance(allowed.get(key), dict):
            _take_out_comments(block[key], allowed[key], read)


def _rename(read: Read) -> None:
    renamed: list[str] = []
    for path, new in (table()["other_names"] | _OLD_NAMES).items():
        block, _, old = path.rpartition(".")
        inside = read.config.get(block) if block else read.config
        if not isinstance(inside, dict) or old not in inside:
            continue
        value = inside.pop(old)
        if old.startswith("cpu_offload"):
            _offload(inside, old, value, new, read)
        elif new in inside and inside[new] != value:
            what = f"{new} {shown(inside[new])} and {old} {shown(value)} are two names of one "
            read.problems.append(Problem(what + ("block" if not block else "setting"), f"keep {new}"))
        else:
            inside[new] = value
            renamed.append(f"{path} as {new}")
    if renamed:
        read.notes.append(f"read under today's names: {', '.join(renamed)}")


def _offload(zero: Config, old: str, value: Any, new: str, read: Read) -> None:
    """Replace ``cpu_offload: true`` by the block that it is today.

    ``cpu_offload_use_pin_memory`` has no effect in DeepSpeed any more: each block has a ``pin_memory`` of its own.
    """
    path = f"{_ZERO}.{old}"
    if value not in (True, False, None, "auto"):
        read.problems.append(Problem(f"{path} {shown(value)} is not true or false", f"write {new} instead"))
    elif old.endswith("use_pin_memory"):
        read.notes.append(f"{path} is ignored, as DeepSpeed does; write pin_memory in {' or '.join(_OFFLOADS)}")
    elif value is True and zero.get(new) not in (None, "auto"):
        read.problems.append(Problem(f"{path} and {new} say the same thing twice", f"keep {new}"))
    elif value is True:
        zero[new] = {"device": "cpu"}
        read.notes.append(f'{path} true is read as {new} {{"device": "cpu"}}')


def _block(block: Config, allowed: dict[str, Any], prefix: str, read: Read) -> Config:
    """``block`` with typed values, and without keys that are refused. ``allowed``: the part of the table for it."""
    kept: Config = {}
    unknown = [key for key in block if key not in allowed]
    read.problems += _many_unknown(unknown) if len(unknown) > _MANY else [_unknown(k, prefix, allowed) for k in unknown]
    for key, value in block.items():
        path, spec = prefix + key, allowed.get(key)  # a dict: a block; a list: [type, limits] of a value
        if spec is None:
            continue
        if isinstance(spec, dict) and isinstance(value, dict):
            kept[key] = _block(value, spec, f"{path}.", read)
        elif value == "auto" and path in (_ZERO, f"{_ZERO}.stage"):
            read.problems.append(
                Problem(f'{path} "auto" is not a stage: DeepSpeed takes it for 0', "choose 0, 1, 2 or 3")
            )
        elif value == "auto" or (isinstance(spec, dict) and value is None) or _is_never(path, value):
            kept |= {key: value} if value == "auto" else {}
        elif isinstance(spec, dict):
            what = f"{clip(path)} {shown(value)} is not an object"
            first = sorted(spec, key=lambda name: name not in ("enabled", "stage", "device", "params", "type"))[:8]
            more = ", …" if len(spec) > len(first) else ""
            read.problems.append(Problem(what, f"its keys: {', '.join(first)}{more}"))
        elif value is None and spec[1].get("strict") and spec[0] != "enum":
            continue  # DeepSpeed reads these with dict.get, so null is the same as no key.
        else:
            typed, problem = values.check(path, value, spec)
            if problem and not (path in _WITH_FP16 and value in (0, -1) and not is_on(block.get("enabled"))):
                read.problems.append(problem)
            elif problem:
                continue  # DeepSpeed checks these only where fp16 is on.
            else:
                kept[key] = typed
    return kept


def _is_never(path: str, value: Any) -> bool:
    """Whether this is ``steps_per_print`` as infinity, which accelerate writes into the files that it saves."""
    return path == "steps_per_print" and value in (float("inf"), "inf", "Infinity")


def _many_unknown(keys: list[str]) -> list[Problem]:
    """One problem for a file whose keys are mostly unknown: it is probably not DeepSpeed's at all."""
    names = ", ".join(clip(key) for key in keys[:_MANY])
    what = f"DeepSpeed has no keys {names} and {len(keys) - _MANY} more"
    inside = " its 'deepspeed' may name the one" if "deepspeed" in keys else " a trainer's file is something else"
    return [Problem(what, f"is this a DeepSpeed configuration?{inside}")]


def _unknown(key: str, prefix: str, allowed: dict[str, Any]) -> Problem:
    """The problem of an unknown key, with the likeliest mistake: the wrong block, a misspelling here, one elsewhere."""
    what = f"DeepSpeed has no key {clip(prefix + key)!r}"
    homes = [path for path in _paths(table()["keys"]) if path.rpartition(".")[2] == key]
    if key in ("lr", "learning_rate", "betas", "eps", "weight_decay"):
        homes = [f"optimizer.params.{'lr' if key == 'learning_rate' else key}"]
    if homes:
        level = prefix or "zero_optimization."
        best = next((path for path in homes if path.startswith(level)), homes[0])
        place = f"as {best}" if "." in best else "at the top level"
        return Problem(what, f"it belongs {place}")
    near = closest(key, allowed)
    if near:
        return Problem(what, f"did you mean {near!r}?")
    # Among the keys of other blocks a likeness is more often chance, so it must be closer (0.87 instead of 0.6).
    leaf = closest(key, [path.rpartition(".")[2] for path in _paths(table()["keys"])], cutoff=0.87)
    path = next((path for path in _paths(table()["keys"]) if path.rpartition(".")[2] == leaf), "")
    return Problem(what, f"did you mean {path}?" if path else "remove it; it would be silently ignored")


def _paths(keys: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, spec in keys.items():
        yield prefix + key
        if isinstance(spec, dict):
            yield from _paths(spec, f"{prefix}{key}.")
