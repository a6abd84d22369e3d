"""slurm.py against a real controller, and the fake commands against the real ones."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slurm.box import PARTITIONS, Box
from slurm.fakes.scenario import Scenario
from slurm.jobs import get, quiet, script, wait_for

from galley_launch.job import slurm as api


@pytest.mark.usefixtures("slurm")
def test_what_the_cluster_is() -> None:
    assert api.version() == (22, 5)
    found = api.partitions()
    assert tuple(each.name for each in found) == PARTITIONS
    assert [each.is_default for each in found] == [True, False, False, False]
    main = found[0]
    assert (main.state, main.limit_s, main.nodes, main.idle) == ("up", None, 3, 3)
    assert (main.cores, main.memory_mb, main.gpus, main.gpu_type, main.features) == (8, 64000, 4, "h100", ("h100",))


def test_a_job_from_submission_to_its_end(slurm: Box, tmp_path: Path) -> None:
    body = 'until [ -e go ]; do sleep 0.1; done; echo "$@"; exit 3'
    options = quiet(tmp_path, "-N2", "-J", "a | b = c JobState=FAILED", "--comment=x = y", "-t", "10", "--no-requeue")
    begun = time.time()
    job_id = api.submit(script(tmp_path, body), [*options, f"--chdir={tmp_path}"], ["one", "two words"])
    slurm.wait(job_id, "RUNNING")
    running = get(job_id)
    assert (running.id, running.name, running.state) == (job_id, "a | b = c JobState=FAILED", "RUNNING")
    assert (running.nodes, running.limit_s, running.restarts) == (("node1", "node2"), 600, 0)
    assert (running.exit_status, running.requeue_allowed, running.is_live()) == (None, False, True)
    assert running.start is not None
    assert -2 < running.start - begun < 30
    assert running.end == running.start + 600
    assert 560 < (api.now_left(running) or 0) <= 601

    (tmp_path / "go").touch()
    slurm.wait(job_id, "FAILED")
    ended = get(job_id)
    assert (ended.exit_status, ended.exit_signal, ended.reason, ended.is_over()) == (3, None, "NonZeroExitCode", True)
    assert (tmp_path / "out").read_text() == "one two words\n"


def test_a_jobs_environment_is_the_users_and_no_other_jobs(
    slurm: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MASTER_ADDR": "x", "HF_TOKEN": "t", "SLURM_NTASKS": "9", "EDITOR": "vi"}.items():
        monkeypatch.setenv(name, value)
    job_id = api.submit(script(tmp_path, "env"), quiet(tmp_path))
    slurm.wait(job_id, "COMPLETED")
    lines = dict(line.partition("=")[::2] for line in (tmp_path / "out").read_text().splitlines())
    assert not {"MASTER_ADDR", "HF_TOKEN", "EDITOR"} & set(lines)
    assert (lines["SLURM_JOB_ID"], lines["HOME"], lines["PATH"]) == (job_id, os.environ["HOME"], os.environ["PATH"])
    assert lines.get("SLURM_NTASKS") != "9"


def test_many_jobs_at_once_and_an_unknown_one(slurm: Box, tmp_path: Path) -> None:
    path = script(tmp_path, "sleep 60")
    running = api.submit(path, quiet(tmp_path))
    waiting = api.submit(path, quiet(tmp_path, f"--dependency=afterok:{running}"))
    held = api.submit(path, quiet(tmp_path, "--hold"))
    slurm.wait(running, "RUNNING")
    found = api.jobs([held, "99999", running, waiting])
    assert list(found) == [held, running, waiting]
    assert [each.state for each in found.values()] == ["PENDING", "RUNNING", "PENDING"]
    assert (found[held].reason, found[waiting].reason) == ("JobHeldUser", "Dependency")
    assert found[waiting].dependency == f"afterok:{running}(unfulfilled)"
    assert api.job("99999") is None
    assert api.jobs(["99998", "99999"]) == {}


def test_cancelling_and_signalling(slurm: Box, tmp_path: Path) -> None:
    body = "trap 'echo usr1 >> seen' USR1\ntrap 'echo term >> seen; exit 5' TERM\necho ready >> seen\n"
    path = script(tmp_path, f"cd {tmp_path}\n{body}while true; do sleep 0.1; done")
    job_id = api.submit(path, quiet(tmp_path))
    waiting = api.submit(path, quiet(tmp_path, "--hold"))
    wait_for(tmp_path / "seen", "ready\n")
    api.signal(job_id, "USR1", batch=True)
    wait_for(tmp_path / "seen", "ready\nusr1\n")
    api.cancel([waiting, job_id, "99999"])
    slurm.wait(job_id, "CANCELLED")
    wait_for(tmp_path / "seen", "ready\nusr1\nterm\n")
    assert [get(each).state for each in (job_id, waiting)] == ["CANCELLED", "CANCELLED"]
    api.cancel([job_id])
    api.signal(job_id, "USR1", batch=True)


def test_a_signal_to_the_steps_leaves_the_batch_script_alone(slurm: Box, tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(
        "import signal, time, pathlib\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (pathlib.Path('seen').write_text('step'), exit(0)))\n"
        "pathlib.Path('ready').touch()\ntime.sleep(60)\n"
    )
    body = f"cd {tmp_path}\ntrap 'echo batch' USR1\nsrun python3 {task} & wait $!; echo $?"
    job_id = api.submit(script(tmp_path, body), quiet(tmp_path))
    wait_for(tmp_path / "ready", "")
    api.signal(job_id, "USR1", batch=False)
    slurm.wait(job_id, "COMPLETED")
    assert ((tmp_path / "seen").read_text(), (tmp_path / "out").read_text()) == ("step", "0\n")


def test_updating(slurm: Box, tmp_path: Path) -> None:
    job_id = api.submit(script(tmp_path, "hostname"), quiet(tmp_path, "--hold", "-t", "10"))
    api.update(job_id, TimeLimit="25", ExcNodeList="node[1-2]")
    assert get(job_id).limit_s == 1500
    slurm.sh("scontrol", "release", job_id)
    slurm.wait(job_id, "COMPLETED")
    assert get(job_id).nodes == ("node3",)
    with pytest.raises(api.SlurmError, match=r"^scontrol: .*already finished"):
        api.update(job_id, TimeLimit="25")
    with pytest.raises(api.SlurmError, match=r"^scontrol: Invalid job id specified for job 99999$"):
        api.update("99999", TimeLimit="25")


UNAVAILABLE = "sbatch: allocation failure: Requested node configuration is not available"


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--gpus-per-node=5", UNAVAILABLE),
        ("--gres=gpu:b200:1", UNAVAILABLE),
        ("--constraint=b200", "sbatch: allocation failure: Invalid feature specification"),
        ("--partition=nope", "sbatch: invalid partition specified: nope; .*Invalid partition name specified"),
        ("--nonsense", "sbatch: unrecognized option '--nonsense'"),
    ],
)
def test_what_slurm_refuses_it_refuses_with_its_own_reason(tmp_path: Path, option: str, reason: str) -> None:
    path = script(tmp_path, "true")
    with pytest.raises(api.SlurmError, match=f"^{reason}$"):
        api.test_only(path, [option])
    with pytest.raises(api.SlurmError, match=r"^sbatch: "):
        api.submit(path, quiet(tmp_path, option))


def test_more_nodes_than_there_are_is_refused_by_a_test_only(slurm: Box, tmp_path: Path) -> None:
    """A site without EnforcePartLimits takes such a job, which then waits for ever."""
    path = script(tmp_path, "true")
    with pytest.raises(api.SlurmError, match=f"^{UNAVAILABLE}$"):
        api.test_only(path, ["-N4"])
    job_id = api.submit(path, quiet(tmp_path, "-N4"))
    end = time.monotonic() + 20
    while get(job_id).reason == "" and time.monotonic() < end:
        time.sleep(0.1)
    assert (get(job_id).state, get(job_id).reason) == ("PENDING", "PartitionConfig")


def test_a_test_says_when_and_leaves_nothing_behind(slurm: Box, tmp_path: Path) -> None:
    path = script(tmp_path, "sleep 60")
    assert abs((api.test_only(path, ["-N3"]) or 0) - time.time()) < 30
    busy = api.submit(path, quiet(tmp_path, "-N3", "--exclusive", "-t", "20"))
    slurm.wait(busy, "RUNNING")
    expected = api.test_only(path, ["-N3", "--exclusive"])
    assert expected is not None
    assert 1000 < expected - time.time() < 1400
    assert slurm.sh("squeue", "-h", "-o", "%i").split() == [busy]


def test_a_drained_node_and_a_partition_that_is_down(slurm: Box, tmp_path: Path) -> None:
    assert api.node_states(["node1", "node3", "node9"]) == {"node1": "IDLE", "node3": "IDLE"}
    slurm.sh("scontrol", "update", "NodeName=node3", "State=DRAIN", "Reason=test")
    slurm.sh("scontrol", "update", "PartitionName=low", "State=DOWN")
    path = script(tmp_path, "sleep 60")
    with pytest.raises(api.SlurmError, match=UNAVAILABLE):
        api.test_only(path, ["-N3"])
    assert api.node_states(["node1", "node3"]) == {"node1": "IDLE", "node3": "DRAINED"}
    assert {each.name: (each.state, each.idle) for each in api.partitions()}["low"] == ("down", 2)
    waiting = api.submit(path, quiet(tmp_path, "-w", "node3"))
    end = time.monotonic() + 20
    while get(waiting).reason in ("", "Priority", "Resources") and time.monotonic() < end:
        time.sleep(0.1)
    assert get(waiting).reason == "ReqNodeNotAvail, UnavailableNodes:node3"


def test_a_dead_node(slurm: Box, tmp_path: Path) -> None:
    path = script(tmp_path, "sleep 300")
    dropped = api.submit(path, quiet(tmp_path, "-w", "node2", "--no-requeue"))
    again = api.submit(path, quiet(tmp_path, "-w", "node2", "--requeue"))
    slurm.wait(dropped, "RUNNING")
    slurm.wait(again, "RUNNING")
    slurm.fail_node("node2")
    slurm.wait(dropped, "NODE_FAIL")
    slurm.wait(again, "PENDING")
    lost, waiting = get(dropped), get(again)
    assert (lost.is_over(), lost.reason, lost.nodes, lost.exit_status) == (True, "NodeDown", ("node2",), None)
    assert (waiting.is_live(), waiting.restarts, waiting.exit_status, waiting.nodes) == (True, 1, None, ())


def test_a_job_that_dies_of_a_signal_and_one_without_an_output_folder(slurm: Box, tmp_path: Path) -> None:
    killed = api.submit(script(tmp_path, "kill -KILL $$"), quiet(tmp_path))
    nowhere = api.submit(tmp_path / "job.sh", ["-o", str(tmp_path / "absent" / "out")])
    slurm.wait(killed, "FAILED")
    slurm.wait(nowhere, "FAILED")
    assert (get(killed).exit_status, get(killed).exit_signal) == (None, 9)
    assert (get(nowhere).exit_status, get(nowhere).reason) == (None, "JobLaunchFailure")


PREFIXES = st.sampled_from(["node", "gpu-a", "r1n", "dgx-07-"])
RANGES = st.tuples(st.integers(0, 120), st.integers(0, 9), st.integers(1, 4))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(PREFIXES, st.lists(RANGES, min_size=1, max_size=3)), min_size=1, max_size=3))
def test_node_lists_are_read_as_slurm_reads_them(
    slurm: Box, parts: list[tuple[str, list[tuple[int, int, int]]]]
) -> None:
    def inside(first: int, more: int, width: int) -> str:
        return f"{first:0{width}}-{first + more:0{width}}" if more else f"{first:0{width}}"

    nodelist = ",".join(f"{prefix}[{','.join(inside(*each) for each in ranges)}]" for prefix, ranges in parts)
    assert api.hostnames(nodelist) == slurm.sh("scontrol", "show", "hostnames", nodelist).split()


@pytest.mark.parametrize("nodelist", ["node[1-3,05-07],login-a", "a[8-11]", "a[098-101]", "r[1-2]n[3-4]", "a[1,1],b"])
def test_odd_node_lists_are_read_as_slurm_reads_them(slurm: Box, nodelist: str) -> None:
    assert api.hostnames(nodelist) == slurm.sh("scontrol", "show", "hostnames", nodelist).split()


def test_the_fakes_say_what_slurm_says(slurm: Box, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path / "fakes")
    scenario.set(refuses="Requested node configuration is not available")
    fake = Box(slurm.state, 3)
    fake.env["PATH"] = f"{scenario.bin}:{fake.env['PATH']}"
    path = str(script(tmp_path, "true"))
    columns = "JobID:|,State:|,Name:|"
    for command in (
        ["squeue", "-h", "-a", "-t", "all", "-j", "99999", "-O", columns],
        ["squeue", "-h", "-a", "-t", "all", "-j", "99998,99999", "-O", columns],
        ["sacct", "-n", "-X", "--parsable2", "-j", "99999", "-o", "JobIDRaw"],
        ["scancel", "--quiet", "99999"],
        ["scancel", "--signal=USR1", "99999"],
        ["scontrol", "update", "JobId=99999", "TimeLimit=5"],
        ["sbatch", "--parsable", "--gres=gpu:b200:1", path],
        ["sbatch", "--test-only", "--gres=gpu:b200:1", path],
    ):
        assert fake.run(*command) == slurm.run(*command), command
