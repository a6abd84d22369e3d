"""DeepSpeed's native operators, compiled here once, so that ranks never do it all at once and in silence.

Each is compiled by a child process, ``python -m galley.operators NAME``: a compiler's failure stays its own, and
prepare itself need not import DeepSpeed. Whoever loads them calls :func:`adopt` before, as ``galley.world.join`` does.
Loading needs no compiler. ``python -m galley.operators`` prints the folder where they are, and a node may have a copy
of that, which ``GALLEY_OPERATORS`` names.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from galley.cache import digest, locked
from galley.errors import UserError
from galley.rundir import read_json, write_atomic
from galley.spec import Placement, RunSpec

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
NOTICE, RESULT = "compiling", "library "
# Seconds after which torch's lock file is taken for that of a killed process: compilers that can be seen at work in
# the folder get the longer time (nobody's takes as long), those that could only be on another host the shorter one.
PATIENCE, DOUBT = 600.0, 30.0


def build_operators(spec: RunSpec) -> None:
    """Compile what this placement's ranks will load and is not there yet.

    Raises :class:`UserError` where one of ``NEEDED`` cannot be compiled. Ranks do without shared memory.
    """
    for name in wanted(spec.placement):
        note = _note(folder(), name, spec.placement.device)
        known = read_json(note)
        if known and Path(str(known.get("library"))).is_file():
            continue
        library = _compile(name, spec.placement.device)
        if library is None and name in NEEDED:
            why, install, instead = NEEDED[name]
            what = f"DeepSpeed's {TITLES[name]}, which {why}, cannot be compiled here"
            raise UserError("deepspeed", what, f"{install} (the compiler's messages are above), or take {instead}")
        if library:
            write_atomic(note, json.dumps({"library": library}) + "\n")


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
    """Where the operators are compiled: ``NAME/NAME.so``, and a note on each once it was."""
    return Path(environment()["TORCH_EXTENSIONS_DIR"])


def _note(where: Path, name: str, device: str) -> Path:
    return where / f".galley-{name}-{device}.json"


def adopt(placement: Placement | None = None) -> None:
    """Use the libraries that prepare compiled; to be called before an operator is loaded.

    DeepSpeed may have been imported: the variables are read when it loads one. What ranks of ``placement`` need is
    loaded here, from this node's copy or from where it was compiled; what is in neither, DeepSpeed will compile.
    """
    os.environ.update(environment())
    if placement is None:
        return
    for name in wanted(placement):
        any(_use(name, library) for library in _compiled(name, placement.device))


def _compiled(name: str, device: str) -> list[Path]:
    """Libraries that a note says were compiled, this node's copy first."""
    places = [Path(copy)] if (copy := os.environ.get("GALLEY_OPERATORS")) else []
    found = []
    for place in [*places, folder()]:
        if known := read_json(_note(place, name, device)):
            found += [place / name / f"{name}.so", Path(str(known.get("library")))]
    return [library for library in dict.fromkeys(found) if library.is_file()]


def _use(name: str, library: Path) -> bool:
    """Load a library as DeepSpeed would, once it had asked ninja and a compiler whether it is up to date."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    if name in OpBuilder._loaded_ops:
        return True
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    assert spec is not None
    try:
        if name == PINNING:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # asynchronous file access finds its symbols there
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (ImportError, OSError) as error:
        print(f"DeepSpeed's {TITLES[name]} in {library} cannot be loaded here: {error}", flush=True)
        return False
    OpBuilder._loaded_ops[name] = module
    return True


def wanted(placement: Placement) -> list[str]:
    """Names of the operators that ranks of ``placement`` will load."""
    zero = placement.deepspeed.get("zero_optimization", {})
    device = (zero.get("offload_optimizer") or {}).get("device")
    shared = [SHARED_MEMORY] * (placement.device == "cpu")
    return shared + [ADAM] * (device in ("cpu", "nvme")) + [PINNING, ASYNC_IO] * (device == "nvme")


def _compile(name: str, device: str) -> str | None:
    """The library's path, or None where it could not be compiled; then the compiler's last messages are printed."""
    variables = {**os.environ, **environment(), **({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})}
    command = [sys.executable, "-m", "galley.operators", name]
    library = None
    with (
        tempfile.TemporaryFile("w+") as messages,
        subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=messages, text=True) as child,
    ):
        for line in child.stdout or ():
            if line.startswith(NOTICE):
                print(line, end="", flush=True)
            elif line.startswith(RESULT):
                library = line.removeprefix(RESULT).strip()
        if child.wait() == 0 and library:
            return library
        messages.seek(0)
        print(f"DeepSpeed's {TITLES[name]} could not be compiled:", *messages.readlines()[-15:], sep="\n", flush=True)
    return None


def main(name: str) -> None:
    """Compile ``name`` unless it is there, and print the library's path as the last line."""
    from torch.utils.cpp_extension import _get_build_directory

    build = Path(_get_build_directory(name, False))
    library = build / f"{name}.so"
    mark = build / ".galley"
    with locked(build.with_name(f".galley-{name}.lock")):
        _clear_lock(build / "lock", sure=mark.exists())
        if not library.is_file():
            print(f"{NOTICE} DeepSpeed's {TITLES[name]} (about a minute, once)", flush=True)
        mark.touch()
        _load(name)
        mark.unlink()
    print(f"{RESULT}{library}")


def _clear_lock(lock: Path, sure: bool) -> None:
    """Remove the lock file that a killed compilation left, on which torch would wait for ever.

    ``sure``: it is ours, for we hold our own lock and a mark of ours is there. Otherwise it may be a program that
    knows nothing of us, and gets time to finish.
    """
    while lock.exists() and not sure:
        patience = PATIENCE if _at_work(lock.parent) else DOUBT
        if time.time() - lock.stat().st_mtime > patience:
            break
        time.sleep(1)
    lock.unlink(missing_ok=True)


def _at_work(folder: Path) -> bool:
    """Whether some process of this host works in ``folder``, as ninja and the compilers that it starts do."""
    links = Path("/proc").glob("[0-9]*/cwd")
    found = set()
    for link in links:
        with contextlib.suppress(OSError):  # gone, or somebody else's
            found.add(link.readlink())
    return folder.resolve() in found


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
    main(sys.argv[1]) if sys.argv[1:] else print(folder())
