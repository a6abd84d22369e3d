"""slurm.py against fake commands: sites and moments that a live cluster cannot be brought into."""

import os
import time
from pathlib import Path

import pytest
from slurm.fakes.scenario import Scenario

from galley_launch.job import slurm


def words(fakes: Scenario, program: str) -> list[str]:
    """Arguments of the last call of a program."""
    return list(fakes.calls(program)[-1]["argv"])


def option(fakes: Scenario, program: str, name: str) -> str:
    arguments = words(fakes, program)
    return arguments[arguments.index(name) + 1]


LEAKS = {
    **{"SLURM_JOB_ID": "1", "SLURM_CLUSTERS": "x", "SLURM_TIME_FORMAT": "relative", "SBATCH_PARTITION": "x"},
    **{"SRUN_CPUS_PER_TASK": "1", "SQUEUE_FORMAT": "%i", "SINFO_FORMAT": "%P", "SACCT_FORMAT": "x", "PMI_RANK": "0"},
    **{"MASTER_ADDR": "n1", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "GROUP_RANK": "0"},
    **{"HF_TOKEN": "t", "WANDB_API_KEY": "k", "aws_secret": "s", "DB_PASSWORD": "p", "GOOGLE_CREDENTIALS": "c"},
}


@pytest.fixture
def leaky(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**LEAKS, "SLURM_CONF": "/etc/slurm/slurm.conf", "TZ": "Asia/Tokyo", "LC_ALL": "C"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EDITOR", "vi")


@pytest.mark.usefixtures("leaky")
def test_no_job_or_launcher_or_secret_reaches_a_command(fakes: Scenario) -> None:
    slurm.jobs(["1", "2"])
    slurm.partitions()
    slurm.cancel(["1"])
    assert {call["program"] for call in fakes.calls()} == {"squeue", "sacct", "sinfo", "scancel"}
    for call in fakes.calls():
        assert not set(LEAKS) & set(call["env"]), call["program"]
        assert (call["env"]["SLURM_CONF"], call["env"]["TZ"]) == ("/etc/slurm/slurm.conf", "UTC")
        assert call["env"]["EDITOR"] == "vi"


def test_no_command_reads_what_the_caller_is_fed(fakes: Scenario, tmp_path: Path) -> None:
    """A loop in a shell script feeds its body; a command that reads that too ends the loop."""
    read, write = os.pipe()
    os.write(write, b"for somebody else")
    os.close(write)
    kept = os.dup(0)
    os.dup2(read, 0)
    try:
        slurm.job("1")
        slurm.submit(tmp_path / "a.sh")
    finally:
        os.dup2(kept, 0)
    assert [call["stdin"] for call in fakes.calls()] == ["", "", ""]
    assert os.read(read, 100) == b"for somebody else"


@pytest.mark.usefixtures("leaky")
def test_a_job_gets_who_and_where_the_user_is_and_nothing_else(fakes: Scenario, tmp_path: Path) -> None:
    assert slurm.submit(tmp_path / "a.sh", ["-N2"], ["--x", "y z"]) == "100"
    (call,) = fakes.calls("sbatch")
    assert call["argv"] == ["--parsable", "-N2", str(tmp_path / "a.sh"), "--x", "y z"]
    allowed = {"HOME", "USER", "LOGNAME", "SHELL", "LANG", "PATH", "TERM", "SLURM_CONF", "TZ"}
    assert {name for name in call["env"] if name not in allowed and not name.startswith(("LC_", "XDG_"))} == set()
    assert call["env"]["TZ"] == "Asia/Tokyo"
    assert {"PATH", "SLURM_CONF", "LC_ALL"} <= set(call["env"])


def test_a_test_starts_nothing_and_says_when(fakes: Scenario, tmp_path: Path) -> None:
    assert slurm.test_only(tmp_path / "a.sh", ["-p", "x"]) == 1795430539.0
    assert words(fakes, "sbatch") == ["--test-only", "-p", "x", str(tmp_path / "a.sh")]
    assert fakes.calls("sbatch")[0]["env"]["TZ"] == "UTC"
    assert slurm.job("100") is None


def test_a_federated_site_prints_its_clusters_name(fakes: Scenario, tmp_path: Path) -> None:
    fakes.set(cluster=";alpha", notice="*** 3 announcements | see the wiki ***\n2026\n")
    assert slurm.submit(tmp_path / "a.sh") == "100"


REFUSALS = [
    "Invalid partition name specified",
    "Requested node configuration is not available",
    "Invalid account or account/partition combination specified",
    "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_slurms_own_reason_in_one_line(fakes: Scenario, tmp_path: Path, refusal: str) -> None:
    fakes.set(refuses=refusal, notice="*** maintenance on Tuesday ***\n2026\n")
    with pytest.raises(slurm.SlurmError) as caught:
        slurm.submit(tmp_path / "a.sh")
    assert str(caught.value) == f"sbatch: Batch job submission failed: {refusal}"
    with pytest.raises(slurm.SlurmError) as caught:
        slurm.test_only(tmp_path / "a.sh")
    assert str(caught.value) == f"sbatch: allocation failure: {refusal}"


BANNER = "".join(
    f"* {number:2} Welcome to the cluster; report errors to the help desk, read the wiki *\n" for number in range(20)
)
REFUSED = "Jobs cannot be submitted from this host; use a login node."


def wrapper(fakes: Scenario, body: str) -> None:
    """A site's own script in sbatch's place."""
    (fakes.bin / "sbatch").write_text(f"#!/bin/bash\n{body}\n")


@pytest.mark.parametrize(
    ("printed", "job"),
    [
        ("Submitted batch job 101", "101"),
        ("Welcome to the cluster\nSubmitted batch job 101", "101"),
        ("Submitted batch job 101 on cluster c2", "101"),
        ("Submitted batch job 101\n2026 is the year of the new cluster\n2026", "101"),
        (f"{BANNER}Submitted batch job 101", "101"),
        ("101", "101"),
        ("101;c2", "101"),
        ("\x1b[32mSubmitted batch job 101\x1b[0m", "101"),
        ("sbatch: Submitted batch job 101 (partition gpu, 3 SU)", "101"),
    ],
)
def test_a_wrapper_that_drops_parsable(fakes: Scenario, tmp_path: Path, printed: str, job: str) -> None:
    wrapper(fakes, f"cat <<'END'\n{printed}\nEND")
    assert slurm.submit(tmp_path / "a.sh") == job


@pytest.mark.parametrize("stream", ["1", "2"])
@pytest.mark.parametrize("banner", [("", ""), (BANNER, ""), ("", BANNER), (BANNER, BANNER)])
@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (REFUSED, REFUSED),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", "Invalid qos specification"),
        (
            "sbatch: error: You must name a project\nsbatch: error: Batch job submission failed: Unspecified error",
            "You must",
        ),
        ("Your project has no hours left", "Your project has no hours left"),
    ],
)
def test_a_refusal_behind_a_banner(
    fakes: Scenario, tmp_path: Path, stream: str, banner: tuple[str, str], refusal: str, said: str
) -> None:
    wrapper(fakes, f"cat >&{stream} <<'END'\n{banner[0]}{refusal}\n{banner[1]}END\nexit 1")
    for call in (slurm.submit, slurm.test_only):
        with pytest.raises(slurm.SlurmError) as caught:
            call(tmp_path / "a.sh")
        assert said in str(caught.value)
        assert len(str(caught.value)) < 520


