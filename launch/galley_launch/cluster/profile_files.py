"""Where profiles of clusters are, and a copy of one that is the user's to change. The standard library only."""

from __future__ import annotations

import os
import re
from pathlib import Path

from galley.contract.errors import UserError
from galley_launch.base import assets
from galley_launch.base.grammar import nearest

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def folders() -> list[Path]:
    """Where profiles are, what wins last: shipped, the user's own, beside the recipes."""
    return [assets.folder("slurm") / "clusters", own_folder(), Path("clusters")]


def own_folder() -> Path:
    """Where a user's own profiles are, for all directories."""
    config = os.path.expanduser(os.environ.get("XDG_CONFIG_HOME") or "~/.config")  # noqa: PTH111 - Path's raises
    return Path(config) / "galley" / "clusters"


def every() -> dict[str, Path]:
    """Name to file of every profile."""
    found: dict[str, Path] = {}
    for folder in folders():
        found |= {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return dict(sorted(found.items()))


def path_of(name: str) -> Path:
    """The file of the profile ``name``, which may be a path itself. Raises ``UserError``."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            todo = "give a path to a .yaml file, or a name (see galley clusters)"
            raise UserError("cluster", f"no file {name}", todo)
        return Path(name)
    known = every()
    if name not in known:
        raise UserError("cluster", f"no cluster {name!r}", f"{nearest(name, known)} (see galley clusters)")
    return known[name]


def header(text: str) -> str:
    """The comment block that a profile begins with, without its hash signs."""
    lines = re.match(r"(?:#.*\n?)*", text)
    return re.sub(r"^# ?", "", lines[0] if lines else "", flags=re.MULTILINE).strip()


def copy(name: str, to: str = "") -> int:
    """Write a copy of the profile ``name`` that is the user's own, as ``to``. Raises ``UserError``."""
    source = path_of(name)
    word = to or source.stem
    if not _NAME.fullmatch(word):
        raise UserError("copy", f"{word!r} is not a cluster's name", "use letters, digits, '.', '_' and '-'")
    target = own_folder() / f"{word}.yaml"
    try:
        text = source.read_text(encoding="utf-8")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:  # Never over a profile that is there.
            file.write(text)
    except FileExistsError:
        raise UserError(str(target), "already exists", f"give another name: galley copy cluster {name} NAME") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(target), f"cannot be written ({error})", "make that directory writable") from None
    print(f"{target} is yours to change{'; it is used instead of the shipped one' if word == source.stem else ''}")
    print(f"next: galley clusters {word}; galley plan RECIPE cluster={word}")
    return 0
