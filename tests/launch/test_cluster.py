"""Profiles of clusters: which one is taken, what it may say, and one clear line for what it may not."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch.submitting import here, option, profile, submission

from galley.contract.errors import UserError
from galley_launch.cluster import profile as cluster
from galley_launch.cluster import profiles
from galley_launch.job.slurm_parse import parse_limit

__all__ = ["here"]


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        submission("my.yaml", *words)
    text = str(caught.value)
    assert "\n" not in text
    return text


def about(*words: str) -> str:
    made, _ = submission("my.yaml", *words)
    assert made.cluster is not None
    return made.cluster.about


def test_the_nearest_profile_of_a_name_wins(here: Path) -> None:
    assert about("cluster=venv") == "plain virtual environment, whole nodes of 8 GPUs"
    config = profile("venv", "about: of this user\n", here / "config" / "galley" / "clusters")
    assert about("cluster=venv") == "of this user"
    profile("venv", "about: of this project\n")
    assert about("cluster=venv") == "of this project"
    other = profile("other", "about: of a file\n", here / "elsewhere")
    assert about(f"cluster={other}") == about("cluster=elsewhere/other.yaml") == "of a file"
    assert profiles.every()["venv"] == Path("clusters/venv.yaml")
    Path("clusters/venv.yaml").unlink()
    assert profiles.every()["venv"] == config


def test_the_default_profile(here: Path) -> None:
    none = "cluster: none is named, and none is the default; write cluster=NAME (see galley clusters)"
    assert refusal().startswith(none)
    profile("ours", "about: mine\ndefault: true\n")
    assert about() == "mine"
    profile("b", "default: true\n")
    assert refusal().startswith("cluster: b and ours both say default: true; write cluster=NAME")
    assert about("cluster=ours") == "mine"
    profile("venv", "default: true\n")  # A shipped name, taken over, is one profile.
    Path("clusters/b.yaml").unlink()
    Path("clusters/ours.yaml").unlink()
    made, _ = submission("my.yaml")
    assert made.cluster_name == "venv"


def test_a_run_goes_on_where_it_was_submitted_to(here: Path) -> None:
    profile("a", "default: true\n")
    _, todo = submission("my.yaml", "cluster=cpu")
    for name in ("run.json", "cluster.json"):
        path = Path("runs/my") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(todo.files[name])
    assert submission("runs/my")[0].cluster_name == "cpu"
    assert submission("runs/my", "cluster=a")[0].cluster_name == "a"
    assert submission("my.yaml")[0].cluster_name == "a"
    other = profile("other", "partition: x\n", here / "elsewhere")
    _, todo = submission("my.yaml", "cluster=elsewhere/other.yaml")
    Path("runs/my/cluster.json").write_text(todo.files["cluster.json"])
    assert submission("runs/my")[0].cluster_name == str(other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partiton: gpu", "no such key: 'partiton'; did you mean 'partition'?"),
        ("side: {gpu: 1}", "no such key: 'side.gpu'; did you mean 'gpus'?"),
        (
            "container: {image: /x, runtime: pyxis, mount: [/a]}",
            "no such key: 'container.mount'; did you mean 'mounts'?",
        ),
        ("patience: {steps: 1}", "no such key: 'patience.steps'; did you mean 'step'?"),
        (
            "gpus_per_node: eight",
            "gpus_per_node: 'eight' is not a whole number; it means: GPUs of a whole node",
        ),
        ("gpus_per_node: 0", "gpus_per_node: '0' should be greater than 0; change it"),
        ("gpu_hours: -1", "gpu_hours: '-1' should be greater than 0; change it"),
        ("requeue: maybe", "requeue: 'maybe' is not true or false; it means: Let Slurm requeue"),
        ("device: tpu", "device: 'tpu' should be 'cuda' or 'cpu'; change it"),
        ("modules: {cuda: 12}", "modules: {'cuda': '12'} is not a list; write modules: [a, b]"),
        ("modules: [[a]]", "modules.0: ['a'] is more than one value; write one value there"),
        ("side: 8", "side: '8' is not a section of keys; write side: {partition: cpu}"),
        ("time: tomorrow", "time: 'tomorrow' is not a time such as 12:00:00, 2-00:00:00 or 90 (minutes); change it"),
        ("time: 0", "time: '0' is not a time"),
        ("time: 12:60:00", "time: '12:60:00' is not a time"),
        ("time: UNLIMITED", "time: 'UNLIMITED' is not a time"),
        ("side: {time: 1h}", "side.time: '1h' is not a time"),
        ("memory_per_rank: 64", "memory_per_rank: '64' is not a size such as 120G; change it"),
        ("memory_per_rank: 64GB", "memory_per_rank: '64GB' is not a size such as 120G; change it"),
        ("memory_per_rank: 0G", "memory_per_rank: '0G' is not a size"),
        ("side: {memory: lots}", "side.memory: 'lots' is not a size such as 120G; change it"),
        ("venv: ./env", "venv: './env' is not an absolute path; change it"),
        ("conda: envs/x", "conda: 'envs/x' is not an absolute path; change it"),
        ("host_python: bin/python", "host_python: 'bin/python' is not an absolute path; change it"),
        ("host_python: python3 -u", "host_python: 'python3 -u' is neither a program's name nor an absolute path"),
        ("container: {runtime: docker, image: x}", "container.runtime: 'docker' should be 'apptainer' or 'pyxis'"),
        (
            "container: {runtime: pyxis}",
            "container.image: is missing; write it (container: {runtime: apptainer, image: /shared/train.sif})",
        ),
        ("container: {runtime: pyxis, image: ./x.sqsh}", "container.image: './x.sqsh' is not an absolute path"),
        ("container: {runtime: pyxis, image: /x, mounts: [data]}", "container.mounts.0: 'data' is not a mount such as"),
        ("venv: /v\nconda: c", "venv and conda both say where Python is; keep one of them"),
        (
            "venv: /v\ncontainer: {runtime: pyxis, image: /x}",
            "venv and container both say where Python is; keep one of them",
        ),
        ("ranks_per_node: 9", "ranks_per_node 9 is more than gpus_per_node 8; one rank a GPU"),
        ("variables: {HF_TOKEN: x}", "variables.HF_TOKEN looks like a secret; list its name under secrets instead"),
        ("variables: {my_api_key: x}", "variables.my_api_key looks like a secret"),
        ("variables: {DB_PASSWORD: x}", "variables.DB_PASSWORD looks like a secret"),
        ("variables: {AWS_SECRET_ACCESS_KEY: x}", "variables.AWS_SECRET_ACCESS_KEY looks like a secret"),
        ("variables: {A-B: x}", "variables.A-B: 'A-B' is not a variable's name; change it"),
        (
            "variables: {GALLEY_RUN: /x}",
            "variables.GALLEY_RUN: 'GALLEY_RUN' is a name that the job's scripts use themselves",
        ),
        (
            "variables: {run: /x}",
            "variables.run: 'run' is a name that the job's scripts use themselves; choose another",
        ),
        ("secrets: [UID]", "secrets.0: 'UID' is a name that the job's scripts use themselves; choose another"),
        ("secrets: ['A B']", "secrets.0: 'A B' is not a variable's name; change it"),
        ("gpu_type: 'h100,a100'", "gpu_type: 'h100,a100' is not a type such as h100; change it"),
        ("account: 'a\\b'", "account: 'a\\\\b' holds a backslash, which sbatch would remove; change it"),
        ('account: "a\\nb"', "account: 'a\\nb' holds a newline or another control character; change it"),
        ("directives: [-p gpu]", "directives.0: '-p gpu' is not an option such as --mail-type=END; change it"),
        ("directives: [--nodes=3]", "directives.0: '--nodes=3' sets nodes, which the job script sets itself"),
        ("directives: [--node=3]", "directives.0: '--node=3' sets nodefile, which the job script sets itself"),
        ("directives: [--partit=x]", "directives.0: '--partit=x' sets partition, which the job script sets itself"),
        ("directives: [--export=ALL]", "directives.0: '--export=ALL' sets export, which the job script sets itself"),
    ],
)
def test_a_profile_that_is_wrong_is_one_line(text: str, message: str, here: Path) -> None:
    profile("x", text)
    assert refusal("cluster=x").startswith(f"clusters/x.yaml: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cluster=vnev"], "cluster: no cluster 'vnev'; did you mean 'venv'? (see galley clusters)"),
        (["cluster=no.yaml"], "cluster: no file no.yaml; give a path to a .yaml file, or a name (see galley clusters)"),
        (["cluster=venv", "cluster.tiem=1:00:00"], "command line: cluster: no such key: 'tiem'; did you mean 'time'?"),
        (["cluster=venv", "cluster.time=soon"], "command line: cluster.time: 'soon' is not a time such as"),
        (["cluster=venv", "cluster.side.memory=1"], "command line: cluster.side.memory: '1' is not a size"),
        (["cluster=venv", "cluster.side.x=1"], "command line: cluster: no such key: 'side.x'; known: "),
        (["cluster=venv", "cluster.a.b.c=1"], "command line: cluster: no such key: 'a.b'; "),
        (["cluster=venv", "cluster.time.x=1"], "cluster.time.x: time has no keys of its own; write cluster.time=VALUE"),
        (
            ["cluster=venv", "cluster.side=1"],
            "command line: cluster.side: '1' is not a section of keys; write side: {partition: cpu}",
        ),
        (["cluster=venv", "cluster.modules=[a"], "cluster.modules: '[a' is not a list; write [a,b] without spaces"),
        (
            ["cluster=venv", "cluster.time=null"],
            "command line: cluster.time: is empty; write a value, or leave time out",
        ),
        (["cluster=venv", "gpus=0,1"], "gpus: Slurm chooses the devices; set how many a node: ranks=8"),
        (["cluster=venv", "ranks=9"], "ranks_per_node 9 is more than gpus_per_node 8; one rank a GPU"),
        (["cluster=venv", "ranks=0"], "command line: cluster.ranks_per_node: '0' should be greater than 0"),
        (["cluster=venv", "device=tpu"], "command line: cluster.device: 'tpu' should be 'cuda' or 'cpu'; change it"),
        (["cluster=venv", "nodes=0"], "nodes: '0' is not a whole number from 1; write nodes=1, nodes=2 …"),
        (["cluster=venv", "force=1"], "force: nothing here can be forced; leave it out"),
        (["cluster=pyxis", "cluster.venv=/v"], "venv and container both say where Python is; keep one of them"),
    ],
)
def test_words_that_are_wrong_are_one_line(words: list[str], message: str, here: Path) -> None:
    text = refusal(*words)
    assert text.startswith(message) or f".yaml: {message}" in text


def test_files_that_are_no_profiles(here: Path) -> None:
    profile("empty", "")
    assert refusal("cluster=empty").startswith("clusters/empty.yaml: holds no settings")
    profile("torn", "partition: [gpu\n")
    assert refusal("cluster=torn").startswith("clusters/torn.yaml:2: not readable as YAML")
    Path("clusters/bytes.yaml").write_bytes(b"about: \xff\n")
    assert refusal("cluster=bytes").startswith("clusters/bytes.yaml: cannot be read")
    profile("twice", "time: 1-0\ntime: 2-0\n")
    assert refusal("cluster=twice").startswith("clusters/twice.yaml:2: not readable as YAML: 'time' is given twice")


def test_words_change_a_profile_for_one_submission(here: Path) -> None:
    words = ["cluster.partition=gpu", "cluster.side.partition=cpu", "cluster.side.gpus=1", "cluster.time=2-0"]
    words += ["cluster.modules=[gcc/13,cuda/12.8]", "cluster.variables.NCCL_DEBUG=INFO", "cluster.whole_nodes=false"]
    words += ["cluster.directives=[--mail-type=END,--comment=x]", "cluster.patience.step=60", "cluster.secrets=[]"]
    made, todo = submission("my.yaml", "cluster=venv", *words)
    found = made.cluster
    assert found is not None
    assert (found.partition, found.side.partition, found.side.gpus, found.side.cores) == ("gpu", "cpu", 1, 8)
    assert (found.modules, found.variables, found.secrets) == (["gcc/13", "cuda/12.8"], {"NCCL_DEBUG": "INFO"}, [])
    assert (found.patience.step, found.patience.save) == (60, 3600)
    train, prepare = todo.files["jobs/train.sbatch"], todo.files["jobs/prepare.sbatch"]
    assert (option(train, "partition"), option(prepare, "partition")) == (["gpu"], ["cpu"])
    assert (option(train, "time"), option(prepare, "time")) == (["2-0"], ["4:00:00"])
    assert (option(prepare, "gpus-per-node"), option(train, "mail-type")) == (["1"], ["END"])
    assert "module load gcc/13 || exit 78\nmodule load cuda/12.8 || exit 78\n" in train
    assert "cluster.side.partition=cpu" in made.spec.origin.overrides


@pytest.mark.parametrize(
    ("words", "device", "ranks", "batch"),
    [
        (["cluster=venv"], "cuda", 8, 16),
        (["cluster=venv", "ranks=4"], "cuda", 4, 16),
        (["cluster=venv", "cluster.ranks_per_node=2"], "cuda", 2, 16),
        (["cluster=venv", "device=cpu"], "cpu", 1, 16),
        (["cluster=venv", "device=cpu", "ranks=16"], "cpu", 16, 16),
        (["cluster=cpu"], "cpu", 2, 16),
        (["cluster=cpu", "ranks=1", "nodes=4"], "cpu", 1, 16),
    ],
)
def test_ranks_and_device(words: list[str], device: str, ranks: int, batch: int, here: Path) -> None:
    place = submission("my.yaml", *words)[0].spec.placement
    assert (place.device, place.ranks_per_node, place.gpus) == (device, ranks, None)
    assert place.micro_batch * place.accumulation * place.nodes * ranks == batch
    assert place.threads == {"venv": 12, "cpu": 4}[words[0].partition("=")[2]]


def test_places_know_the_submitters_home_and_variables(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT", "/shared/p")
    text = "venv: ~/env\nscratch: $PROJECT/scratch\ncache: ${PROJECT}/cache\nsetup: ~/setup.sh\n"
    profile("x", f"{text}host_python: ~/bin/python3\n")
    found = submission("my.yaml", "cluster=x")[0].cluster
    assert found is not None
    home = here / "home"
    assert (found.venv, found.setup, found.host_python) == (f"{home}/env", f"{home}/setup.sh", f"{home}/bin/python3")
    assert (found.scratch, found.cache) == ("/shared/p/scratch", "/shared/p/cache")
    profile("x", "container: {runtime: apptainer, image: ~/x.sif, mounts: ['~/data:/data']}\n")
    found = submission("my.yaml", "cluster=x")[0].cluster
    assert found is not None
    assert found.container is not None
    assert (found.container.image, found.container.mounts) == (f"{home}/x.sif", [f"{home}/data:/data"])


@pytest.mark.parametrize("image", ["docker://org/x:1", "nvcr.io#nvidia/pytorch:25.01-py3", "library://a/b", "name"])
def test_an_image_may_be_a_name(image: str, here: Path) -> None:
    found = submission("my.yaml", "cluster=pyxis", f"cluster.container.image={image}")[0].cluster
    assert found is not None
    assert found.container is not None
    assert found.container.image == image


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "http_proxy", "KEYBOARD", "PASSES", "LD_PRELOAD"]
)
def test_what_is_no_secret(name: str, here: Path) -> None:
    profile("x", f"variables: {{{name}: 'no'}}\n")
    assert f"export {name}=no\n" in submission("my.yaml", "cluster=x")[1].files["jobs/train.sbatch"]


TIMES = {"90": 5400, "1:30:00": 5400, "0:01:30": 90, "1-0": 86400, "2-12": 216000, "1-2:03": 93780, "1-2:03:04": 93784}


@pytest.mark.parametrize(("time", "wanted"), TIMES.items())
def test_times_are_slurms(time: str, wanted: int) -> None:
    assert cluster.seconds(time) == wanted
    assert parse_limit(time) == (wanted if ":" in time or "-" in time else int(time) * 60)


@given(st.integers(0, 99), st.integers(0, 400), st.integers(0, 59), st.integers(0, 59))
def test_any_time(days: int, hours: int, minutes: int, seconds: int) -> None:
    text = f"{days}-{hours}:{minutes:02d}:{seconds:02d}"
    wanted = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert cluster.seconds(text) == parse_limit(text) == wanted


def test_sizes() -> None:
    assert [cluster.megabytes(size) for size in ("900M", "64G", "2T")] == [900, 65536, 2 * 1024**2]
