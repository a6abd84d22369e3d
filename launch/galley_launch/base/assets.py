"""Where the shipped folders are: beside this package in a wheel, at the root in a checkout."""

from __future__ import annotations

from pathlib import Path

from galley.contract.errors import UserError

# The package itself, and what lies two folders above it: the repository's root, if this is launch/galley_launch.
_HERE = Path(__file__).resolve().parents[1]
_ROOT = _HERE.parent.parent


def folder(name: str) -> Path:
    """The shipped folder ``recipes``, ``ds_configs`` or ``slurm``. Raises ``UserError`` on a broken installation."""
    # A wheel carries its folders inside the package; a checkout has them at its root.
    for path in (_HERE / name, _ROOT / name):
        if path.is_dir():
            return path
    raise UserError("installation", f"{name}/ is neither in {_HERE} nor in {_ROOT}", "install Galley again")


def checkout() -> Path | None:
    """Root of the checkout that this package runs from; None where it is installed from a wheel."""
    inside = (_ROOT / "launch" / "galley_launch").resolve() == _HERE and (_ROOT / "pyproject.toml").is_file()
    return _ROOT if inside else None