def test_a_wrapper_that_refuses_with_status_0(fakes: Scenario, tmp_path: Path) -> None:
    wrapper(fakes, f"echo '{REFUSED}'")
    with pytest.raises(slurm.SlurmError, match="use a login node"):
        slurm.submit(tmp_path / "a.sh")


def test_many_jobs_are_one_call_and_one_more_for_the_forgotten(fakes: Scenario) -> None:
    fakes.set(accounting="up")
    for number in range(1, 41):
        fakes.job(str(number), State="COMPLETED" if number > 30 else "RUNNING", Name=f"run {number}")
    fakes.set(forgotten=[str(number) for number in range(31, 41)])
    ids = [str(number) for number in range(45, 0, -1)]
    found = slurm.jobs([*ids, "7"])
    assert list(found) == [each for each in ids if int(each) <= 40]
    assert (found["7"].state, found["35"].state, found["35"].name) == ("RUNNING", "COMPLETED", "run 35")
    assert [call["program"] for call in fakes.calls()] == ["squeue", "sacct"]
    assert option(fakes, "sacct", "-j").split(",") == [each for each in ids if int(each) > 30]


def test_no_jobs_are_no_calls(fakes: Scenario) -> None:
    assert slurm.jobs([]) == {}
    assert slurm.node_states([]) == {}
    slurm.cancel([])
    assert fakes.calls() == []


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        *(("PENDING", "JobHeldAdmin"), ("PENDING", "JobHeldUser"), ("PENDING", "AssocGrpGRES")),
        *(("PENDING", "ReqNodeNotAvail, UnavailableNodes:node[1-2]"), ("REQUEUE_HOLD", "job requeued in held state")),
    ],
)
def test_a_job_that_waits_for_somebody_says_so(fakes: Scenario, state: str, reason: str) -> None:
    fakes.job("5", State=state, Reason=reason)
    found = slurm.job("5")
    assert found is not None
    assert (found.state, found.reason, found.is_live()) == (state, reason, True)


