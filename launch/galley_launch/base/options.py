"""The settings of a command line, split once: launch options, read into types, and overrides of the recipe.

Each value of a launch option is checked here, as far as it can be without a recipe, a profile or devices. The standard
library only: completion and help load this module too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from galley.contract.errors import UserError

CLUSTER_PREFIX = "cluster."
_PROFILE_KEYS = {"ranks": "cluster.ranks_per_node", "device": "cluster.device"}
"""Launch options that, where a run is submitted, change the cluster's profile instead."""


class Setting(NamedTuple):
    """A ``key=value`` word."""

    key: str
    value: str


def split(word: str) -> Setting:
    """The setting that the word ``key=value`` gives."""
    key, _, value = word.partition("=")
    return Setting(key, value)


@dataclass(frozen=True)
class LaunchOptions:
    """Where and how to launch. None: not given on the command line."""

    name: str | None = None
    """The name of the run."""
    runs: Path | None = None
    """The directory of runs."""
    deepspeed: str | None = None
    """A preset, or the path of a JSON file."""
    take: str = ""
    """``deepspeed`` or ``recipe``: whose values are used where the two differ. Empty: a difference is refused."""
    device: str | None = None
    """``cuda`` or ``cpu``. Always None for a submission, whose profile has it."""
    ranks: int | None = None
    """Ranks on each node. Always None for a submission, as ``device`` is."""
    gpus: tuple[str, ...] | None = None
    """GPUs by index or UUID; ``()``: all that are visible."""
    nodes: int | None = None
    cluster: str | None = None
    """A profile's name or path."""
    init_from: str | None = None
    """A finished run, whose exported model training starts from."""
    files: bool = False
    """Whether a plan prints every file."""
    examples: int = 2
    """How many rows are shown as they will be trained on."""
    step: str = "last"
    """Which checkpoint is exported: ``last``, ``best`` or digits."""
    attempt: int | None = None
    rank: int | None = None
    older: int = 30
    """Days for which something was not used, to be removed from the cache."""
    yes: bool = False
    """Remove without asking."""
    cluster_overrides: tuple[Setting, ...] = ()
    """Changes to the profile, with keys that begin with ``cluster.``."""

    @property
    def base(self) -> Path:
        """The directory in which runs are looked for by name."""
        return self.runs or Path("runs")


@dataclass(frozen=True)
class Settings:
    """All settings of a command line."""

    options: LaunchOptions = LaunchOptions()
    overrides: tuple[Setting, ...] = ()
    """New values for keys of the recipe, which are dotted paths or their last parts."""
    words: tuple[str, ...] = ()
    """Every ``key=value`` as it was typed, without ``files`` and ``examples``; ``run.json`` keeps them."""
    submits: bool = False
    """Whether the run goes to a cluster, not to this box."""


_DIGITS = 18
"""Of a whole number that an option takes; Python's int() refuses more than 4,300."""


def whole(key: str, least: int) -> Callable[[str], int]:
    """A function that reads a whole number of at least ``least``; ``key`` names it in messages."""

    def read_whole(text: str) -> int:
        if not text.isdecimal() or len(text) > _DIGITS or int(text) < least:
            todo = f"write {key}={least}, {key}={least + 1} …"
            raise UserError(key, f"{text!r} is not a whole number from {least}", todo)
        return int(text)

    return read_whole


def _device(text: str) -> str:
    if text not in ("cuda", "cpu"):
        raise UserError("device", f"{text!r} is neither cuda nor cpu", "write device=cuda or device=cpu")
    return text


_GPU = re.compile(r"\d{1,4}|(?:GPU|MIG)-\S+")  # what CUDA_VISIBLE_DEVICES takes: an index or a UUID


