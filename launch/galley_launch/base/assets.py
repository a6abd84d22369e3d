"""Where the shipped folders are: beside this package in a wheel, at the root in a checkout."""

from __future__ import annotations

from pathlib import Path

from galley.contract.errors import UserError

_HERE = Path(__file__).resolve().parents[1]
_ROOT = _HERE.parent.parent


def folder(name: str) -> Path:
    """The shipped folder ``recipes``, ``ds_configs`` or ``slurm``. Raises ``UserError`` on a broken installation."""
    for place in (_HERE / name, _ROOT / name):
        if place.is_dir():
            return place
    raise UserError("installation", f"{name}/ is neither in {_HERE} nor in {_ROOT}", "install Galley again")


def checkout() -> Path | None:
    """Root of the checkout that this package runs from; None where it is installed from a wheel."""
    inside = (_ROOT / "launch" / "galley_launch").resolve() == _HERE and (_ROOT / "pyproject.toml").is_file()
    return _ROOT if inside else None
