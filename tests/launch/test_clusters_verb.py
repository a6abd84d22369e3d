"""``galley clusters``: the table of profiles beside what Slurm has here, and one profile in full."""

from pathlib import Path

import pytest
import yaml
from launch.submitting import here, profile
from slurm.conftest import fakes as fakes
from slurm.fakes.scenario import Scenario

from galley_launch import cli
from galley_launch.base import assets
from galley_launch.base.table import width
from galley_launch.cluster.profile import Cluster
from galley_launch.job.slurm_sinfo import partitions_from_sinfo
from galley_launch.submit import clusters

__all__ = ["fakes", "here"]

SINFO = (
    "gpu*|up|1-00:00:00|3|idle|96|1031000|gpu:h100:8|h100\n"
    "gpu*|up|1-00:00:00|1|down*|96|1031000|gpu:h100:8|h100\n"
    "long|up|7-00:00:00|2|mixed|64|512000|gpu:a100:4|a100\n"
    "cpu|up|infinite|9|idle|32|64000|(null)|(null)\n"
    "old|drain|infinite|9|idle|128|2064000|gpu:8|(null)\n"
)
OURS = "about: 日本の e\u0301t\u00e9 🙂\ndefault: true\npartition: gpu,long\ncores_per_rank: 16\ntime: 2-0\n"


