"""Texts of five years of Slurm, and what they mean."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galley_launch.job.slurm_parse import (
    Job,
    SlurmError,
    hostnames,
    id_from_sbatch,
    jobs_from_sacct,
    jobs_from_squeue,
    parse_exit,
    parse_limit,
    parse_time,
    start_from_test,
)
from galley_launch.job.slurm_sinfo import partitions_from_sinfo, states_from_sinfo

RECORDED = Path(__file__).with_name("recorded")


def text(name: str) -> str:
    return (RECORDED / name).read_text(encoding="utf-8")


def jobs(name: str) -> dict[str, Job]:
    return jobs_from_sacct(text(name)) if "sacct" in name else jobs_from_squeue(text(name))


def at(moment: str) -> float:
    return datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()


# recording: {job: (state, reason, exit status, signal, over)}
STATES = {
    "22.05-squeue.txt": {
        "1": ("FAILED", "NonZeroExitCode", 3, None, True),
        "2": ("COMPLETED", "", 0, None, True),
        "3": ("CANCELLED", "", None, 15, True),
        "4": ("RUNNING", "", None, None, False),
        "5": ("PENDING", "JobHeldUser", None, None, False),
        "6": ("PENDING", "BeginTime", None, None, False),
        "7": ("PENDING", "DependencyNeverSatisfied", None, None, False),
        "8": ("FAILED", "JobLaunchFailure", None, 53, True),
        "9": ("PENDING", "Resources", None, None, False),
        "10": (
            "PENDING",
            "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
            *(None, None, False),
        ),
        "11": ("NODE_FAIL", "NodeDown", None, None, True),
        "12": ("PREEMPTED", "", None, 15, True),
        "13": ("CANCELLED", "", None, 15, True),
        "14": ("PENDING", "ReqNodeNotAvail, UnavailableNodes:node1", None, None, False),
    },
    "22.05-sacct.txt": {
        "1": ("FAILED", "", 3, None, True),
        "2": ("COMPLETED", "", 0, None, True),
        "3": ("CANCELLED", "", None, None, True),
        "4": ("RUNNING", "", None, None, False),
        "5": ("PENDING", "JobHeldUser", None, None, False),
        "6": ("PENDING", "BeginTime", None, None, False),
        "7": ("PENDING", "DependencyNeverSatisfied", None, None, False),
        "8": ("FAILED", "", None, 53, True),
        "11": ("NODE_FAIL", "", None, None, True),
        "12": ("PREEMPTED", "", None, None, True),
    },
    "23.02-squeue.txt": {
        "501": ("TIMEOUT", "TimeLimit", None, 15, True),
        "502": ("OUT_OF_MEMORY", "OutOfMemory", None, 125, True),
    },
    "23.11-squeue.txt": {
        "2101": ("FAILED", "NonZeroExitCode", 1, None, True),
        "2102": ("REQUEUE_HOLD", "job requeued in held state", None, None, False),
        "2103": ("COMPLETING", "", None, None, False),
    },
    "24.05-squeue.txt": {
        "3001": ("PENDING", "AssocGrpGRES", None, None, False),
        "3002": ("PENDING", "QOSMaxJobsPerUserLimit", None, None, False),
        "3003": ("PENDING", "Dependency", None, None, False),
    },
    "24.11-sacct.txt": {
        "4001": ("CANCELLED", "", None, None, True),
        "4002": ("CANCELLED", "Dependency", None, None, True),
        "4003": ("TIMEOUT", "", None, None, True),
        "4004": ("DEADLINE", "", None, None, True),
        "4005": ("BOOT_FAIL", "", None, None, True),
    },
    "25.05-squeue.txt": {
        "6001": ("RUNNING", "", None, None, False),
        "6002": ("PENDING", "JobHeldAdmin", None, None, False),
        "6003": ("SUSPENDED", "", None, None, False),
    },
}


@pytest.mark.parametrize("name", STATES)
def test_states_of_recorded_jobs(name: str) -> None:
    found = {
        job.id: (job.state, job.reason, job.exit_status, job.exit_signal, job.is_over()) for job in jobs(name).values()
    }
    assert found == STATES[name]
    assert all(job.is_live() != job.is_over() for job in jobs(name).values())


def test_every_recording_of_jobs_is_looked_at() -> None:
    assert {path.name for path in RECORDED.glob("*-s[qa]*.txt")} == set(STATES)


def test_a_waiting_job_has_its_expected_start_and_a_running_one_the_end_of_its_limit() -> None:
    found = jobs("22.05-squeue.txt")
    assert (found["9"].start, found["9"].nodes) == (at("2026-11-23T10:27:30"), ())
    assert found["5"].start is None
    assert found["4"].end == at("2026-11-23T10:27:37")
    assert jobs("25.05-squeue.txt")["6001"].end is None


def test_preemption_shows_from_the_choice_to_the_end() -> None:
    found = jobs("22.05-squeue.txt")
    assert {job.id for job in found.values() if job.preempted} == {"4", "12"}
    assert {job.id for job in jobs("22.05-sacct.txt").values() if job.preempted} == {"12"}


def test_limits_restarts_dependencies_and_names() -> None:
    found = {**jobs("22.05-squeue.txt"), **jobs("23.11-squeue.txt"), **jobs("24.05-squeue.txt")}
    assert {job: found[job].limit_s for job in ("1", "2", "3", "2102", "3001")} == {
        **{"1": 1800, "2": 93600, "3": None, "2102": None, "3001": 172800}
    }
    assert (found["6"].restarts, found["2101"].restarts) == (1, 2)
    assert found["3003"].dependency == "afterany:3001(unfulfilled),afterok:2999_*(unfulfilled)"
    assert found["1"].dependency == ""
    assert (found["1"].name, found["13"].name) == ("a | b", "my job = x NodeList=evil")
    assert [found[job].requeue_allowed for job in ("1", "10", "2101")] == [True, False, False]


def test_nodes_of_jobs() -> None:
    assert jobs("23.11-squeue.txt")["2101"].nodes == ("nid001234", "nid001235", "nid001236", "nid001237")
    names = ("rack1-n09", "rack1-n10", "rack1-n11", "rack2-n1", "rack2-n2", "rack2-n7")
    assert jobs("25.05-squeue.txt")["6001"].nodes == names
    assert jobs("24.11-sacct.txt")["4005"].nodes == ("dgx-a01", "dgx-a03")


def test_a_row_that_lacks_columns_is_an_error_and_no_absent_job() -> None:
    with pytest.raises(SlurmError, match="cannot read this line"):
        jobs_from_squeue("7|RUNNING|node1|x\n")


def test_partitions_of_a_small_cluster() -> None:
    main, high, low = partitions_from_sinfo(text("22.05-sinfo.txt"))
    assert (main.name, main.is_default, main.nodes, main.idle, main.limit_s) == ("main", True, 3, 1, None)
    assert main.away == 0
    assert (main.cores, main.memory_mb, main.gpus, main.gpu_type, main.features) == (8, 64000, 4, "h100", ("h100",))
    assert [each.is_default for each in (high, low)] == [False, False]


def test_partitions_of_a_mixed_cluster() -> None:
    found = {each.name: each for each in partitions_from_sinfo(text("25.05-sinfo.txt"))}
    assert list(found) == ["debug", "gpu", "mig", "old", "rtx", "empty"]
    gpu = found["gpu"]
    assert (gpu.nodes, gpu.idle, gpu.limit_s, gpu.is_default) == (39, 7, 172800, True)
    assert {name: each.away for name, each in found.items() if each.away} == {"debug": 2, "gpu": 2}
    assert (gpu.gpus, gpu.gpu_type, gpu.cores, gpu.memory_mb) == (8, "h100", 112, 2050000)
    assert gpu.features == ("h100", "ib", "nvme", "a100")
    assert {name: (each.gpus, each.gpu_type) for name, each in found.items()} == {
        **{"debug": (0, ""), "gpu": (8, "h100"), "mig": (9, "1g.10gb")},
        **{"old": (2, ""), "rtx": (2, "4090"), "empty": (0, "")},
    }
    assert (found["debug"].limit_s, found["debug"].idle, found["mig"].state) == (1800, 0, "down")
    assert (found["rtx"].cores, found["rtx"].memory_mb, found["empty"].nodes) == (20, 128000, 0)


def test_states_of_nodes() -> None:
    assert states_from_sinfo(text("25.05-nodes.txt")) == {
        **{"node1": "IDLE", "node2": "DOWN*", "node3": "DRAINED", "node4": "MIXED-", "node5": "POWERED_DOWN"}
    }


@pytest.mark.parametrize(
    ("printed", "seconds"),
    [
        *(("1-02:03:04", 93784), ("02:03:04", 7384), ("03:04", 184), ("1-02", 93600), ("1-02:03", 93780)),
        *(("90", 5400), ("30:00", 1800), ("100-00:00:00", 8640000), ("UNLIMITED", None), ("infinite", None)),
        *(("Partition_Limit", None), ("NOT_SET", None), ("n/a", None), ("", None)),
    ],
)
def test_limits(printed: str, seconds: int | None) -> None:
    assert parse_limit(printed) == seconds


@pytest.mark.parametrize("printed", ["Unknown", "N/A", "None", "NONE", "", "2026-11-23", "10:00:00"])
def test_no_time(printed: str) -> None:
    assert parse_time(printed) is None


def test_time_is_utc() -> None:
    assert parse_time("1970-01-02T00:00:01") == 86401.0


@pytest.mark.parametrize(
    ("printed", "status", "signal"),
    [
        *(("0:0", 0, None), ("3:0", 3, None), ("0:15", None, 15), ("0:125", None, 125)),
        *(("0", 0, None), ("768", 3, None), ("15", None, 15), ("4021", None, 53), ("", None, None)),
    ],
)
def test_exits(printed: str, status: int | None, signal: int | None) -> None:
    assert parse_exit(printed) == (status, signal)


def test_what_sbatch_prints() -> None:
    assert id_from_sbatch("Welcome to HPC 2026\n  NOTE: 5 jobs\n1234\n") == "1234"
    assert id_from_sbatch("1234;cluster-a\n") == "1234"
    assert id_from_sbatch("Submitted batch job 12\n") == "12"
    assert start_from_test("sbatch: Job 5 to start at 2026-11-23T10:10:06 using 2 processors on nodes n1\n") == at(
        "2026-11-23T10:10:06"
    )
    assert start_from_test("sbatch: Job 5 to start at 2026-11-23T10:10:06 on cluster x a using 2") is not None
    assert start_from_test("sbatch: nothing") is None


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("", []),
        ("login-a", ["login-a"]),
        ("node[1-3,05-07],login-a", ["node1", "node2", "node3", "node05", "node06", "node07", "login-a"]),
        ("a[8-11]", ["a8", "a9", "a10", "a11"]),
        ("a[098-101]", ["a098", "a099", "a100", "a101"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("x[3,5-6]-ib", ["x3-ib", "x5-ib", "x6-ib"]),
        ("a[1,1],b", ["a1", "a1", "b"]),
        (" a[1-2] ", ["a1", "a2"]),
    ],
)
def test_node_lists(nodelist: str, names: list[str]) -> None:
    assert hostnames(nodelist) == names


@pytest.mark.parametrize("nodelist", ["a[1-", "a[2-1]", "a]", "a[", "a[x-y]", "a[]", "a[1-99999999999]", "a[1,,2]"])
def test_node_lists_that_are_none(nodelist: str) -> None:
    with pytest.raises(SlurmError, match="cannot read the node list"):
        hostnames(nodelist)


@given(st.text(alphabet="ab-.,[]0123456789 ", max_size=40))
def test_any_text_is_names_or_an_error(nodelist: str) -> None:
    try:
        names = hostnames(nodelist)
    except SlurmError:
        return
    assert all(name and not set(name) & set("[],") for name in names)


PREFIXES = st.sampled_from(["node", "gpu-a", "r1n", "dgx-07-", "x.y"])
RANGES = st.tuples(st.integers(0, 120), st.integers(0, 12), st.integers(0, 4))


@given(st.lists(st.tuples(PREFIXES, st.lists(RANGES, min_size=1, max_size=4)), max_size=4))
def test_node_lists_are_what_they_were_made_of(parts: list[tuple[str, list[tuple[int, int, int]]]]) -> None:
    names, texts = [], []
    for prefix, ranges in parts:
        inside = []
        for first, more, width in ranges:
            inside.append(f"{first:0{width}}-{first + more:0{width}}" if more else f"{first:0{width}}")
            width = len(inside[-1].split("-")[0])
            names += [f"{prefix}{number:0{width}}" for number in range(first, first + more + 1)]
        texts.append(f"{prefix}[{','.join(inside)}]")
    assert hostnames(",".join(texts)) == names
