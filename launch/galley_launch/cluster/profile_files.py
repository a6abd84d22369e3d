"""Where profiles of clusters are, and copying one for the user to change. The standard library only."""

from __future__ import annotations

import os
import re
from pathlib import Path

from galley.contract.errors import UserError
from galley_launch.base import assets
from galley_launch.base.grammar import nearest

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def folders() -> list[Path]:
    """Where profiles are: shipped, the user's own, those of this directory. Of two with one name the last counts."""
    return [assets.folder("slurm") / "clusters", own_folder(), Path("clusters")]


def own_folder() -> Path:
    """Where a user's own profiles are, for all directories."""
    # XDG Base Directory Specification: unset and empty mean the same.
    config = os.path.expanduser(os.environ.get("XDG_CONFIG_HOME") or "~/.config")  # noqa: PTH111 - Path's raises
    return Path(config) / "galley" / "clusters"


def every() -> dict[str, Path]:
    """Name to file of every profile."""
    files: dict[str, Path] = {}
    for folder in folders():
        files |= {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return dict(sorted(files.items()))


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
    """Copy the profile ``name`` into the user's own folder, as ``to`` (empty: under its name). Raises ``UserError``."""
    source = path_of(name)
    new = to or source.stem
    if not _NAME.fullmatch(new):
        raise UserError("copy", f"{new!r} is not a cluster's name", "use letters, digits, '.', '_' and '-'")
    target = own_folder() / f"{new}.yaml"
    try:
        text = source.read_text(encoding="utf-8")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:  # "x" fails where the file exists, in one step
            file.write(text)
    except FileExistsError:
        raise UserError(str(target), "already exists", f"give another name: galley copy cluster {name} NAME") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(target), f"cannot be written ({error})", "make that directory writable") from None
    print(f"{target} is yours to change{'; it is used instead of the shipped one' if new == source.stem else ''}")
    print(f"next: galley clusters {new}; galley plan RECIPE cluster={new}")
    return 0
