"""``galley report``: one page that holds what the run's files hold, needs nothing else, and executes nothing."""

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galley.contract.rundir import Attempt, RunDir
from galley_launch import cli
from galley_launch.report import charts, history, report
from galley_launch.report import rows as report_rows
from galley_launch.submit import queue
from launch import fakes

BEGAN = 1_795_000_000.0
VOID = {"meta", "br", "hr", "input", "link", "img"}
CHARTS = ["Loss", "Learning rate", "Gradient norm", "Tokens a second", "Peak memory of the first rank, GB"]


class Page(HTMLParser):
    """What a browser would find: sections, tables, charts; every tag and attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: dict[str, list[str]] = {}
        self.words: list[str] = []
        self.paths: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, "tags that nothing closes"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "path":
            self.paths.append((str(dict(attrs)["class"]), str(dict(attrs)["d"])))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.text.setdefault(self.open[-1], []).append(data.strip())
            self.words.append(data.strip())

    @property
    def whole(self) -> str:
        return " ".join(self.words)

    def after(self, label: str, count: int = 1) -> list[str]:
        """The texts that follow ``label``."""
        place = self.words.index(label)
        return self.words[place + 1 : place + 1 + count]


def page(run: RunDir, jobs: queue.Queue | None = None, now: float = BEGAN + 1e6) -> Page:
    return Page(report.render(run, jobs, now))


def step(number: int, seconds: float = 2.0, **more: object) -> dict[str, Any]:
    row = {
        "step": number,
        "steps": 9,
        "epoch": number / 9,
        "loss": 3 - number / 8,
        "lr": 1e-4 * number,
        "grad_norm": 0.5,
    }
    row |= {"supervised_tokens": 40, "tokens": 100, "tokens_per_s": 100 / seconds, "mfu": None, "peak_memory_gb": 1.25}
    return row | {"step_s": seconds, "left_s": 7.0} | more


def put(path: Path, body: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body))


def metrics(run: RunDir, rows: list[dict[str, Any]]) -> None:
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scalar(when: float, number: int, tag: str, value: float) -> bytes:
    """A record of a TensorBoard file, field by field, but for its checksums."""
    name = tag.encode()
    inner = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", value)
    summary = b"\x0a" + bytes([len(inner)]) + inner
    varint = bytes([number % 128 | 128, number // 128]) if number > 127 else bytes([number])
    event = b"\x09" + struct.pack("<d", when) + b"\x10" + varint + b"\x2a" + bytes([len(summary)]) + summary
    return struct.pack("<Q", len(event)) + b"crc1" + event + b"crc2"


def events(run: RunDir, *records: tuple[float, int, str, float]) -> None:
    """One TensorBoard file; times are seconds after ``BEGAN``."""
    run.tensorboard.mkdir(exist_ok=True)
    body = b"".join(scalar(BEGAN + when, *rest) for when, *rest in records)  # type: ignore[arg-type]
    (run.tensorboard / f"events.out.tfevents.{records[0][0]}").write_bytes(body)


def attempt(run: RunDir, number: int, end: dict[str, Any] | None = None, **job: Any) -> Attempt:
    made = run.attempt(number)
    put(made.placement, fakes.spec(run.root.with_name("x")).placement.model_dump(mode="json"))
    for path, body in ((made.job, job), (made.exit, end)):
        if body:
            put(path, body)
    return made


def checkpoint(run: RunDir, number: int, held_out: float | None) -> None:
    put(
        run.checkpoint(number).manifest,
        {"files": {}, "step": number, "world": 2, "zero_stage": 3, "held_out_loss": held_out},
    )


def split(**more: int) -> dict[str, int]:
    names = (
        "rows samples documents tokens supervised longest dropped_overlong truncated dropped_unsupervised turns_masked"
    )
    return dict.fromkeys(names.split(), 0) | more


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """``runs/x``: a run that nothing has been done for."""
    monkeypatch.chdir(tmp_path)
    made = RunDir(Path("runs/x"))
    made.root.mkdir(parents=True)
    made.spec.write_text(fakes.spec(made.root.absolute()).to_json())
    return made


@pytest.fixture
def slurm(run: RunDir) -> RunDir:
    """A run of two jobs: the first is killed after step 5, the second goes on after step 4 and finishes."""
    rows = [step(number) for number in range(1, 10)]
    rows[4:4] = [{"step": 4, "held_out_loss": 2.75, "held_out_tokens": 9}, {"step": 4, "stall_s": 1.5}]
    metrics(run, [*rows, {"step": 9, "held_out_loss": 2.5, "held_out_tokens": 9}, {"step": 9, "stall_s": 1.5}])
    failed = {"verdict": "failed", "reason": "failure", "kind": "killed", "message": "rank 1 was ended by signal 9"}
    attempt(
        run,
        1,
        failed | {"ended": BEGAN + 40, "again": True},
        job="7",
        nodes=["n1", "n2"],
        started=BEGAN,
        ranks=2,
        checkpoint=0,
    )
    done = {"verdict": "done", "reason": "finished", "ended": BEGAN + 80, "exported": True}
    attempt(run, 2, done, job="8", nodes=["n1", "n3"], started=BEGAN + 50, ranks=2, checkpoint=4)
    first = [(10 + 2 * number, number, "step_s", 2.0) for number in range(1, 5)]
    events(run, *first, (21.0, 4, "held_out_loss", 2.75), (22.5, 4, "stall_s", 1.5), (24.5, 5, "step_s", 2.0))
    second = [(52.0 + 2 * number, number, "step_s", 2.0) for number in range(5, 10)]
    events(run, *second, (73.0, 9, "held_out_loss", 2.5), (74.5, 9, "stall_s", 1.5))
    for number, loss in ((4, 2.75), (9, 2.5)):
        checkpoint(run, number, loss)
    return run


def test_the_numbers_are_those_of_the_files(slurm: RunDir) -> None:
    put(slurm.data_manifest, {
        "packed": True, "max_length": 10,
        "sources": [{"what": "data", "path": "/d/chats.jsonl", "size": 2500, "sha256": "ab" * 32}],
        "train": split(samples=130, documents=250, tokens=1234, supervised=617, longest=10, dropped_overlong=3),
        "held_out": split(samples=5, documents=12, tokens=40, supervised=10, longest=9),
        "model": {"parameters": 1234567},
    })  # fmt: skip
    checks = [
        {"what": "model", "against": "the trained model", "difference": 1.11e-7, "tolerance": 1e-4, "same_top": 0.75}
    ]
    put(
        slurm.export / "export.json",
        {"step": 9, "method": "lora", "checks": [*checks, {**checks[0], "difference": 2e-4}]},
    )
    put(slurm.cluster, {"name": "big", "partition": "gpu", "time": "2:00:00"})
    found = page(slurm)
    assert found.text["h1"] == ["x"]
    assert found.text["h3"] == CHARTS
    assert "step 9 of 9" in found.whole
    assert found.after("loss", 2) == ["1.8750", "at step 9"]
    assert found.after("best held-out loss", 2) == ["2.5000", "at step 9"]
    assert found.after("tokens seen", 2) == ["900", "40.0% trained on"]
    assert found.after("tokens", 2) == ["1,234", "40"]
    assert found.after("tokens trained on", 2) == ["617 (50.0%)", "10 (25.0%)"]
    assert found.after("packing fills", 2) == ["94.9%", "80.0%"]
    assert found.after("left out, too long") == ["3"]
    assert "cut, too long" not in found.words
    assert found.after("Data", 2) == ["data", "/d/chats.jsonl, 2.5 kB, sha256 abababababab…"]
    assert found.after("compared with", 12) == [
        *("model", "passed", "1.11e-07", "1e-04", "75%", "the trained model"),
        *("model", "FAILED", "2.00e-04", "1e-04", "75%", "the trained model"),
    ]
    kept = [
        *("9", "2.5000", "best, newest", "0 bytes", "2 ranks, ZeRO-3"),
        *("4", "2.7500", "0 bytes", "2 ranks, ZeRO-3"),
    ]
    assert found.after("written by", 9) == kept
    assert found.after("cluster") == ["big, partition gpu, jobs of 2:00:00"]
    assert "org/model, 1.23M parameters, bfloat16" in found.words
    assert '"train_batch_size": 1' in found.whole


def test_nothing_is_fetched_and_nothing_can_be_executed(slurm: RunDir) -> None:
    text = report.render(slurm, None, BEGAN)
    found = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    assert ("content", "width=device-width, initial-scale=1") in found.attributes


def test_words_of_others_stay_words(run: RunDir) -> None:
    evil = "<script>alert(1)</script>\"' onload=alert(2) <img src=x onerror=alert(3)> {{ 77777 * 77773 }} \ud800"
    spec = fakes.spec(run.root.absolute()).model_dump(mode="json", by_alias=True)
    spec["task"]["data"]["path"] = spec["origin"]["recipe"] = spec["placement"]["deepspeed"]["x"] = evil[:-1]
    spec["origin"]["overrides"] = [evil[:-1]]
    named = RunDir(run.root.with_name(f'{evil[:8]}-&amp;-"onload=x'))
    run.root.rename(named.root)
    put(named.spec, spec)
    end = {"verdict": "failed", "reason": evil, "message": evil, "status": 1, "ended": BEGAN + 9}
    made = attempt(named, 1, end, job=evil[:-1], nodes=[evil], started=BEGAN, ranks=1, checkpoint=0)
    made.logs.mkdir()
    made.log("rank-0").write_text(f"Traceback (most recent call last):\nValueError: {evil[:-1]}\n")
    put(made.error("rank-0"), {"who": evil, "status": 1, "message": evil, "time": 1})
    put(
        named.data_manifest,
        {"train": split(tokens=5), "packing_reason": evil, "sources": [{"what": evil, "path": evil}]},
    )
    put(named.export / "export.json", {"step": evil, "checks": [{"what": evil, "against": evil}]})
    put(named.cluster, {"name": evil, "partition": evil, "time": evil})
    metrics(named, [step(1)])
    found = page(named)
    assert not {"script", "img"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert found.whole.count("<script>alert(1)</script>") >= 10
    assert found.text["h1"] == [named.root.name]
    assert "{{ 77777 * 77773 }}" in found.whole
    assert str(77777 * 77773) not in found.whole


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("401 for hf_AbCdEfGhIjKlMnOpQr", "hf_AbCdEfGhIjKlMnOpQr"),
        ("GET https://ada:enigma99@hub.example/x failed", "enigma99"),
        ("https://hub.example/x?token=q7w8e9r0", "q7w8e9r0"),
        ("WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567", "0123456789abcdef"),
        ("{'password': 'tr0ub4dor&3'}", "tr0ub4dor"),
        ("Authorization: Bearer AAAABBBBCCCCDDDD", "AAAABBBBCCCCDDDD"),
        ("the value <of> my variable: open&sesame!", "sesame"),
    ],
)
def test_secrets_are_left_out(run: RunDir, text: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET_THING", "open&sesame!")
    spec = fakes.spec(run.root.absolute()).model_dump(mode="json", by_alias=True)
    spec["origin"]["overrides"] = [f"cluster.setup={text}"]
    put(run.spec, spec)
    attempt(run, 1, {"verdict": "failed", "reason": "train", "message": text, "status": 1})
    put(run.cluster, {"name": "big", "secrets_file": "/home/ada/private.env", "setup": text})
    shown = report.render(run, None, BEGAN)
    assert secret not in shown
    assert "private.env" not in shown
    assert shown.count("(hidden)") >= 2


def test_settings_whose_names_sound_secret_are_shown(run: RunDir) -> None:
    run.spec.write_text(fakes.spec(run.root.absolute(), tokens=4_194_304).to_json())
    assert "tokens: 4194304" in page(run).whole
    assert "(hidden)" not in page(run).whole


def test_a_run_that_has_not_begun_has_no_holes(run: RunDir) -> None:
    found = page(run)
    assert found.text["h2"] == ["Run", "Configuration"]
    assert found.text["span"] == ["new"]
    assert "svg" not in found.tags
    assert not re.search(r"\b(None|nan|inf|Undefined)\b", found.whole.replace("chat_template: null", ""))


def test_a_run_that_failed_before_its_first_step(run: RunDir) -> None:
    message = "data.path: '/d/chats.jsonl' does not exist; give the path of a file"
    made = attempt(run, 1, {"verdict": "failed", "reason": "prepare", "step": None, "message": message, "status": 2})
    put(made.error("prepare"), {"who": "prepare", "status": 2, "message": message, "time": BEGAN})
    os.utime(made.placement, (BEGAN, BEGAN))
    os.utime(made.exit, (BEGAN + 6, BEGAN + 6))
    found = page(run)
    assert found.text["h2"] == [
        "Failed before its first step: a setting or the environment is wrong", "Run", "Time", "Configuration"
    ]  # fmt: skip
    assert found.after("shown by") == [f"errors/prepare.json: {message.partition(';')[0]}"]
    assert found.after("where", 4) == ["1", f"failed: prepare ({message})", "none", "6 s"]
    assert found.after("preparing, loading", 2) == ["100.0%", "6 s"]


def test_a_prepare_job_that_failed(run: RunDir) -> None:
    made = attempt(run, 0, {"verdict": "failed", "reason": "prepare", "message": "no row is left", "again": False})
    put(made.error("prepare"), {"who": "prepare", "status": 2, "message": "data: no row is left", "time": BEGAN})
    found = page(run)
    assert found.text["h2"] == ["Failed in prepare: a setting or the environment is wrong", "Run", "Configuration"]
    assert "errors/prepare.json: data: no row is left" in found.words


def test_where_the_time_of_two_jobs_went(slurm: RunDir) -> None:
    first, second = history.attempt_histories(slurm, report_rows.read_curves(slurm.metrics), False, True, BEGAN)
    assert first.account() == {"counted": 8, "lost": 2, "evaluate": 3, "save": 1.5, "start": 10, "other": 15.5}
    assert second.account() == {"counted": 10, "lost": 0, "evaluate": 3, "save": 1.5, "start": 10, "other": 5.5}
    whole = history.account([first, second])
    assert whole is not None
    assert whole.spent["between"] == 10
    assert sum(whole.spent.values()) == whole.wall == 80
    assert whole.goodput == 18 / 80
    assert whole.held_goodput == 18 / 70
    assert whole.hours == pytest.approx(70 * 2 / 3600)
    found = page(slurm)
    assert found.after("goodput", 2) == ["22%", "of 1 min 20 s"]
    assert (
        "22.5% of the wall time went into steps that count, 25.7% of the time in which ranks were held." in found.words
    )
    assert found.after("between attempts", 2) == ["12.5%", "10 s"]
    rows = found.after("where", 12)
    assert rows[:4] == [
        "1",
        "failed: it was killed from outside (rank 1 was ended by signal 9)",
        "1 to 5, 1 lost",
        "40 s",
    ]
    assert rows[6:10] == ["2", "done", "5 to 9", "30 s"]
    assert [rows[5], rows[11]] == ["2 CPU ranks, ZeRO-0; n1, n2; job 7", "2 CPU ranks, ZeRO-0; n1, n3; job 8"]
    assert "attempt 2 goes on after step 4" in found.text["title"]
    assert "steps lost, done again: 2 s" in " ".join(found.text["title"])


def test_what_tensorboard_lost_comes_from_the_metrics(slurm: RunDir) -> None:
    for path in slurm.tensorboard.iterdir():
        path.write_bytes(path.read_bytes()[:130])  # a kill leaves what was flushed, the last record torn
    first, second = history.attempt_histories(slurm, report_rows.read_curves(slurm.metrics), False, True, BEGAN)
    assert [first.steps, second.steps] == [[1, 2, 3, 4], [5, 6, 7, 8, 9]]
    for path in slurm.tensorboard.iterdir():
        path.unlink()
    found = page(slurm)
    assert found.after("goodput") == ["22%"]
    assert "evaluation" not in found.words


def on_one_box(run: RunDir) -> None:
    metrics(run, [step(number, 10.0) for number in (1, 2, 3)])
    events(run, *((30.0 + 10 * number, number, "step_s", 10.0) for number in (1, 2, 3)))
    made = attempt(run, 1, {"verdict": "failed", "reason": "train", "message": "", "status": 1})
    os.utime(made.placement, (BEGAN + 5, BEGAN + 5))
    os.utime(made.exit, (BEGAN + 75, BEGAN + 75))


def test_on_one_box_the_times_are_those_of_the_files(run: RunDir) -> None:
    on_one_box(run)
    (only,) = history.attempt_histories(run, report_rows.read_curves(run.metrics), False, False, BEGAN)
    assert (only.started, only.ended) == (BEGAN + 5, BEGAN + 75)
    assert only.account() == {"counted": 0, "lost": 30, "evaluate": 0, "save": 0, "start": 25, "other": 15}


def test_a_copy_without_its_times_is_dated_by_its_events(run: RunDir) -> None:
    on_one_box(run)
    for path in (run.attempt(1).placement, run.attempt(1).exit):
        os.utime(path, (BEGAN + 9e6, BEGAN + 9e6))
    (only,) = history.attempt_histories(run, report_rows.read_curves(run.metrics), False, False, BEGAN)
    assert (only.started, only.ended) == (BEGAN + 30, BEGAN + 60)


def test_a_live_run_says_what_is_left(run: RunDir) -> None:
    metrics(run, [step(1), step(2)])
    events(run, (12.0, 1, "step_s", 2.0))
    made = attempt(run, 1)
    os.utime(made.placement, (BEGAN, BEGAN))
    with run.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = page(run, now=BEGAN + 20)
    assert found.text["span"][0] == "live"
    assert "step 2 of 9, 7 s left" in found.words
    assert found.after("where", 4) == ["1", "running", "1 to 2", "20 s"]
    assert found.after("goodput", 2) == ["20%", "of 20 s"]


def test_where_slurm_is_silent_a_final_verdict_stands(slurm: RunDir) -> None:
    silent = queue.Queue(problem="squeue: no answer")
    assert page(slurm, silent).text["span"][0] == "unknown"
    put(slurm.attempt(2).exit, {"verdict": "done", "reason": "finished", "again": False, "ended": BEGAN + 80})
    assert page(slurm, silent).text["span"][0] == "done"


def test_a_hundred_thousand_steps(run: RunDir) -> None:
    row = json.dumps(step(0, 0.5, loss=2.0)).replace('"step": 0,', '"step": %d,').replace('"loss": 2.0', '"loss": 2.%d')
    lines = [row % (number, number % 7) for number in range(1, 100_001)]
    lines[61_233] = json.dumps(step(61_234, 0.5, loss=9.5, grad_norm=4000.0))
    run.metrics.write_text("\n".join(lines))
    attempt(run, 1, {"verdict": "done"}, started=BEGAN, ranks=1, checkpoint=0)
    seconds = []
    for _ in range(3):  # the quickest: other work on the machine makes each slower, and none quicker
        started = time.process_time()
        text = report.render(run, None, BEGAN)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 3
    assert len(text) < 1_500_000
    found = Page(text)
    lines = [path for look, path in found.paths if look in ("main", "faint", "held")]
    assert max(path.count(" ") for path in lines) <= 400
    loss = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", lines[0])]
    assert min(loss) == 62.5  # on a scale from 2 to 10
    assert sorted(loss)[1] > 500
    assert "median 0.5, at most 4,000 (logarithmic scale)" in found.whole
    assert "steps 61,001 to 62,000: 2 to 9.5" in found.text["title"]


def test_torn_and_strange_rows_are_left_out(run: RunDir) -> None:
    good = json.dumps(step(3, loss=1.5))
    lines = [
        '{"step": 1, "lo',
        "[1]",
        "7",
        '{"step": "2"}',
        '{"step": 1e400}',
        '{"loss": 3}',
        '{"step": -4, "loss": 1}',
    ]
    lines += ['{"step": 1, "loss": NaN, "lr": Infinity}', f'{{"step": 2, "loss": 1{"0" * 400}}}', good, good[:40]]
    run.metrics.write_text("\n".join(lines))
    found = page(run)
    assert found.after("loss", 2) == ["1.5000", "at step 3"]
    assert found.text["h3"] == CHARTS


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.integers(4, 60))
def test_thinning_keeps_every_extreme(values: list[float], most: int) -> None:
    points = list(enumerate(values))
    kept = charts.thin(points, most)  # type: ignore[arg-type]
    assert len(kept) <= max(most, 4)
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    found = [value for _, value in kept]
    assert (min(found), max(found)) == (min(values), max(values))
    assert (kept[0], kept[-1]) == (points[0], points[-1])


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_are_round_and_hold_every_value(low: float, span: float) -> None:
    scale = charts.linear(low, low + span)
    slack = scale.step * 1e-6
    assert scale.low <= low + slack
    assert scale.high >= low + span - slack
    assert 2 <= len(scale.ticks) <= 7
    assert f"{scale.step:e}"[0] in "125"


@pytest.mark.parametrize(
    ("value", "step", "label"),
    [
        (0.0, 5e-5, "0"),
        (1.5e-4, 5e-5, "1.5e-4"),
        (0.25, 0.05, "0.25"),
        (12000, 2000, "12k"),
        (5, 1, "5"),
        (2e6, 5e5, "2M"),
    ],
)
def test_labels_of_ticks(value: float, step: float, label: str) -> None:
    assert charts.short(value, step) == label


def test_the_verb_writes_the_page_and_prints_where(slurm: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    path = slurm.root / "report.html"
    path.write_text("an older one")
    assert cli.main(["report", "x"]) == 0
    assert capsys.readouterr().out == "runs/x/report.html\n"
    assert Page(path.read_text()).text["h1"] == ["x"]
    path.unlink()
    path.mkdir()
    assert cli.main(["report", str(slurm.root)]) == 2
    assert capsys.readouterr().err.startswith("galley: runs/x/report.html: cannot be written (Is a directory)")
    assert cli.main(["report", "y"]) == 2


def test_help_says_what_the_page_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--help"]) == 0
    assert capsys.readouterr().out.startswith(
        "galley report RUN [key=value …]\n\nWrite one page about a run, RUN/report.html"
    )


def test_nothing_heavy_is_loaded(slurm: RunDir) -> None:
    code = "import sys; from galley_launch.cli import main; assert main(sys.argv[1:]) == 0; print(*sys.modules)"
    command = [sys.executable, "-c", code, "report", "x"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": fakes.PYTHONPATH}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "jinja2" in done.stdout.split()
    assert not {"torch", "numpy", "matplotlib", "tensorboard", "rich"} & set(done.stdout.split())
