"""Operators compiled by several runs at once, some of them killed, while others load: nobody finds half a library.

A compiler that takes its time stands for DeepSpeed's slow sources; torch, ninja, locks and renames are the real ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy import make_spec

from galley.contract.rundir import RunDir
from galley.ranks.operators import PINNING, SHARED_MEMORY, build_operators, library

pytestmark = pytest.mark.slow

COMPILER = """#!/bin/bash
# Objects at once; a library that can be imported after a while. It is written in two parts, as linkers do.
echo "$$ $*" >>"$CALLS"
out=; dep=
while [[ $# -gt 0 ]]; do
  case $1 in
    -o) out=$2; shift;;
    -MF) dep=$2; shift;;
    -c) compile=1;;
    -dumpfullversion|-v|--version) exec g++ "$1";;
  esac
  shift
done
if [[ ${compile:-} ]]; then touch "$out"; [[ $dep ]] && echo "$out:" >"$dep"; exit 0; fi
rm -f "$out"
head -c 1000 "$LIBRARY" >"$out"
sleep "$LINKING"
tail -c +1001 "$LIBRARY" >>"$out"
chmod +x "$out"
"""
SOURCE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "NAME", 0, -1, 0};
PyMODINIT_FUNC PyInit_NAME(void) { return PyModule_Create(&module); }
"""
BUILD = """
import sys
from galley.ranks.operators import build_operators
from galley.contract.spec import RunSpec
build_operators(RunSpec.read(sys.argv[1]))
"""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A library that stands for DeepSpeed's, with the compiler that seems to make it."""
    import sysconfig

    source, made = tmp_path / "stand_in.c", tmp_path / "stand_in.so"
    source.write_text(SOURCE.replace("NAME", SHARED_MEMORY))
    include = sysconfig.get_paths()["include"]
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(made)], check=True)
    compiler = tmp_path / "g++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    return made


def begin(tmp_path: Path, made: Path, linking: float) -> subprocess.Popen[str]:
    """A run's preparation as far as its operators."""
    spec = make_spec(RunDir(tmp_path / "run"), tmp_path / "model", stage=0, steps=1)
    path = tmp_path / "run.json"
    path.write_text(spec.to_json())
    env = os.environ | {
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "shared"), "CXX": str(made.with_name("g++")), "LINKING": str(linking),
        "LIBRARY": str(made), "CALLS": str(tmp_path / "calls"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2] / "src"), *filter(None, sys.path)]),
    }  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", BUILD, str(path)], env=env, stdout=subprocess.PIPE, text=True)


def links(tmp_path: Path) -> list[int]:
    """Process ids of the compiler's calls that made a library."""
    calls = tmp_path / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return [int(line.split()[0]) for line in lines if " -c " not in line and "-shared" in line]


def wait_until_linking(tmp_path: Path, count: int) -> None:
    end = time.monotonic() + 120
    while len(links(tmp_path)) < count:
        assert time.monotonic() < end, "the compiler was not started"
        time.sleep(0.05)


def watch(final: Path, until: subprocess.Popen[str], whole: bytes) -> Iterator[bool]:
    """Whether the library was there, asked again and again until a process ends; what is there is always whole."""
    while until.poll() is None:
        there = final.exists()
        if there:
            assert final.read_bytes() == whole
        yield there
        time.sleep(0.005)


def test_two_runs_compile_at_once_and_one_is_killed(tmp_path: Path, made: Path) -> None:
    """Killed while it links: the other takes over, and who loads meanwhile finds nothing or the whole."""
    final, whole = library(tmp_path / "shared", SHARED_MEMORY, "cpu"), made.read_bytes()
    first = begin(tmp_path, made, linking=60)
    wait_until_linking(tmp_path, 1)
    second = begin(tmp_path, made, linking=1)
    time.sleep(1)
    first.send_signal(signal.SIGKILL)
    seen = list(watch(final, second, whole))
    assert second.returncode == 0
    assert "waiting for another run" in (second.stdout or ()).read()  # type: ignore[union-attr]
    assert not any(seen[: len(seen) // 4]), "nothing is there before it was compiled"
    assert final.read_bytes() == whole
    assert [path.name for path in final.parent.iterdir()] == [final.name]
    assert not list((tmp_path / "shared").glob(".*.tmp"))
    for link in links(tmp_path):  # what the killed run left at work
        try:
            os.kill(link, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_what_others_load_is_never_touched(tmp_path: Path, made: Path) -> None:
    """Runs that begin together compile once; later ones, and a DeepSpeed that compiles for itself, leave it alone."""
    final, whole = library(tmp_path / "shared", SHARED_MEMORY, "cpu"), made.read_bytes()
    together = [begin(tmp_path, made, linking=1) for _ in range(2)]
    for process in together:
        assert process.wait(120) == 0
    assert len(links(tmp_path)) == 1
    node = final.stat()
    again = begin(tmp_path, made, linking=1)
    assert all(watch(final, again, whole))
    (tmp_path / "shared" / SHARED_MEMORY).mkdir()  # where DeepSpeed itself works
    (tmp_path / "shared" / SHARED_MEMORY / "lock").touch()  # which a killed process of its left
    assert begin(tmp_path, made, linking=1).wait(120) == 0
    assert len(links(tmp_path)) == 1
    assert (final.stat().st_ino, final.stat().st_mtime_ns) == (node.st_ino, node.st_mtime_ns)
    final.unlink()  # a purge of old files took it
    assert begin(tmp_path, made, linking=0).wait(120) == 0
    assert final.read_bytes() == whole


def test_no_library_where_it_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory is done without; nothing is left that another run would take for a library."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "shared"))
    monkeypatch.setenv("CXX", "false")
    build_operators(make_spec(RunDir(tmp_path / "run"), tmp_path / "model", stage=0, steps=1))
    assert not list((tmp_path / "shared").rglob("*.so"))
    assert not list((tmp_path / "shared").glob(".*.tmp"))
    assert PINNING not in {path.name for path in (tmp_path / "shared").iterdir()}