def screen(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    capsys.readouterr()
    assert cli.main(["clusters", *words]) == 0
    out, err = capsys.readouterr()
    return [*out.splitlines(), *(f"! {line}" for line in err.splitlines())]


def columns(lines: list[str]) -> list[list[str]]:
    """Cells of a table; each begins where its title does, however wide the letters before it are."""
    titles = lines[0]
    starts = [at for at in range(len(titles)) if titles[at] != " " and (at == 0 or titles[at - 2 : at] == "  ")]
    found = []
    for line in lines:
        cells, rest, at = [], line, 0
        for begin, end in zip(starts, [*starts[1:], 10**6], strict=True):
            taken = ""
            while rest and at + width(taken) < end:
                taken, rest = taken + rest[0], rest[1:]
            at += width(taken)
            assert not taken.strip() or taken[0] != " ", f"{line!r} does not line up at {begin}"
            cells.append(taken.strip())
        found.append(cells)
    return found


def test_the_table(here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.set(partitions=SINFO)
    profile("ours", OURS)
    profile("venv", "about: taken over\npartition: gpus\n", here / "config" / "galley" / "clusters")
    profile("broken", "partiton: x\n")
    lines = screen(capsys)
    between = lines.index("")
    assert columns(lines[:between]) == [
        ["cluster", "about", "where", "against sinfo"],
        ["apptainer", "Apptainer image, whole nodes of 8 GPUs", "shipped", "fits"],
        ["broken", "", "clusters/broken.yaml", "no such key: 'partiton'; did you mean 'partition'?"],
        ["cpu", "no GPUs, two ranks a node", "shipped", "fits"],
        [
            *("ours (default)", "日本の e\u0301t\u00e9 🙂", "clusters/ours.yaml"),
            "128 cores a node, but gpu has 96; time 2-0, but gpu allows 1440 minutes",
        ],
        ["pyxis", "Pyxis image, whole nodes of 8 GPUs", "shipped", "112 cores a node, but gpu has 96"],
        [
            *("venv", "taken over", f"{here}/config/galley/clusters/venv.yaml"),
            "no partition 'gpus' (there are gpu, long, cpu, old)",
        ],
    ]
    assert columns(lines[between + 1 :]) == [
        ["partition", "state", "has"],
        ["gpu*", "up", "4 nodes of 96 cores, 1006 GB, 8 h100 GPUs"],
        ["long", "up", "2 nodes of 64 cores, 500 GB, 4 a100 GPUs"],
        ["cpu", "up", "9 nodes of 32 cores, 62 GB, no GPUs"],
        ["old", "drain", "9 nodes of 128 cores, 2015 GB, 8 GPUs"],
    ]


def test_the_table_without_slurm(here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.remove("sinfo")
    lines = screen(capsys)
    assert [cells[0] for cells in columns(lines[:5])] == ["cluster", "apptainer", "cpu", "pyxis", "venv"]
    assert {cells[3] for cells in columns(lines[:5])} == {"against sinfo", ""}
    assert lines[5:] == ["", "Slurm does not answer here, so nothing was checked (sinfo: no such command here)"]


def test_a_profile_in_full(here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.set(partitions=SINFO)
    lines = screen(capsys, "pyxis", "cluster.partition=gpu", "cluster.side.partition=login")
    assert lines[-2:] == [
        "! galley: note: 112 cores a node, but gpu has 96",
        "! galley: note: side: no partition 'login' (there are gpu, long, cpu, old)",
    ]
    body = yaml.safe_load("\n".join(lines[:-2]))
    assert list(body) == list(Cluster.model_fields)
    assert (body["partition"], body["side"]["partition"], body["container"]["runtime"]) == ("gpu", "login", "pyxis")
    shipped = assets.folder("slurm") / "clusters" / "pyxis.yaml"
    assert f"# file: {shipped}" in lines
    assert lines[0] == shipped.read_text().splitlines()[0]  # the header, which says how to use it
    profile("copied", "\n".join(lines[:-2]))
    again = screen(capsys, "copied")
    named = [number for number, line in enumerate(again) if line.startswith(("# file:", "# your own copy"))]
    assert [again[number] for number in named] == [
        f"# file: {here}/clusters/copied.yaml",
        "# your own copy of it: galley copy cluster copied NEW",
    ]
    assert [line for number, line in enumerate(again) if number not in named] == [
        line for number, line in enumerate(lines) if number not in named
    ]
    fakes.remove("sinfo")
    assert screen(capsys, "venv")[-1] == "! galley: note: not checked: sinfo: no such command here"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vnev"], "cluster: no cluster 'vnev'; did you mean 'venv'? (see galley clusters)"),
        (["venv", "cluster.tiem=1"], "command line: cluster: no such key: 'tiem'; did you mean 'time'?"),
        (["venv", "lr=1"], "clusters: takes no key 'lr'; see galley clusters --help"),
        (["cluster.time=1-0"], "clusters: cluster.time=1-0 changes no profile; write: galley clusters NAME key=value"),
    ],
)
def test_mistakes(words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clusters", *words]) == 2
    assert capsys.readouterr() == ("", f"galley: {message}\n")


@pytest.mark.parametrize(
    ("profile", "problems"),
    [
        ({}, []),
        ({"partition": "long", "ranks_per_node": 4}, []),
        ({"partition": "long"}, ["8 GPUs a node, but long has 4"]),
        ({"partition": "gpu,long"}, []),
        ({"partition": "gpu,lang"}, ["no partition 'lang' (there are gpu, long, cpu, old)"]),
        ({"partition": "old"}, ["old is drain"]),
        ({"partition": "old", "gpu_type": "h100"}, ["old is drain"]),  # The site names no type.
        ({"gpu_type": "a100"}, ["GPUs of type a100, but gpu has h100"]),
        ({"cores_per_rank": 13}, ["104 cores a node, but gpu has 96"]),
        ({"memory_per_rank": "200G"}, ["1600 GB a node, but gpu has 1006"]),
        ({"time": "1-0:01"}, ["time 1-0:01, but gpu allows 1440 minutes"]),
        ({"device": "cpu", "partition": "cpu", "ranks_per_node": 4}, []),
        ({"device": "cpu", "partition": "cpu", "ranks_per_node": 5}, ["40 cores a node, but cpu has 32"]),
        ({"side": {"partition": "cpu"}}, []),
        ({"side": {"partition": "cpu", "gpus": 1}}, ["side: 1 GPUs a node, but cpu has 0"]),
        ({"side": {"partition": "cpu", "cores": 64}}, ["side: 64 cores a node, but cpu has 32"]),
        ({"side": {"partition": "cpu", "memory": "64G"}}, ["side: 64 GB a node, but cpu has 62"]),
        ({"side": {"time": "2-0"}}, ["side: time 2-0, but gpu allows 1440 minutes"]),
    ],
)
def test_what_the_site_does_not_have(profile: dict[str, object], problems: list[str]) -> None:
    assert clusters.check(Cluster.model_validate(profile), partitions_from_sinfo(SINFO)) == problems


def test_a_site_without_a_default_partition() -> None:
    found = clusters.check(Cluster(), partitions_from_sinfo(SINFO.replace("*", "")))
    assert found == ["no default partition: set partition (there are gpu, long, cpu, old)"]
