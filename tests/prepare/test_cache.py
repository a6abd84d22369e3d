"""The shared cache, weights' fingerprints and compiled operators' places."""

import errno
import os
import sys
from pathlib import Path

import pytest
from prepare.conftest import build_spec

from galley.cache import entry, link_tree
from galley.errors import UserError
from galley.operators import ADAM, SHARED_MEMORY, environment, wanted
from galley.weights import check_folder, count_parameters, file_fingerprint, fingerprint


def make(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("whole")


def test_an_entry_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = entry(tmp_path, "kind", "key", make, "making")
    assert entry(tmp_path, "kind", "key", lambda folder: pytest.fail("made twice"), "making") == first
    assert (first / "sub" / "file").read_text() == "whole"
    assert capsys.readouterr().out == "making\n"


def test_a_failure_leaves_no_entry(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        make(folder)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        entry(tmp_path, "kind", "key", fail, "making")
    assert [path.name for path in (tmp_path / "kind").iterdir()] == [".key.lock"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "kind" / ".key.abc.tmp"
    left.mkdir(parents=True)
    entry(tmp_path, "kind", "key", make, "making")
    assert not left.exists()


def test_a_full_disk_is_said_in_a_line(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left on device while making kind/key; free some space, or set"):
        entry(tmp_path, "kind", "key", fail, "making")


def test_files_are_copied_where_they_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    (tmp_path / "from").mkdir()
    make(tmp_path / "from")
    monkeypatch.setattr(os, "link", fail)
    link_tree(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to" / "sub" / "file").read_text() == "whole"
    assert not (tmp_path / "to" / "sub" / "file").samefile(tmp_path / "from" / "sub" / "file")


def test_a_model_is_known_by_its_weights(model_folder: Path, base_folder: Path, tmp_path: Path) -> None:
    import shutil

    check_folder("model.path", model_folder)
    copy = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    assert fingerprint(copy) == fingerprint(model_folder) != fingerprint(base_folder)
    weights = copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert fingerprint(copy) != fingerprint(model_folder)


def test_parameters_are_counted(model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert count_parameters(model_folder) == sum(each.numel() for each in model.parameters())


def test_a_large_file_is_sampled(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 27)
    before = file_fingerprint(path)
    with path.open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"x")
    assert file_fingerprint(path) != before


@pytest.mark.parametrize(
    ("ranks", "offload", "expected"),
    [(1, None, [SHARED_MEMORY]), (2, "cpu", [SHARED_MEMORY, ADAM]), (1, "none", [SHARED_MEMORY])],
)
def test_operators_that_ranks_will_load(tmp_path: Path, ranks: int, offload: str | None, expected: list[str]) -> None:
    zero = {"zero_optimization": {"stage": 2, **({"offload_optimizer": {"device": offload}} if offload else {})}}
    spec = build_spec(tmp_path, "/m", "/d", tmp_path, ranks=ranks, deepspeed=zero)
    assert wanted(spec.placement) == expected


def test_operators_have_a_place_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    found = environment()
    assert Path(found["TORCH_EXTENSIONS_DIR"]).parts[-3:-1] == ("galley", "operators")
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/own")
    assert environment()["TORCH_EXTENSIONS_DIR"] == "/own"
