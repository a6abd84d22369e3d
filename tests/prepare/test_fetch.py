"""Models and data from a hub, played by a local server; each in a process of its own, for the address is read once."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare.conftest import rows, write_jsonl
from prepare.hub import COMMIT, Hub, serve

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.prepared import read_manifest
from galley.prepare.fetch import load_data

Make = Callable[..., tuple[RunSpec, RunDir]]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", rows(20))


def prepare(run: RunDir, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(home), "DS_ACCELERATOR": "cpu", **variables}
    command = [sys.executable, "-m", "galley.prepare", str(run.spec)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1].removeprefix("galley: ")


@pytest.mark.slow
def test_a_model_is_pinned_and_then_needs_no_hub(
    make_run: Make, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    _, run = make_run("org/name", data)
    with serve(Hub(model_folder)) as hub:
        done = prepare(run, tmp_path / "hf", HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    model = read_manifest(run).model
    assert (model.source, model.revision, Path(model.path).name) == ("org/name", COMMIT, COMMIT)
    assert prepare(run, tmp_path / "hf", HF_ENDPOINT=hub.url).returncode == 0  # nobody listens there any more
    _, offline = make_run("org/name", data, name="offline")
    done = prepare(offline, tmp_path / "hf", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert read_manifest(offline).model.revision == COMMIT
    _, empty = make_run("org/name", data, name="empty")
    expected = (
        "model.path: the hub cannot be reached and 'org/name' is not complete in its cache here; "
        "fetch it once where there is a network, or give a folder"
    )
    assert said(prepare(empty, tmp_path / "hf2", HF_HUB_OFFLINE="1")) == expected
    assert said(prepare(empty, tmp_path / "hf2", HF_ENDPOINT=hub.url)) == expected


@pytest.mark.parametrize(
    ("refuse", "expected"),
    [
        (
            (401, "GatedRepo"),
            "model.path: 'org/name' is gated and this account has no access; "
            "ask for access on its page, then `hf auth login` or set HF_TOKEN",
        ),
        (
            (403, "GatedRepo"),
            "model.path: 'org/name' is gated and this account has no access; "
            "ask for access on its page, then `hf auth login` or set HF_TOKEN",
        ),
        (
            (404, "RepoNotFound"),
            "model.path: 'org/name' is not a file or folder here, "
            "and the hub has nothing of that name for this account; "
            "check the name; if it is private, `hf auth login` or set HF_TOKEN",
        ),
        ((404, "RevisionNotFound"), "model.path: 'org/name' has no revision 'v9'; give a branch, tag or commit of it"),
    ],
)
def test_a_hub_that_refuses(
    make_run: Make, model_folder: Path, data: Path, tmp_path: Path, refuse: tuple[int, str], expected: str
) -> None:
    _, run = make_run("org/name", data, revision="v9")
    with serve(Hub(model_folder, refuse=refuse)) as hub:
        assert said(prepare(run, tmp_path / "hf", HF_ENDPOINT=hub.url)) == expected
    assert not run.data_manifest.exists()


def test_a_name_that_is_no_name(make_run: Make, data: Path, tmp_path: Path) -> None:
    _, run = make_run("a/b/c", data)
    line = said(prepare(run, tmp_path / "hf", HF_HUB_OFFLINE="1"))
    assert line == "model.path: 'a/b/c' is not a file or folder here, nor a hub id; check the name"


@pytest.mark.parametrize("what", ["model", "data"])
def test_without_a_network_there_is_one_line(
    make_run: Make, model_folder: Path, data: Path, tmp_path: Path, what: str
) -> None:
    model, rows_of = (model_folder, "org/name") if what == "data" else ("org/name", data)
    _, run = make_run(model, rows_of)
    done = prepare(run, tmp_path / "hf", HF_ENDPOINT="http://127.0.0.1:9")  # nobody listens there
    assert said(done) == (
        f"{what}.path: the hub cannot be reached and 'org/name' is not complete in its cache here; "
        f"fetch it once where there is a network, or give a {'file' if what == 'data' else 'folder'}"
    )


@pytest.mark.slow
def test_data_from_a_hub_is_pinned(make_run: Make, model_folder: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{**row, "id": number} for number, row in enumerate(rows(20))])
    _, run = make_run(model_folder, "org/name")
    with serve(Hub(folder, kind="datasets")) as hub:
        done = prepare(run, tmp_path / "hf", HF_ENDPOINT=hub.url)
        assert done.returncode == 0, done.stderr
    manifest = read_manifest(run)
    (source,) = manifest.sources
    assert (source.path, source.revision) == ("org/name", COMMIT)
    assert manifest.train.documents == 20


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("ValueError('Unknown split \"tain\". Should be one of [\\'train\\'].')", "data.split: Unknown split"),
        (
            "ValueError('Config name is missing.\\nPlease pick one among the available configs: [1, 2]')",
            "data.subset: 'org/name' on the hub has several configurations; use one of 1, 2",
        ),
        (
            "ValueError('BuilderConfig \\'x\\' not found. Available: [\\'main\\', \\'socratic\\']')",
            "data.subset: 'org/name' on the hub has several configurations, and this is none of them; use one of",
        ),
        (
            "errors.DatasetNotFoundError('Dataset is a gated dataset')",
            "data.path: 'org/name' is gated and this account",
        ),
        (
            "errors.DatasetNotFoundError('no such set')",
            "data.path: 'org/name' is not a file or folder here, and the hub",
        ),
    ],
)
def test_a_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, error: str, line: str) -> None:
    import datasets
    from datasets import exceptions

    def fail(*_: Any, **__: Any) -> None:
        raise eval(error, {"errors": exceptions})

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as caught:
        load_data("org/name", COMMIT, "tain")
    assert str(caught.value).startswith(line)


BROKEN: list[tuple[dict[str, bytes], str]] = [
    ({}, "'org/name' on the hub has no data files that can be read; give another data set"),
    ({"README.md": b"hello"}, "'org/name' on the hub has no data files that can be read; give another data set"),
    ({"train.jsonl": b""}, "'org/name' on the hub holds no rows in its split 'train'"),
    ({"train.jsonl": b"\n"}, "'org/name' on the hub holds no rows in its split 'train'"),
    ({"train.json": b"[]"}, "'org/name' on the hub holds no rows in its split 'train'"),
    ({"train.jsonl": b'{"messages": [\n'}, "'org/name' on the hub cannot be read: JSON parse error"),
    ({"train.parquet": b"PAR1xxxxPAR1"}, "'org/name' on the hub cannot be read: Parquet file size is 12 bytes"),
    ({"name.py": b"x = 1"}, "'org/name' on the hub cannot be read: Dataset scripts are no longer supported"),
    ({"README.md": b"---\nconfigs: [\n---\n", "train.jsonl": b"{}\n"}, "'org/name' on the hub cannot be read: while"),
]


@pytest.mark.long
@pytest.mark.slow
def test_hub_data_sets_that_are_empty_or_broken_are_one_line(tmp_path: Path) -> None:
    code = (
        "import sys; from galley.contract.errors import UserError; from galley.prepare.fetch import load_data\n"
        "from galley.prepare.formats.chat import CHAT\n"
        "try: list(load_data('org/name', None, 'train'))\n"
        "except UserError as error: print('said', error)"
    )

    def ask(endpoint: str, home: str) -> str:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / home), "HF_HUB_OFFLINE": "0"}
        environment |= {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        return done.stdout.splitlines()[-1].removeprefix("said data.path: ") if done.stdout else done.stderr

    for number, (files, expected) in enumerate(BROKEN):
        folder = tmp_path / f"set{number}"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with serve(Hub(folder, kind="datasets")) as hub:
            assert ask(hub.url, f"hf{number}").startswith(expected)
    assert ask("http://127.0.0.1:9", "none").startswith("the hub cannot be reached and 'org/name' is not complete")
