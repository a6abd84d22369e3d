"""Failures as they look in real logs: what kind each is, who failed first, and whether trying again can cure it."""

import random
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch.corpus import FILES, FILLER, evidence, read

from galley_launch.job.diagnose import patterns
from galley_launch.job.diagnose.advice import WORDS
from galley_launch.job.diagnose.classify import classify
from galley_launch.job.diagnose.evidence import LONGEST, TAIL, Evidence, clean, tail
from galley_launch.job.diagnose.findings import SHOWN


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torchrun's tables hold local times; those of the corpus were written in UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_failure_of_the_corpus(path: Path, tmp_path: Path) -> None:
    case = read(path)
    failure = classify(evidence(case, tmp_path))
    found = (failure.kind, failure.who, failure.retry, failure.nodes)
    assert found == (case.kind, case.who, case.retry, case.nodes), failure
    assert case.shows in "\n".join(failure.lines)
    assert 0 < len(failure.lines) <= SHOWN
    assert failure.advice.endswith(".")
    assert failure.kind in WORDS
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", "".join(failure.lines))


def test_the_corpus_covers_every_kind_with_several_shapes() -> None:
    kinds = [read(path).kind for path in FILES]
    assert len(kinds) >= 120
    # What could not be verified is known from the run's records (test_unverified.py), not from logs.
    assert {kind for kind in kinds if kinds.count(kind) >= 3} == set(WORDS) - {"unverified"}


TABLES = ("HARDWARE", "CAUSES", "LOST", "MEMORY", "HANGS", "ENDINGS", "FABRIC", "SECONDARY")


@pytest.mark.parametrize("table", TABLES)
def test_every_rule_fits_something_in_the_corpus(table: str) -> None:
    """A pattern that no text needs is a guess."""
    texts = [clean(b"\n".join(read(path).sections.values()).decode(errors="replace")) for path in FILES]
    unused = [rule.pattern.pattern for rule in getattr(patterns, table) if not any(map(rule.pattern.search, texts))]
    assert not unused


def test_the_corpus_holds_no_real_hosts() -> None:
    known = r"(?:docs\.nvidia|www\.nvidia)\.com|(?:pytorch)\.org|[\w.]*\bexample"
    for path in FILES:
        hosts = re.findall(rb"https?://([\w.-]+)", path.read_bytes())
        assert not [host for host in hosts if not re.fullmatch(known, host.decode())], path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_order_of_what_was_found_does_not_matter(path: Path, tmp_path: Path) -> None:
    found = evidence(read(path), tmp_path)
    failure, rng = classify(found), random.Random(path.stem)
    for _ in range(3):
        logs = dict(rng.sample(sorted(found.logs.items()), len(found.logs)))
        beats = rng.sample(found.heartbeats, len(found.heartbeats))
        again = classify(replace(found, logs=logs, heartbeats=beats, preflight=found.preflight[::-1]))
        assert (again.kind, again.who, again.retry, again.nodes) == (
            failure.kind, failure.who, failure.retry, failure.nodes
        )  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_whatever_is_missing_there_is_an_answer(path: Path, tmp_path: Path) -> None:
    found = evidence(read(path), tmp_path)
    parts = [replace(found, logs={k: v for k, v in found.logs.items() if k != name}) for name in found.logs]
    parts += [replace(found, logs={name: text}, errors=[]) for name, text in found.logs.items()]
    parts += [
        replace(found, errors=[]),
        replace(found, state=""),
        replace(found, status=None),
        replace(found, step=None),
    ]
    parts += [replace(found, heartbeats=[], hang=None, preflight=[])]
    parts += [replace(found, logs={k: v[len(v) // 3 : len(v) // 2] for k, v in found.logs.items()})]
    for part in parts:
        failure = classify(part)
        assert failure.kind in WORDS
        assert failure.lines
        assert failure.advice


LINES = [
    line
    for path in FILES
    for line in path.read_bytes().decode(errors="replace").splitlines()
    if line and len(line) < 400
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(LINES)).map("\n".join))
VALUES: st.SearchStrategy[object] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=5,
)


def records(*keys: str) -> st.SearchStrategy[list[dict[str, object]]]:
    return st.lists(st.dictionaries(st.sampled_from(keys), VALUES))


NAMES = st.one_of(
    st.sampled_from(["rank-0", "rank-1", "node-n1", "job", "train", "prepare", "rank-", "rank-x"]), st.text()
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    made=st.builds(
        Evidence,
        status=st.none() | st.integers(),
        state=st.text() | st.sampled_from(["TIMEOUT", "NODE_FAIL", "CANCELLED by 0"]),
        errors=records("who", "status", "message", "time", "host"),
        logs=st.dictionaries(NAMES, TEXTS, max_size=4),
        heartbeats=records("rank", "host", "phase", "step", "time"),
        preflight=records("node", "ok", "checks", "name"),
        hang=st.none() | st.dictionaries(st.sampled_from(["node", "rank", "phase", "step", "silent_s"]), VALUES),
        step=st.none() | st.integers(),
    )
)
def test_nothing_that_a_log_or_a_record_holds_is_an_error(made: Evidence) -> None:
    failure = classify(made)
    assert failure.kind in WORDS
    assert len(failure.lines) <= SHOWN
    "".join((failure.who, failure.advice, *failure.lines, *failure.nodes)).encode()


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_bytes(b"CUDA out of memory\n" + FILLER * 1000 + b"the end")
    assert tail(log).startswith(FILLER.decode())
    assert TAIL - len(FILLER) < len(tail(log)) <= TAIL
    assert tail(log).endswith("\nthe end")
    assert tail(tmp_path / "none.log") == tail(tmp_path) == ""


def test_lines_are_made_fit_to_be_shown() -> None:
    assert clean("\x1b[31mred\x1b[0m\tand\x07 bell \r 10%|#\r 20%|##\x9b2J") == "red    and? bell\n 10%|#\n 20%|##?2J"
    assert clean("x" * 5000) == "x" * LONGEST


def test_a_large_job_is_judged_in_seconds(tmp_path: Path) -> None:
    """64 KiB from each of 256 ranks, every line of which looks like something."""
    text = "\n".join(LINES)[:TAIL]
    logs = {f"rank-{rank}": text for rank in range(256)}
    began = time.process_time()
    classify(Evidence(1, "RUNNING", [], logs, [], [], None, 7))
    assert time.process_time() - began < 60


@pytest.mark.parametrize(
    ("names", "stage"),
    [(["prepare"], "prepare"), (["prepare", "train", "rank-0"], "train"), (["prepare", "train", "export"], "export")],
)
def test_a_stage_that_was_killed_is_the_last_that_began(names: list[str], stage: str) -> None:
    """On one box each stage leaves its log, and the launcher knows the signal."""
    found = classify(Evidence(128 + 9, "", [], dict.fromkeys(names, "step 3/9  loss 0.5\n"), [], [], None, 3))
    assert (found.who, found.retry) == (stage, True)
    assert found.lines == (f"{stage} was ended by signal 9",)
