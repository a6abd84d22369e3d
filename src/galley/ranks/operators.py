"""DeepSpeed's native operators, compiled here once, so that ranks never do it all at once and in silence.

Each is compiled by a child process, ``python -m galley.ranks.operators NAME``, in a folder of its own beside the shared
one, and renamed into its place when it is whole and could be loaded. Nothing that is in place is ever written to or
removed, so that two runs may begin at once, be killed, and load while others compile. DeepSpeed itself, where it has to
compile after all, works in ``NAME/`` and never in our ``NAME-…/``.

A compiler's failure stays the child's own, and prepare need not import DeepSpeed. Whoever loads operators calls
:func:`adopt` before, as ``world.join`` does. Loading needs no compiler. ``python -m galley.ranks.operators`` prints the
shared folder, and a node may have a copy of that, which ``GALLEY_OPERATORS`` names.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from galley.contract.errors import UserError
from galley.contract.files import fsync_path
from galley.contract.spec import Placement, RunSpec
from galley.storage.cache import digest, locked, mark_used

SHARED_MEMORY, ADAM, PINNING, ASYNC_IO = "deepspeed_shm_comm", "cpu_adam", "pin_memory", "async_io"
TITLES = {
    SHARED_MEMORY: "shared-memory communication", ADAM: "CPU Adam", PINNING: "pinned memory",
    ASYNC_IO: "asynchronous file access",
}  # fmt: skip
NEEDED = {
    ADAM: ("the optimizer's offload needs", "install g++ and ninja", "a ZeRO config without offload"),
    PINNING: ("offload to NVMe needs", "install g++ and ninja", "zero3_offload_cpu"),
    ASYNC_IO: ("offload to NVMe needs", "install libaio-dev (libaio-devel), g++ and ninja", "zero3_offload_cpu"),
}
"""Operators that ranks cannot do without: what needs them, what compiling them needs, and what to take instead."""


def build_operators(spec: RunSpec) -> None:
    """Compile what this placement's ranks will load and is not there yet.

    Raises :class:`UserError` where one of ``NEEDED`` cannot be compiled. Ranks do without shared memory.
    """
    device = spec.placement.device
    mark_used(folder())
    for name in wanted(spec.placement):
        try:
            there = library(folder(), name, device).is_file() or _build(name, device)
        except OSError as error:
            what = f"cannot be written ({error.strerror})"
            raise UserError(str(folder()), what, "free some space there, or set TORCH_EXTENSIONS_DIR") from None
        if not there and name in NEEDED:
            why, install, instead = NEEDED[name]
            what = f"DeepSpeed's {TITLES[name]}, which {why}, cannot be compiled here"
            raise UserError("deepspeed", what, f"{install} (the compiler's messages are above), or take {instead}")


def environment() -> dict[str, str]:
    """Variables with which torch finds, or compiles, the same libraries in every process of this installation.

    torch keeps them in one folder for each user. Two installations, or two versions of ninja on ``PATH`` (with and
    without the virtual environment's), take turns there in compiling all of it anew. So each installation gets its
    own folder, unless ``TORCH_EXTENSIONS_DIR`` is set, and the ninja beside its interpreter comes first.
    """
    versions = [importlib.metadata.version(package) for package in ("torch", "deepspeed")]
    own = digest([sys.prefix, sys.version, platform.machine(), versions])
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or str(caches / "galley" / "operators" / own)
    beside, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    path = path if path.split(os.pathsep)[0] == beside else os.pathsep.join([beside, path])
    return {"TORCH_EXTENSIONS_DIR": folder, "PATH": path}


def folder() -> Path:
    """Where compiled operators are shared."""
    return Path(environment()["TORCH_EXTENSIONS_DIR"])


def library(where: Path, name: str, device: str) -> Path:
    """An operator in the shared folder or a copy of it. Another Python, torch or DeepSpeed has other libraries."""
    versions = [importlib.metadata.version(package) for package in ("torch", "deepspeed")]
    return where / f"{name}-{device}-{digest([sys.version, platform.machine(), versions])}" / f"{name}.so"


def adopt(placement: Placement | None = None) -> None:
    """Use the libraries that prepare compiled; to be called before an operator is loaded.

    DeepSpeed may have been imported: the variables are read when it loads one. What ranks of ``placement`` need is
    loaded here, from this node's copy or from where it was compiled; what is in neither, DeepSpeed will compile.
    """
    os.environ.update(environment())
    if placement is None:
        return
    for name in wanted(placement):
        _use_first(name, placement.device)


def _use_first(name: str, device: str) -> None:
    """Load the first compiled library of an operator that can be loaded, if one can."""
    for path in _compiled(name, device):
        if _use(name, path):
            return


def _compiled(name: str, device: str) -> list[Path]:
    """Libraries that are there, this node's copy first."""
    copy = os.environ.get("GALLEY_OPERATORS")
    folders = [Path(copy), folder()] if copy else [folder()]
    paths = [library(where, name, device) for where in folders]
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def _use(name: str, path: Path) -> bool:
    """Load a library as DeepSpeed would, once it had asked ninja and a compiler whether it is up to date."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    if name in OpBuilder._loaded_ops:
        return True
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    try:
        if name == PINNING:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # asynchronous file access finds its symbols there
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (ImportError, OSError) as error:
        print(f"DeepSpeed's {TITLES[name]} in {path} cannot be loaded here: {error}", flush=True)
        return False
    OpBuilder._loaded_ops[name] = module
    return True


def wanted(placement: Placement) -> list[str]:
    """Names of the operators that ranks of ``placement`` will load."""
    zero = placement.deepspeed.get("zero_optimization", {})
    device = (zero.get("offload_optimizer") or {}).get("device")
    names = []
    if placement.device == "cpu":
        names.append(SHARED_MEMORY)
    if device in ("cpu", "nvme"):
        names.append(ADAM)
    if device == "nvme":
        names += [PINNING, ASYNC_IO]
    return names


def _build(name: str, device: str) -> bool:
    """Compile an operator beside its place, then rename it there. False where it cannot be compiled."""
    final = library(folder(), name, device)
    final.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{final.parent.name}"
    with locked(folder() / f"{stem}.lock") as alone:
        if final.is_file():  # another run was quicker
            return True
        if alone:  # so whoever left these was killed
            for left in folder().glob(f"{stem}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        print(f"compiling DeepSpeed's {TITLES[name]} (about a minute, once)", flush=True)
        beside = Path(tempfile.mkdtemp(prefix=f"{stem}.", suffix=".tmp", dir=folder()))
        try:
            if not _compile(name, device, beside):
                return False
            compiled = beside / name / final.name
            fsync_path(compiled)
            compiled.replace(final)
            fsync_path(final.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return True


def _compile(name: str, device: str, beside: Path) -> bool:
    """Compile and load an operator in the folder ``beside``; where that fails, print the compiler's last messages."""
    own = {"TORCH_EXTENSIONS_DIR": str(beside), "GALLEY_OPERATORS": str(folder())}
    variables = {**os.environ, **environment(), **own, **({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})}
    command = [sys.executable, "-m", "galley.ranks.operators", name, device]
    done = subprocess.run(
        command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if done.returncode == 0:
        return True
    lines = done.stderr.splitlines()[-15:]
    print(f"DeepSpeed's {TITLES[name]} could not be compiled:", *lines, sep="\n", flush=True)
    return False


def main(name: str, device: str) -> None:
    """Compile an operator in ``TORCH_EXTENSIONS_DIR`` and load it."""
    if name == ASYNC_IO:  # DeepSpeed would compile what it builds on once more
        _use_first(PINNING, device)
    _load(name)


def _load(name: str) -> None:
    if name == ADAM:
        from deepspeed.ops.op_builder import CPUAdamBuilder

        CPUAdamBuilder().load()
    elif name == PINNING:
        from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder

        PinMemoryBuilder().load()
    elif name == ASYNC_IO:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        AsyncIOBuilder().load()
    else:
        from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

        ShareMemCommBuilder().load()


if __name__ == "__main__":
    if sys.argv[1:]:
        main(*sys.argv[1:])
    else:
        print(folder())