def test_a_job_is_followed_from_waiting_to_accounting(fakes: Scenario) -> None:
    ended = {
        "State": "FAILED",
        "exit_code": "7:0",
        "StartTime": "2026-11-23T10:00:00",
        "EndTime": "2026-11-23T10:05:00",
    }
    fakes.job("5", {"State": "CONFIGURING"}, {"State": "RUNNING"}, {"State": "COMPLETING"}, ended)
    seen = [slurm.job("5") for _ in range(5)]
    assert [each and each.state for each in seen] == ["PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "FAILED"]
    assert [each and each.exit_status for each in seen] == [None, None, None, None, 7]

    fakes.set(forgotten=["5"], accounting="up", lag=1)
    assert slurm.job("5") is None  # accounting has not heard of it yet
    late = slurm.job("5")
    assert late is not None
    assert (late.state, late.exit_status, late.end) == ("FAILED", 7, 1795428300.0)


def test_a_site_without_accounting_forgets_jobs(fakes: Scenario) -> None:
    fakes.job("5", State="COMPLETED")
    fakes.set(forgotten=["5"])
    assert slurm.job("5") is None
    fakes.remove("sacct")
    assert slurm.job("5") is None


def test_accounting_that_is_out_of_reach_is_no_absent_job(fakes: Scenario) -> None:
    fakes.set(accounting="down")
    with pytest.raises(slurm.SlurmError, match=r"^sacct: Problem talking to the database: Connection refused$"):
        slurm.job("5")


def test_a_controller_that_is_down_is_no_absent_job(fakes: Scenario, tmp_path: Path) -> None:
    fakes.job("5", State="RUNNING")
    fakes.set(controller="down", accounting="up")
    calls = {
        "squeue": lambda: slurm.job("5"),
        "sinfo": slurm.partitions,
        "sbatch": lambda: slurm.submit(tmp_path / "a.sh"),
        "scancel": lambda: slurm.cancel(["5"]),
    }
    for program, call in calls.items():
        with pytest.raises(slurm.SlurmError, match=f"^{program}: .*Unable to contact slurm controller"):
            call()
    with pytest.raises(slurm.SlurmError, match=r"^scontrol: no answer from Slurm's controller$"):
        slurm.update("5", TimeLimit="60")


def test_a_controller_that_hangs_is_given_up(fakes: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_ASK_S", 0.4)
    fakes.set(delay=30)
    begin = time.monotonic()
    with pytest.raises(slurm.SlurmError, match=r"^squeue: no answer from Slurm within 0.4 s$"):
        slurm.job("5")
    assert time.monotonic() - begin < 10


def test_a_machine_without_slurm(fakes: Scenario, tmp_path: Path) -> None:
    fakes.remove("sbatch", "squeue", "sinfo")
    assert slurm.version() is None
    with pytest.raises(slurm.SlurmError, match=r"^sbatch: no such command here$"):
        slurm.submit(tmp_path / "a.sh")
    with pytest.raises(slurm.SlurmError, match=r"^squeue: no such command here$"):
        slurm.job("1")


@pytest.mark.parametrize(
    ("printed", "expected"),
    [("slurm-wlm 22.05.8", (22, 5)), ("slurm 25.05.3", (25, 5)), ("slurm 23.11.10-1.el9", (23, 11)), ("bash 5", None)],
)
def test_versions(fakes: Scenario, printed: str, expected: tuple[int, int] | None) -> None:
    fakes.set(version=printed, notice="Welcome to cluster 9.9\n")
    assert slurm.version() == expected


def test_cancelling_what_is_over_is_no_error_and_anothers_job_is(fakes: Scenario) -> None:
    fakes.job("5", State="RUNNING")
    fakes.job("6", State="RUNNING")
    slurm.cancel(["5", "99"])
    cancelled = slurm.job("5")
    assert cancelled is not None
    assert (cancelled.state, cancelled.exit_signal) == ("CANCELLED", 15)
    fakes.set(foreign=["6"])
    with pytest.raises(slurm.SlurmError, match=r"^scancel: Kill job error on job id 6: Access/permission denied$"):
        slurm.cancel(["5", "6"])


def test_signals_go_to_the_batch_script_or_to_the_steps(fakes: Scenario) -> None:
    fakes.job("5", State="RUNNING")
    slurm.signal("5", "USR1", batch=True)
    assert words(fakes, "scancel") == ["--signal=USR1", "--batch", "5"]
    slurm.signal("5", "TERM", batch=False)
    assert words(fakes, "scancel") == ["--signal=TERM", "5"]
    slurm.signal("99", "USR1", batch=True)


def test_updates(fakes: Scenario) -> None:
    fakes.job("5", State="PENDING")
    slurm.update("5", TimeLimit="60", ExcNodeList="node[1-2]")
    assert words(fakes, "scontrol") == ["update", "JobId=5", "TimeLimit=60", "ExcNodeList=node[1-2]"]
    with pytest.raises(slurm.SlurmError, match=r"^scontrol: Invalid job id specified for job 9$"):
        slurm.update("9", TimeLimit="60")


def test_partitions_and_nodes_of_a_newer_slurm(fakes: Scenario) -> None:
    recorded = Path(__file__).with_name("recorded")
    fakes.set(
        partitions=(recorded / "25.05-sinfo.txt").read_text(),
        nodes=(recorded / "25.05-nodes.txt").read_text(),
        notice="*** 2 | announcements ***\n",
    )
    assert [each.name for each in slurm.partitions() if each.gpus >= 8] == ["gpu", "mig"]
    assert slurm.node_states(["node2", "node3"])["node2"] == "DOWN*"
    assert option(fakes, "sinfo", "-n") == "node2,node3"


def test_time_left(fakes: Scenario) -> None:
    running = {"State": "RUNNING", "EndTime": "2026-11-23T10:40:00"}
    fakes.job("5", {"EndTime": "NONE"}, {**running, "State": "PENDING"}, **running)
    seen = [slurm.jobs(["5", "6"])["5"] for _ in range(3)]
    now = 1795430400.0 - 60
    assert [slurm.now_left(each, now) for each in seen] == [60.0, None, None]
    assert slurm.now_left(seen[0], now + 100) == 0.0
