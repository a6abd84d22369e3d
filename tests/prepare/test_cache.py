"""The shared cache, weights' fingerprints and compiled operators' places."""

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest
from prepare.conftest import build_spec

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.ranks.operators import ADAM, ASYNC_IO, PINNING, SHARED_MEMORY, adopt, environment, wanted
from galley.ranks.stage import run_stage
from galley.storage.cache import FILES, entry, link_tree
from galley.storage.weights import check_folder, count_parameters, file_fingerprint, fingerprint, is_whole, weight_files


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


@pytest.mark.parametrize("where", ["", "kind", "kind/key"])
def test_a_file_where_a_folder_of_the_cache_should_be(tmp_path: Path, where: str) -> None:
    path = tmp_path / "cache" / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(
        UserError, match=r"cache: cannot be written: .* while making kind/key.*; set another cache"
    ) as e:
        entry(tmp_path / "cache", "kind", "key", make, "making")
    assert "\n" not in str(e.value)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("lost", ["sub/file", "sub", FILES, "everything", "half of a file"])
def test_an_entry_that_lost_a_file_is_made_again(tmp_path: Path, lost: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As the clean-up of a scratch file system leaves it."""
    made = entry(tmp_path, "kind", "key", make, "making")
    for path in [made / lost] if (made / lost).exists() else [*made.iterdir()]:
        if lost == "half of a file":
            (made / "sub" / "file").write_text("wh")
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert entry(tmp_path, "kind", "key", make, "making") == made
    assert (made / "sub" / "file").read_text() == "whole"
    assert ("has lost files" in capsys.readouterr().out) == (lost != FILES), "the list alone is not missed"
    assert sorted(path.name for path in (tmp_path / "kind").iterdir()) == [".key.lock", "key"]


def test_an_entry_of_an_earlier_version_stands(tmp_path: Path) -> None:
    made = entry(tmp_path, "kind", "key", make, "making")
    (made / FILES).unlink()
    assert entry(tmp_path, "kind", "key", lambda folder: pytest.fail("made twice"), "making") == made


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device", "/x/y"), OSError(errno.EDQUOT, "no")]
)
def test_a_disk_that_ends_a_stage_is_one_line(
    tmp_path: Path, error: OSError, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.spec.write_text(build_spec(tmp_path, "/m", "/d", tmp_path).to_json())

    def work(*_: object) -> None:
        raise error

    assert run_stage("prepare", work, [str(run.spec)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line in (
        "galley: /x/y: No space left on device; make room there",
        "galley: disk: no; make room: your quota is used up",
    )
    assert run.attempt(1).errors()[0]["message"] == line.removeprefix("galley: ")


def test_files_are_copied_where_they_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    (tmp_path / "from").mkdir()
    make(tmp_path / "from")
    monkeypatch.setattr(os, "link", fail)
    link_tree(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to" / "sub" / "file").read_text() == "whole"
    assert not (tmp_path / "to" / "sub" / "file").samefile(tmp_path / "from" / "sub" / "file")
    assert (tmp_path / "to" / "sub" / "file").stat().st_mode & 0o200  # nobody else's


def test_linked_files_cannot_be_written_in_place(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    make(tmp_path / "from")
    link_tree(tmp_path / "from", tmp_path / "to")
    file = tmp_path / "to" / "sub" / "file"
    assert file.samefile(tmp_path / "from" / "sub" / "file")
    assert file.stat().st_mode & 0o777 == 0o444
    assert file.parent.stat().st_mode & 0o200


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


def test_tensors_are_found_as_transformers_finds_them(model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    names, sharded = set(model.state_dict()), weight_files(str(tmp_path))
    assert set(sharded) == names
    assert len(set(sharded.values())) > 1
    assert is_whole(tmp_path)
    lost = sharded["lm_head.weight"]
    lost.rename(tmp_path / "lost")
    assert not is_whole(tmp_path)
    single = tmp_path / "model.safetensors"
    single.write_bytes((model_folder / single.name).read_bytes())
    assert weight_files(tmp_path) == dict.fromkeys(names, single)  # a left-over index is not looked at
    assert is_whole(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert weight_files(tmp_path / "nowhere") == {}


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
    [
        (1, None, [SHARED_MEMORY]),
        (2, "cpu", [SHARED_MEMORY, ADAM]),
        (1, "none", [SHARED_MEMORY]),
        (1, "nvme", [SHARED_MEMORY, ADAM, PINNING, ASYNC_IO]),
    ],
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


def test_operators_are_adopted_after_the_libraries_were_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import _get_build_directory

    assert CPUAdamBuilder.NAME == ADAM  # imported, nothing loaded
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "unset")  # so that it is put back
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    adopt()
    assert Path(_get_build_directory(ADAM, False)).is_relative_to(tmp_path / "galley" / "operators")
