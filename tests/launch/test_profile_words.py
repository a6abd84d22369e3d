"""Profiles as people write them: what can mean one thing only is understood, the rest is told in plain words."""

from pathlib import Path

import pytest

from galley.contract.errors import UserError
from galley_launch import cli
from galley_launch.base.options import read
from galley_launch.cluster import profiles

BASE = "about: x\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def load(text: str, *words: str) -> object:
    Path("x.yaml").write_text(BASE + text)
    return profiles.load(Path("x.yaml"), read(words).options.cluster_overrides)


@pytest.mark.parametrize(
    ("image", "runtime"),
    [
        ("/shared/x.sif", "apptainer"),
        ("docker://nvcr.io/nvidia/pytorch:25.01-py3", "apptainer"),
        ("oras://registry/x", "apptainer"),
        ("/shared/x.sqsh", "pyxis"),
        ("nvcr.io#nvidia/pytorch:25.01-py3", "pyxis"),
    ],
)
def test_a_containers_image_says_its_runtime(image: str, runtime: str) -> None:
    for cluster in (load(f"container: '{image}'\n"), load("", f"cluster.container={image}")):
        assert (cluster.container.runtime, cluster.container.image) == (runtime, image)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("modules: cuda", ["cuda"]),
        ("modules: cuda/12.8 gcc/13", ["cuda/12.8", "gcc/13"]),
        ("modules: cuda/12.8, gcc/13", ["cuda/12.8", "gcc/13"]),
        ("modules: [cuda]", ["cuda"]),
        ("modules: []", []),
    ],
)
def test_one_module_is_a_list_of_one(text: str, modules: list[str]) -> None:
    assert load(text + "\n").modules == modules  # type: ignore[attr-defined]


def test_other_lists_of_one() -> None:
    cluster = load(
        "directives: --mail-type=END\nsecrets: HF_TOKEN\ncontainer: {runtime: pyxis, image: x, mounts: /data}\n"
    )
    assert cluster.directives == ["--mail-type=END"]  # type: ignore[attr-defined]
    assert cluster.secrets == ["HF_TOKEN"]  # type: ignore[attr-defined]
    assert cluster.container.mounts == ["/data"]  # type: ignore[attr-defined]
    assert load("", "cluster.modules=cuda").modules == ["cuda"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus_per_node: eight", "gpus_per_node: 'eight' is not a whole number; it means: GPUs of a whole node"),
        ("gpus_per_node: 7.5", "gpus_per_node: '7.5' is not a whole number"),
        ("gpu_hours: lots", "gpu_hours: 'lots' is not a number; it means: GPU-hours"),
        ("default: yep", "default: 'yep' is not true or false"),
        ("side: cpu", "side: 'cpu' is not a section of keys; write side: {partition: cpu}"),
        ("patience: 600", "patience: '600' is not a section of keys; write patience: {step: 1800}"),
        ("variables: NCCL_DEBUG=WARN", "is not a section of keys; write variables: {NCCL_DEBUG: WARN}"),
        ("variables: [A, B]", "variables: ['A', 'B'] is not a section of keys"),
        ("container: [a]", "container: ['a'] is not a section of keys; write container: {runtime: apptainer, image: "),
        ("container: {image: /x.sif}", "container.runtime: is missing; write it (container: {runtime: apptainer"),
        ("modules: {a: b}", "modules: {'a': 'b'} is not a list; write modules: [a, b]"),
        ("partition: [gpu, long]", "partition: ['gpu', 'long'] is more than one value; write one value there"),
        ("time: null", "time: is empty; write a value, or leave time out"),
        ("partiton: gpu", "no such key: 'partiton'; did you mean 'partition'?"),
        ("image: /x.sif", "no such key: 'image'; it belongs under container: container: {image: …}"),
        ("side: {qoss: x}", "no such key: 'side.qoss'"),
        ("cpus-per-task: 8", "no such key: 'cpus-per-task'; here it is called cores_per_rank"),
        ("walltime: 4:00:00", "no such key: 'walltime'; here it is called time"),
        ("mem: 64G", "no such key: 'mem'; set cluster.memory_per_rank=64G"),
        ("mail-type: END", "no such key: 'mail-type'; further sbatch options: cluster.directives=[--mail-type=END]"),
    ],
)
def test_what_is_wrong_is_told_in_plain_words(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(text + "\n")
    told = str(error.value)
    assert told.startswith("x.yaml: ")
    assert message in told
    assert not any(word in told for word in ("instance of", "valid ", "unable to parse", "Input"))


# One's own profile


def test_a_copy_is_ones_own_and_wins(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["copy", "cluster", "venv"]) == 0
    target = here / "config" / "galley" / "clusters" / "venv.yaml"
    assert capsys.readouterr().out == (
        f"{target} is yours to change; it is used instead of the shipped one\n"
        "next: galley clusters venv; galley plan RECIPE cluster=venv\n"
    )
    assert profiles.every()["venv"] == target
    assert cli.main(["copy", "cluster", "venv"]) == 2
    assert "already exists; give another name: galley copy cluster venv NAME" in capsys.readouterr().err
    assert cli.main(["copy", "cluster", "pyxis", "hpc"]) == 0
    assert profiles.find("hpc", [])[1].container is not None
    assert cli.main(["plan", "smollm2-135m-lora", "cluster=hpc", "batch.samples=64"]) in (0, 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["copy", "cluster"], "copy: NAME is missing; write: galley copy cluster NAME [TO]"),
        (["copy", "cluster", "vnev"], "cluster: no cluster 'vnev'; did you mean 'venv'?"),
        (["copy", "cluster", "venv", "../x"], "copy: '../x' is not a cluster's name"),
        (["copy", "cluster", "venv", "a", "b"], "copy: 'b' is an unexpected word"),
        (["copy", "smollm2-135m-lora", "a", "b"], "copy: 'b' is an unexpected word; write: galley copy RECIPE [TO]"),
    ],
)
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_copy_that_cannot_be_written_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "config").write_text("a file")
    assert cli.main(["copy", "cluster", "venv"]) == 2
    assert "cannot be written" in capsys.readouterr().err
