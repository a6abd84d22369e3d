"""What data, logs, names and recipes hold never acts on a terminal; refusals are one line of at most 500 characters."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galley.contract.metrics import Follower
from galley.contract.rundir import RunDir
from galley.contract.text import LONGEST, Plain, one_line, plain
from galley_launch import cli
from galley_launch.base import devices
from galley_launch.base.terminal import Bar, Tail
from launch import fakes

EVIL = "a\x1b[31mred\x1b[0m\x1b]0;title\x07b\x1b]52;c;cm0gLXJm\x1b\\c\u202egpj.exe\u2066x\x9b2Jd\x08\x7f\u200fz\u2028"
RAW = ("\x1b", "\x07", "\x9b", "\x08", "\x7f", "\u202e", "\u2066", "\u200f", "\u2028", "\r")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, näïve, 日本 🙂", "plain text, näïve, 日本 🙂"),
        ("two\nlines\tand tabs", "two\nlines\tand tabs"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bPq#0\x1b\\sixel", "sixel"),
        ("\x1b]52;c;never ended\nnext", "\nnext"),
        ("over\rwritten", "over?written"),
        ("windows\r\n", "windows\n"),
        ("\u202egpj.exe\u2066", "?gpj.exe?"),
        ("half \ud800 character", "half ? character"),
        ("c1 \x9b2J", "c1 ?2J"),
    ],
)
def test_only_text_is_left(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(st.text(st.characters(exclude_categories=())), st.integers(200, 600))
def test_a_refusal_is_one_line(text: str, limit: int) -> None:
    line = one_line(text * 3, limit)
    assert len(line) <= limit
    assert not any(mark in line for mark in (*RAW, "\n", "\t"))


def test_the_end_of_a_long_refusal_is_kept() -> None:
    line = one_line(f"recipe: {'x' * 10**7} is not a number; write lr=1e-4")
    assert line.startswith("recipe: xxx")
    assert line.endswith("x is not a number; write lr=1e-4")
    assert len(line) <= LONGEST


def test_a_guarded_stream_is_the_stream_otherwise() -> None:
    stream = io.StringIO()
    guard = Plain(stream)
    print(EVIL, file=guard)  # type: ignore[arg-type]
    assert not any(mark in stream.getvalue() for mark in RAW)
    assert not guard.isatty()


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run, a recipe, a profile and a model whose every text is hostile."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "visible", list)
    made = RunDir(tmp_path / "runs" / "evil")
    spec = fakes.spec(made.root)
    attempt = made.attempt(1)
    for folder in (attempt.logs, attempt.root / "errors"):
        folder.mkdir(parents=True)
    origin = spec.origin.model_copy(update={"recipe": EVIL, "overrides": [f"name={EVIL}"]})
    model = spec.task.model.model_copy(update={"path": f"org/{EVIL}"})
    task = spec.task.model_copy(update={"model": model})
    made.spec.write_text(spec.model_copy(update={"origin": origin, "task": task}).to_json())
    end = {"verdict": "failed", "reason": EVIL, "message": f"rank 0: {EVIL}", "status": 1}
    attempt.exit.write_text(json.dumps(end))
    attempt.error("rank-0").write_text(json.dumps({"who": "rank-0", "status": 1, "message": EVIL, "time": 1.0}))
    for name in ("prepare", "rank-0"):
        attempt.log(name).write_text(f"{EVIL}\n10%\r20%\r30%\nRuntimeError: {EVIL}\n")
    made.metrics.write_text(json.dumps({"step": 1, "steps": 9, "loss": EVIL, EVIL: 1}) + "\n")
    (tmp_path / "recipes").mkdir()
    text = json.dumps({"about": EVIL, "model": {"path": "org/m"}, "data": {"path": f"org/d{EVIL}"}})
    body = f"# {EVIL}\n".replace("\u2028", "").replace("\x07", "").replace("\x1b", "").replace("\x08", "")
    (tmp_path / "recipes" / "evil.yaml").write_text(f"{body.replace(chr(127), '')}{text}\n", encoding="utf-8")
    return made


@pytest.mark.parametrize(
    "words",
    ["status", "status evil", "logs evil", "why evil", "report evil", "stop evil", "recipes", "show evil",
     "copy evil x", "plan runs/evil device=cpu", "plan evil device=cpu ranks=1", "plan recipes/evil.yaml", "clusters"],
)  # fmt: skip
def test_no_verb_prints_what_acts_on_a_terminal(evil: RunDir, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(words.split())
    out, err = capsys.readouterr()
    assert out or err
    found = {mark for mark in RAW if mark in out + err}
    assert not found
    refusals = [line for line in err.splitlines() if line.startswith("galley: ")]
    assert all(len(line) <= 500 for line in refusals)


def test_logs_show_what_is_left_of_them(evil: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["logs", "evil"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("aredbc?gpj.exe?x?2Jd")
    assert lines[1] == "30%", "of a progress bar, what it drew last"


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_live_line_shows_a_log_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log").write_text(f"warning: {EVIL}\n{EVIL} so far\n")
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    bar = Bar(Follower(tmp_path / "metrics"), Tail(tmp_path / "log"))
    bar.show()
    bar.close()
    shown = screen.getvalue()
    assert "warning: ared" in shown
    assert not any(mark in shown for mark in ("\x1b]", "\x1b[31mred", *(set(RAW) - {"\x1b", "\r"})))


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run, a recipe, keys and a record with line breaks where others have words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "visible", list)
    made = RunDir(tmp_path / "runs" / "a\nb")
    made.attempt(1).logs.mkdir(parents=True)
    made.spec.write_text(fakes.spec(tmp_path / "x").to_json())
    made.attempt(1).exit.write_text(json.dumps({"verdict": "failed", "message": "one\ngood  done\n\ttwo"}))
    (tmp_path / "recipes").mkdir()
    good = "model: {path: org/m}\ndata: {path: org/d}\nbatch: {samples: 16}\nduration: {steps: 99}\n"
    for name in ("mine", "m\nn"):
        (tmp_path / "recipes" / f"{name}.yaml").write_text(f'about: "x\\ny"\n{good}')
    (tmp_path / "recipes" / "key.yaml").write_text(f'"a\\nb": 1\n{good}')
    (tmp_path / "ds.json").write_text('{"c\\nd": 1, "zero_optimization": {"stage": 2, "a\\nb": 1}}')
    return made


def test_a_table_has_one_line_for_each_thing(broken: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row[:3] for row in rows] == ["run", "a b"]
    assert cli.main(["status", "runs/a\nb"]) == 0
    assert "state      failed: one good done two\n" in capsys.readouterr().out
    assert cli.main(["recipes"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.endswith("  x y") for row in rows if row.startswith(("mine ", "m n "))] == [True, True]


@pytest.mark.parametrize(
    "words",
    [["plan", "key", "device=cpu", "ranks=1"], ["plan", "mine", "device=cpu", "ranks=1", "deepspeed=ds.json"],
     ["plan", "mine", "gpu=0\n1"], ["plan", "mine", "learning_rate=1e-4\n5"], ["sta\ntus"], ["status", "x\ny"],
     ["plan", "mine", "a\nb=1"], ["plan", "mine", "cluster=a\nb"], ["show", "z\nb"], ["copy", "z\nb", "c"]],
)  # fmt: skip
def test_keys_and_words_with_line_breaks(broken: RunDir, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(line.startswith("galley: ") for line in err.splitlines())
    assert len([line for line in err.splitlines() if not line.startswith("galley: note: ")]) == 1


@pytest.mark.parametrize(
    "word", [f"lr={EVIL}", f"{EVIL}=1", EVIL, f"--{EVIL}", "lr=" + "9" * 5000, "x" * 3000, "lr=a\nb"]
)
def test_words_of_the_command_line(evil: RunDir, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "evil", word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("galley: ")
    assert len(line) <= 500
    assert not any(mark in line for mark in RAW)
