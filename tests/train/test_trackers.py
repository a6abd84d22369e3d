"""Weights & Biases and MLflow through their own libraries: one run over all attempts, and never in training's way."""

from __future__ import annotations

import importlib.util
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from toy import make_documents, make_spec, metrics, rank_logs, write_data

from galley.contract.errors import UserError
from galley.contract.metrics import MetricsRow
from galley.contract.rundir import RunDir, read_json
from galley.contract.spec import RunSpec
from galley.prepare.prepare import work
from galley.track import trackers

SAMPLES = [[document] for document in make_documents(24)]
KEY = "0123456789abcdef" * 2 + "01234567"
SECRETS = {"WANDB_API_KEY": KEY, "MLFLOW_TRACKING_TOKEN": KEY}
CHATS = {"wandb": {"project": "chats", "group": "night"}}


def make_run(root: Path, model: Path, tracking: dict[str, Any], steps: int = 4) -> RunDir:
    run = RunDir(root)
    spec = make_spec(run, model, steps=steps, cadence={"save_every": 2})
    spec = RunSpec.model_validate(spec.model_dump(by_alias=True) | {"tracking": tracking})
    run.spec.write_text(spec.to_json())
    if not run.data_manifest.exists():
        write_data(run, model, SAMPLES, None, packed=False)
    return run


def train(ranks: Ranks, run: RunDir, env: dict[str, str]) -> str:
    """One attempt; returns what rank 0 printed."""
    attempt = run.begin_attempt()
    env = SECRETS | {"GALLEY_ATTEMPT": str(attempt.number)} | env
    assert ranks.run("galley.train.train:main", [str(run.spec)], 1, run.root / "ranks.log", env) == [0], rank_logs(run)
    return attempt.log("rank-0").read_text()


def two_attempts(ranks: Ranks, root: Path, model: Path, tracking: dict[str, Any], env: dict[str, str]) -> RunDir:
    """Four steps; then, as after a kill before the last save, the last two again and two more."""
    run = make_run(root, model, tracking)
    train(ranks, run, env)
    run.checkpoint(4).manifest.unlink()
    make_run(root, model, tracking, steps=6)
    assert "resuming after step 2" in train(ranks, run, env)
    assert KEY.encode() not in b"".join(path.read_bytes() for path in run.root.rglob("*") if path.is_file())
    return run


def losses(run: RunDir) -> list[tuple[int, float]]:
    found = list(enumerate(metrics(run), start=1))
    assert len(found) == 6
    return found


def records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: seven bytes, then LevelDB's log format (blocks of 32 KiB)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<4xHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of a record, or its end
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.slow
def test_trackers_have_one_run_over_two_attempts(
    tmp_path: Path, llama: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"file:{tmp_path}/mlruns"
    asked = CHATS | {"mlflow": {"experiment": "chats", "uri": uri}}
    run = two_attempts(ranks, tmp_path / "run", llama, asked, {"WANDB_MODE": "offline"})
    known = (read_json(run.tracker) or {})["id"]
    first, last = sorted((run.root / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert first.name == last.name == f"run-{known}.wandb"
    check_wandb(last, run, known)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_mlflow(uri, run, known)


def check_wandb(path: Path, run: RunDir, known: str) -> None:
    """The last attempt's files, which replace those before them: each step once."""
    found = list(records(path))
    head = next(each.run for each in found if each.HasField("run"))
    assert (head.run_id, head.project, head.run_group, head.display_name) == (known, "chats", "night", "run")
    assert values(head.config.update)["task"]["optimizer"]["lr"] == 3e-3
    rows = [values(each.history.item) for each in found if each.HasField("history")]
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == losses(run)
    assert [row["save_s"] for row in rows if "save_s" in row] == metrics(run, "save_s")
    axes = [each.metric for each in found if each.HasField("metric")]
    assert ("*", "step") in [(axis.glob_name, axis.step_metric) for axis in axes]
    assert [each.exit.exit_code for each in found if each.HasField("exit")] == [0]


def check_mlflow(uri: str, run: RunDir, known: str) -> None:
    """One run, to which both attempts added: the last value of each step stands."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("chats")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status, found.data.tags["galley.id"]) == ("run", "FINISHED", known)
    assert found.data.params["task.optimizer.lr"] == "0.003"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [each.step for each in history] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert list({each.step: each.value for each in history}.items()) == losses(run)
    assert found.data.metrics["loss"] == losses(run)[-1][1]


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.long
@pytest.mark.slow
def test_servers_that_never_answer_are_left_behind(tmp_path: Path, llama: Path, ranks: Ranks, silent: str) -> None:
    plain = make_run(tmp_path / "plain", llama, {})
    train(ranks, plain, {})
    run = make_run(tmp_path / "run", llama, CHATS | {"mlflow": {"experiment": "chats", "uri": silent}})
    began = time.time()
    said = train(ranks, run, {"WANDB_BASE_URL": silent})
    ended = time.time()
    assert metrics(run) == metrics(plain)
    exit_written = run.attempt(1).exit.stat().st_mtime
    assert exit_written - began < 20, "training itself waited"
    assert ended - exit_written < trackers.LIMIT + 10
    assert (read_json(run.attempt(1).exit) or {})["verdict"] == "done"
    for name in ("wandb", "mlflow"):
        assert said.count(f"tracker {name} did not take the last rows; metrics.jsonl has them\n") == 1


def test_a_tracker_that_fails_gets_the_same_rows_again_and_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "AGAIN", 0.0)
    monkeypatch.setattr(trackers, "TICK", 0.0)
    path, got, fails, ending = tmp_path / "metrics.jsonl", [], iter([True, True, False, True]), trackers.Ending()
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')

    def connect() -> trackers.Sink:
        if next(fails):
            raise OSError("https://ada:hidden@host is down\nsecond line")
        return trackers.Sink(log, got.append)

    def log(rows: list[MetricsRow]) -> None:
        if rows and next(fails, False):
            raise ValueError("busy")
        got.extend(row.step for row in rows)
        ending.well = True
        ending.come.set()

    with path.open("rb") as file:
        assert trackers.follow(connect, "x", file, 12, ending)
    assert got == [2, 3, True]
    out = capsys.readouterr().out
    assert out == "tracker x failed (OSError: https://host is down); training goes on, and it is tried again\n"


def test_a_rank_that_dies_ends_its_tracker_as_failed(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path}/mlruns"
    run = make_run(tmp_path / "run", llama, {"mlflow": {"experiment": "chats", "uri": uri}})
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n')
    made = trackers.start(RunSpec.read(run.spec), run, run.begin_attempt(), 0)
    made.children["mlflow"].communicate(timeout=60)  # its standard input ends, without the word
    (found,) = MlflowClient(uri).search_runs(["0", MlflowClient(uri).get_experiment_by_name("chats").experiment_id])
    assert (found.info.status, found.data.metrics) == ("FAILED", {"loss": 2.0})


def test_a_library_that_is_missing_is_refused_before_anything_starts(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = make_run(tmp_path / "run", llama, {"mlflow": {"experiment": "chats"}})
    with pytest.raises(UserError) as error:
        work(RunSpec.read(run.spec), run, run.attempt(1))
    words = "tracking.mlflow: the Python package mlflow is not installed here; pip install mlflow-skinny"
    assert str(error.value).startswith(words)


def test_a_folder_of_that_name_is_no_library(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "galley_no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: real("galley_no_such_tracker"))
    run = make_run(tmp_path / "run", llama, CHATS)
    with pytest.raises(UserError, match="package wandb is not installed here; pip install wandb"):
        trackers.check_installed(RunSpec.read(run.spec))