def _gpus(text: str) -> tuple[str, ...]:
    from galley_launch.base.yaml_text import read_names  # It loads yaml, which help and completion do without.

    names = read_names(text)
    if not names:
        raise UserError("gpus", "names no GPU", "write gpus=0,1 or gpus=all; device=cpu ranks=N for the CPU")
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise UserError("gpus", f"GPU {repeated} is given twice", "one rank takes one GPU; write gpus=0,1 or gpus=all")
    if "all" in names and len(names) > 1:
        raise UserError("gpus", f"{text!r} names all and some", "write gpus=all alone")
    invalid = next((name for name in names if not (name == "all" or _GPU.fullmatch(name))), None)
    if invalid:
        first, dash, last = invalid.partition("-")  # 0-3 is answered with the list that it probably means
        is_number = first.isdecimal() and last.isdecimal() and len(invalid) < _DIGITS
        is_range = bool(dash) and is_number and int(first) < int(last) < 1000
        todo = f"write gpus={','.join(map(str, range(int(first), int(last) + 1)))}" if is_range else "write gpus=0,1"
        raise UserError("gpus", f"{invalid!r} is neither a GPU's number nor its UUID", todo)
    return () if names == ["all"] else tuple(names)


def _files(text: str) -> bool:
    if text not in ("all", "none"):
        raise UserError("files", f"{text!r} is neither all nor none", "use files=all to see every file's bytes")
    return text == "all"


def _step(text: str) -> str:
    if text not in ("last", "best") and not text.isdecimal():
        raise UserError("step", f"{text!r} is not a step", "write step=last, step=best or step=N")
    return text


def _yes(text: str) -> bool:
    answer = text.lower()
    if answer not in ("true", "false"):
        raise UserError("yes", f"{answer!r} is neither true nor false", "use yes=true to remove without being asked")
    return answer == "true"


def _force(_text: str) -> str:
    # It is among the options only so that it is answered here; completion leaves it out.
    raise UserError("force", "nothing here can be forced", "leave it out")


_READERS: dict[str, Callable[[str], Any]] = {
    "name": str,
    "runs": Path,
    "deepspeed": str,
    "take": str,
    "device": _device,
    "ranks": whole("ranks", 1),
    "gpus": _gpus,
    "nodes": whole("nodes", 1),
    "cluster": str,
    "init_from": str,
    "files": _files,
    "examples": whole("examples", 0),
    "step": _step,
    "attempt": whole("attempt", 0),
    "rank": whole("rank", 0),
    "older": whole("older", 1),
    "yes": _yes,
    "force": _force,
}
"""Every launch option, apart from those that begin with ``cluster.``, and the function that reads its value."""

RESERVED = frozenset(_READERS)
"""Keys of the launcher; no key of a recipe may be one of these."""
WRITTEN_OUT = "data.columns."
"""Keys below it are never shortened: `output` or `text` alone is another trainer's setting, not a column's name."""


def read(words: Iterable[str], submits: bool | None = None) -> Settings:
    """The settings that ``key=value`` words give. Raises ``UserError`` for a value that an option cannot take.

    ``submits``: whether the run goes to a cluster; None: where ``cluster=`` is among the words.
    """
    settings = [split(word) for word in words]
    # `plan`, `status` and the like do not know in advance whether they are about a cluster; `run` and `submit` do.
    if submits is None:
        submits = any(setting.key == "cluster" for setting in settings)
    values: dict[str, Any] = {}
    overrides, of_profile = [], []  # the settings of the recipe, and those of the cluster's profile
    for key, value in settings:
        if key.startswith(CLUSTER_PREFIX):
            of_profile.append(Setting(key, value))
        elif submits and key in _PROFILE_KEYS:
            of_profile.append(Setting(_PROFILE_KEYS[key], value))
        elif key in _READERS:
            values[key] = _READERS[key](value)
        else:
            overrides.append(Setting(key, value))
    options = LaunchOptions(**values, cluster_overrides=tuple(of_profile))
    # These only change what is printed, so they are no part of what a run was started with.
    typed = tuple(f"{key}={value}" for key, value in settings if key not in ("files", "examples"))
    return Settings(options, tuple(overrides), typed, submits)
