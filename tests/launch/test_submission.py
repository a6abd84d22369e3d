"""``galley submit`` against stand-ins for Slurm's commands: what is written, what is run, and when nothing is."""

import json
import re
import shlex
from pathlib import Path

import pytest
from launch.submitting import RUN, galley, here, profile, refused, submission, submitted
from slurm.conftest import fakes as fakes
from slurm.fakes.scenario import Scenario

from galley.contract.spec import RunSpec
from galley_launch.base import locks
from galley_launch.job import slurm
from galley_launch.submit import submission as submitting

__all__ = ["fakes", "here"]

WORDS = ["my.yaml", "cluster=venv", "nodes=2"]
SINFO = "gpu*|up|1-00:00:00|3|idle|96|1031000|gpu:h100:8|h100\ncpu|up|infinite|9|idle|32|64000|(null)|(null)\n"


def test_submit_does_what_plan_printed(here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    status, plan, _ = galley(capsys, "plan", *WORDS, "files=all")
    assert (status, fakes.calls(), RUN.root.exists()) == (0, [], False)
    status, out, err = galley(capsys, "submit", *WORDS)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "submitted run my on 2 nodes of 8 GPUs: job 102 (prepare), then 103 (train)"
    written = {path for path in RUN.root.rglob("*") if path.is_file() and path != RUN.submitted}
    blocks = dict(re.findall(r"^# (/\S+)\n(.*?)(?=^# [/a-z])", plan, re.MULTILINE | re.DOTALL))
    code = {RUN.code / name for name in re.findall(r"^#   (\S+)$", plan, re.MULTILINE)}
    assert {path.absolute() for path in written - code} == {Path(name) for name in blocks}
    for name, text in blocks.items():
        assert Path(name).read_text() + "\n" == text, name
    assert written - code == {RUN.root / name for name in ("run.json", "cluster.json", *JOBS)}
    commands = [shlex.split(line) for line in plan.splitlines() if line.startswith("sbatch ")]
    assert [["sbatch", *argv] for argv in submitted(fakes)] == commands
    assert code == {RUN.code / name for name in submitting.code()}
    for name, source in submitting.code().items():
        assert (RUN.code / name).read_bytes() == source.read_bytes()


JOBS = ("jobs/prepare.sbatch", "jobs/train.sbatch", "jobs/export.sbatch")


def test_what_is_tested_is_what_is_submitted(here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    assert galley(capsys, "submit", *WORDS)[0] == 0
    calls = [call["argv"] for call in fakes.calls("sbatch")]
    tests = sorted((argv[1:-1], Path(argv[-1]).name) for argv in calls if argv[0] == "--test-only")
    assert tests == sorted((argv[1:-1], Path(argv[-1]).name) for argv in submitted(fakes))
    assert [argv[:1] for argv in calls[2:]] == [["--parsable"], ["--parsable"]]
    jobs = [json.loads(line) for line in RUN.submitted.read_text().splitlines()]
    assert [(each["job"], each["stage"]) for each in jobs] == [("102", "prepare"), ("103", "train")]


def test_everything_is_there_before_a_job_is(
    here: Path, fakes: Scenario, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm fails without a word where the directory of a job's log is missing."""
    there: list[bool] = []
    real = slurm.submit

    def submit(script: Path, *more: list[str]) -> str:
        needed = [script.parent / "logs", script.parent.parent / "code" / "node.sh", here / "cache"]
        there.append(script.is_file() and all(each.exists() for each in needed))
        return real(script, *more)

    monkeypatch.setattr(slurm, "submit", submit)
    assert galley(capsys, "submit", *WORDS)[0] == 0
    assert there == [True, True]


@pytest.mark.parametrize(
    ("words", "said", "message"),
    [
        (
            ["cluster.partition=gpu,gpus"],
            "Invalid partition name specified",
            "cluster.partition: no partition 'gpus' (sbatch: allocation failure: Invalid partition name specified); "
            "there are gpu, cpu",
        ),
        (
            ["nodes=9"],
            "Requested node configuration is not available",
            "nodes: Slurm refuses the train job (--nodes=9 --gpus-per-node=8 --cpus-per-task=96 --mem=0): sbatch: "
            "allocation failure: Requested node configuration is not available; partition gpu is up and has 3 nodes of "
            "96 cores, 1006 GB, 8 h100 GPUs; ask for what there is (galley clusters)",
        ),
    ],
)
def test_what_slurm_would_refuse_is_one_line(
    words: list[str], said: str, message: str, here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.set(refuses=said, partitions=SINFO)
    words = ["my.yaml", "cluster=venv", "batch.samples=144", *words]
    leave(words, None, prepared=True)  # Only training is left to be submitted.
    assert refused(here, capsys, "submit", *words) == message
    assert submitted(fakes) == []


def test_a_machine_without_slurm(here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.remove("sbatch", "sinfo")
    text = refused(here, capsys, "submit", *WORDS)
    assert text == "slurm: sbatch: no such command here; see that Slurm answers here: sinfo"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "venv: /no/where",
            "cluster.venv: no Python at /no/where/bin/python; make it (python3 -m venv), or name another",
        ),
        ("container: {runtime: apptainer, image: /no/x.sif}", "cluster.container.image: no file /no/x.sif; build it"),
        ("setup: /no/setup.sh", "cluster.setup: no file /no/setup.sh; write it, or leave setup out"),
        ("runs: /proc/runs", "/proc/runs/my: cannot be written to ("),
        ("cache: /proc/cache", "/proc/cache: cannot be made ("),
    ],
)
def test_what_is_not_there_is_found_before_anything_is_queued(
    text: str, message: str, here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    profile("x", text)
    (here / "cache").mkdir()
    (here / "home" / ".cache" / "huggingface").mkdir(parents=True)
    assert refused(here, capsys, "submit", "my.yaml", "cluster=x").startswith(message)
    assert submitted(fakes) == []


def test_a_run_that_is_queued_is_left_alone(here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    assert galley(capsys, "submit", *WORDS)[0] == 0
    jobs = submitted(fakes)
    queued = "runs/my: is in the queue: job 102 (PENDING), 103 (PENDING); galley stop runs/my (or cancel) ends them"
    for words in (["submit", *WORDS], ["run", "my.yaml", "device=cpu"], ["submit", "runs/my"]):
        assert refused(here, capsys, *words).startswith(queued), words
    (RUN.checkpoint(1).root).mkdir(parents=True)
    RUN.checkpoint(1).manifest.write_text('{"files": {}}')
    assert refused(here, capsys, "export", "my").startswith(queued)
    fakes.set(controller="down")
    assert refused(here, capsys, "run", "my.yaml", "device=cpu").startswith("slurm: squeue: ")
    assert submitted(fakes) == jobs
    assert not locks.is_live(RUN)
    fakes.set(controller="up", forgotten=["102", "103"])
    assert galley(capsys, "submit", *WORDS)[0] == 0
    assert len(submitted(fakes)) == len(jobs) + 2


def test_a_run_that_trains_here_is_not_submitted(
    here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    with locks.held(RUN):
        assert "runs/my: in use by a live run (pid " in refused(here, capsys, "submit", *WORDS)
    assert fakes.calls("sbatch") == []


def test_a_job_that_is_refused_takes_the_ones_before_it_along(
    here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.set(refuses="Job violates accounting/QOS policy", accepts=1)
    status, _, err = galley(capsys, "submit", *WORDS)
    line = (
        "cluster.qos: Slurm refuses the train job (no --qos is given): sbatch: Batch job submission failed: Job "
        "violates accounting/QOS policy; write cluster.qos=…: another one, or a shorter cluster.time, or fewer nodes; "
        "nothing is left in the queue"
    )
    assert (status, err) == (2, f"galley: {line}\n")
    assert [call["argv"] for call in fakes.calls("scancel")] == [["--quiet", "102"]]
    fakes.set(accepts=1, foreign=["106"])
    status, _, err = galley(capsys, "submit", *WORDS)
    assert (status, err.rpartition("; ")[2]) == (2, "end what was queued before it: scancel 106\n")


def leave(words: list[str], attempt: dict[str, object] | None, prepared: bool) -> None:
    """The run that ``words`` plan, as an earlier submission left it."""
    _, todo = submission(*words)
    for name, text in todo.files.items():
        (RUN.root / name).parent.mkdir(parents=True, exist_ok=True)
        (RUN.root / name).write_text(text)
    if prepared:
        RUN.data.mkdir()
        RUN.data_manifest.write_text("{}")
    if attempt is not None:
        RUN.attempt(1).root.mkdir(parents=True)
        RUN.attempt(1).exit.write_text(json.dumps(attempt))
        RUN.metrics.write_text('{"step": 2}\n')


@pytest.mark.parametrize(
    ("attempt", "prepared", "more", "stages"),
    [
        (None, False, [], ["prepare", "train"]),
        (None, True, [], ["train"]),
        (None, True, ["data.max_length=99"], ["prepare", "train"]),
        ({"verdict": "stopped", "reason": "user", "again": False}, True, [], ["train"]),
        ({"verdict": "done"}, True, ["duration.steps=64"], ["train"]),
        ({"verdict": "done"}, True, [], ["export"]),
        ({"verdict": "done", "exported": True}, True, [], []),
    ],
)
def test_only_what_is_left_is_submitted(
    attempt: dict[str, object] | None,
    prepared: bool,
    more: list[str],
    stages: list[str],
    here: Path,
    fakes: Scenario,
    capsys: pytest.CaptureFixture[str],
) -> None:
    leave(WORDS, attempt, prepared)
    RUN.end.parent.mkdir(exist_ok=True)
    RUN.end.write_text('{"reason": "stop"}')
    status, out, _ = galley(capsys, "submit", *WORDS, *more)
    assert status == 0
    assert [Path(argv[-1]).stem for argv in submitted(fakes)] == stages
    assert RUN.end.exists() == (not stages)  # The user wants it to go on.
    if stages:
        first = json.loads(RUN.cluster.read_text())["first_attempt"]
        assert first == (2 if attempt and stages != ["export"] else 1)
        assert RunSpec.read(RUN.spec).task.duration.steps == (64 if "duration.steps=64" in more else 60)
    else:
        assert out == "run my is finished: runs/my\n"
