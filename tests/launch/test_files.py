"""Locks and records where others put links, FIFOs, devices and directories."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from galley.contract.errors import UserError
from galley.contract.files import open_lock, open_regular, read_bytes, read_json, read_text
from galley.contract.rundir import RunDir
from galley.storage.cache import locked
from galley_launch.base import locks


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """Through it, somebody else's file would be locked and overwritten."""
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    run.lock.symlink_to(precious)
    assert not locks.is_live(run)
    with pytest.raises(UserError, match="symbolic link"), locks.held(run):
        pytest.fail("held")
    with pytest.raises(OSError, match="symbolic link"), locked(run.lock):
        pytest.fail("held")
    run.lock.unlink()
    run.lock.symlink_to(tmp_path / "not there")
    with pytest.raises(UserError, match="symbolic link"), locks.held(run):
        pytest.fail("held")
    assert not (tmp_path / "not there").exists()
    assert precious.read_text() == "keep me"


def test_a_lock_keeps_what_is_in_it_until_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("pid 1, host other\n")
    os.close(open_lock(path))
    with locked(path):
        assert path.read_text() == "pid 1, host other\n"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_a_lock_that_is_no_file(tmp_path: Path, kind: str) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.lock.mkdir() if kind == "directory" else os.mkfifo(run.lock)
    assert not locks.is_live(run)
    assert locks.holder(run) == "ranks that outlived their launcher"
    with pytest.raises(UserError, match=r"cannot be written to \(Is "), locks.held(run):
        pytest.fail("held")


@pytest.mark.timeout(20)
def test_only_regular_files_of_some_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    (tmp_path / "plain").write_text("{}")
    with (tmp_path / "endless").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("fifo", "zero", "folder", "endless", "nowhere"):
        assert read_json(tmp_path / name) is None
        with pytest.raises(OSError, match=r"Is a|Is no|more than|No such"):
            read_bytes(tmp_path / name)
    assert read_text(tmp_path / "link") == "{}"
    with open_regular(tmp_path / "plain") as file:
        assert file.read() == b"{}"
    for text in ("[1]", "[" * 100_000, '{"a": ' * 100_000, "\udc80", "1" * 5000, '{"a": ' + "1" * 5000 + "}"):
        (tmp_path / "plain").write_text(text, errors="surrogateescape")
        assert read_json(tmp_path / "plain") is None
