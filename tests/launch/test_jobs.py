"""Job scripts: every rendered file byte for byte, and what makes a script good, whatever the recipe and the profile."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch.submitting import HUB, here, option, options, profile, submission
from launch.test_golden import GOLDEN, ROOT, check

from galley.contract import stages
from galley.contract.errors import UserError
from galley_launch.base import assets

__all__ = ["here"]

JOBS = GOLDEN / "jobs"
RECIPES = sorted(path.stem for path in assets.folder("recipes").glob("*.yaml"))
SUITS = {"apptainer": "qwen3-4b-qlora", "cpu": "demo", "pyxis": "llama3.1-8b-full", "venv": "qwen3-32b-qlora"}
PLACES = {"part": ["nodes=1", "ranks=2"], "whole": ["nodes=2", "micro_batch=1", "cluster.whole_nodes=true"]}
CASES = [(name, place) for name in sorted(SUITS) for place in sorted(PLACES)]
# What shellcheck says of a script by itself, and cannot know.
WRONG = {
    "SC1090": "begin writes the file that is sourced",
    "SC1091": "secrets, set-up and module files are on the cluster",
    "SC2317": "functions are called through trap and await",
}


def rendered(name: str, place: str) -> tuple[dict[str, str], str]:
    """Files and ``sbatch`` commands of a case."""
    _, todo = submission(SUITS[name], f"cluster={name}", *PLACES[place])
    return todo.files, "".join(f"# {stage.name}\n{stage.shell()}\n" for stage in todo.stages)


def plain(text: str, here: Path) -> str:
    """``text`` without what differs from one machine and version to the next."""
    for value, name in ((sys.executable, "PYTHON"), (str(here), "HERE"), (str(ROOT), "ROOT")):
        text = text.replace(value, name)
    text = re.sub(r"(galley-[\w.-]+)-[0-9a-f]{6}\b", r"\1-HASH", text)
    text = re.sub(r"/operators/[0-9a-f]{12}\b", "/operators/HASH", text)
    return re.sub(r"^# Galley \S+:", "# Galley VERSION:", text, flags=re.MULTILINE)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_a_profile_renders_to_what_it_did(name: str, place: str, here: Path) -> None:
    files, commands = rendered(name, place)
    assert set(files) == {*(f"jobs/{stage}.sbatch" for stage in stages.names()), "cluster.json", "run.json"}
    folder = JOBS / f"{name}@{place}"
    for path in sorted(set(files) - {"run.json"}):
        check(folder / Path(path).name, plain(files[path], here))
    check(folder / "sbatch.sh", plain(commands, here))


def test_no_golden_script_is_left_over() -> None:
    files = {"cluster.json", "sbatch.sh", *(f"{stage}.sbatch" for stage in stages.names())}
    assert {path.relative_to(JOBS) for path in JOBS.rglob("*") if path.is_file()} == {
        Path(f"{name}@{place}") / file for name, place in CASES for file in files
    }
    assert set(SUITS) == {path.stem for path in (assets.folder("slurm") / "clusters").glob("*.yaml")}


FULL = """
modules: [gcc/13, "cuda/12.8"]
conda: train
setup: /shared/setup.sh
scratch: /local/scratch
interface: ib0
gpu_type: h100
gpu_request: gres
constraint: "h100&ib"
directives: ["--mail-type=END", "--comment=two words # no comment", --contiguous]
variables: {NCCL_DEBUG: INFO, http_proxy: "http://proxy:3128"}
side: {partition: cpu, gpus: 1}
"""


@pytest.fixture
def scripts(here: Path) -> dict[str, str]:
    """Every golden script, and those of a profile that uses every key; by name."""
    profile("full", FULL)
    found = {f"{name}@{place}/{path}": text for name, place in CASES for path, text in rendered(name, place)[0].items()}
    _, todo = submission("llama3.1-8b-full", "cluster=full", "nodes=2", "cluster.partition=gpu")
    found |= {f"full/{path}": text for path, text in todo.files.items()}
    return {name: text for name, text in found.items() if name.endswith(".sbatch")}


def test_scripts_are_bash_that_shellcheck_likes(scripts: dict[str, str], tmp_path: Path) -> None:
    paths = [str(assets.folder("slurm") / "node.sh")]
    for number, text in enumerate(scripts.values()):
        paths.append(str(tmp_path / f"{number}.sh"))
        Path(paths[-1]).write_text(text)
        subprocess.run(["bash", "-n", paths[-1]], check=True)
    subprocess.run(["bash", "-n", paths[0]], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    command = ["shellcheck", "--norc", "--shell=bash", f"--exclude={','.join(WRONG)}", *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


def test_what_no_script_does(scripts: dict[str, str]) -> None:
    for name, text in scripts.items():
        assert "--export=" not in text, name  # it loses to the environment, and shows what it holds
        assert not re.search(r"SLURM_(PROCID|NODEID|LOCALID)|localhost|127\.0\.0\.1", text), name
        assert not re.search(r"^set -[a-z]*[ex]|\bset -x", text, re.MULTILINE), name
        assert "\t" not in text, name
        assert text.endswith("\n"), name
        assert not re.search(r"\n\n\n| \n", text), name
    node = (assets.folder("slurm") / "node.sh").read_text()
    assert not re.search(r"localhost|127\.0\.0\.1", node)


def test_what_every_script_asks_for(scripts: dict[str, str]) -> None:
    for name, text in scripts.items():
        stage = Path(name).stem
        assert all(len(words) == 1 for words in options(text)), name
        asked = [words[0].partition("=")[0] for words in options(text)]
        assert len(set(asked)) == len(asked), name
        assert option(text, "open-mode") == ["append"], name
        assert len(option(text, "signal")) == (stage == "train"), name
        assert option(text, "ntasks-per-node") == ["1"], name
        assert (option(text, "mem") == ["0"]) == (option(text, "exclusive") == [""]), name
        assert len(option(text, "requeue")) + len(option(text, "no-requeue")) == 1, name
        assert option(text, "dependency") == ([] if stage == "export" else ["singleton"]), name
        assert len(option(text, "time")) == len(option(text, "job-name")) == 1, name


def test_every_srun_repeats_the_cores_and_appends(scripts: dict[str, str]) -> None:
    for name, text in scripts.items():
        calls = re.findall(r"^ *srun (?:.*\\\n)*.*$", text, re.MULTILINE)
        assert len(calls) == 1, name
        words = shlex.split(calls[0])
        assert f"--cpus-per-task={option(text, 'cpus-per-task')[0]}" in words, name
        assert "--cpu-bind=none" in words, name
        assert "--open-mode=append" in words, name
        assert words[-3:] == ["bash", "$run/code/node.sh", "$2"], name
        has_gpus = option(text, "gres") + option(text, "gpus-per-node") != []
        assert ("--gpu-bind=none" in words) == has_gpus, name
        assert not any(word.startswith(("--gpus", "--gres")) for word in words), name


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], ("gpus-per-node", "8")),
        (["ranks=2"], ("gpus-per-node", "2")),
        (["cluster.gpu_type=h100"], ("gpus-per-node", "h100:8")),
        (["cluster.gpu_request=gres"], ("gres", "gpu:8")),
        (["cluster.gpu_request=gres", "cluster.gpu_type=a100_40g", "ranks=4"], ("gres", "gpu:a100_40g:4")),
        (["device=cpu", "ranks=2"], None),
    ],
)
def test_gpus_are_asked_for_once_in_the_sites_way(words: list[str], asked: tuple[str, str] | None, here: Path) -> None:
    _, todo = submission("my.yaml", "cluster=venv", *words)
    text = todo.files["jobs/train.sbatch"]
    found = [
        (name, value) for name in ("gpus-per-node", "gres", "gpus", "gpus-per-task") for value in option(text, name)
    ]
    assert found == ([asked] if asked else [])
    for stage in ("prepare", "export"):
        aside = todo.files[f"jobs/{stage}.sbatch"]
        assert not [words for words in options(aside) if re.match(r"--(gpu|gres|tres)", words[0])]


@pytest.mark.parametrize(
    ("words", "memory", "alone"),
    [
        ([], ["0"], True),
        (["ranks=2"], [], False),
        (["ranks=2", "cluster.memory_per_rank=64G"], [f"{2 * 64 * 1024}M"], False),
        (["cluster.memory_per_rank=64G"], ["0"], True),
        (["cluster.whole_nodes=false"], [], False),
        (["cluster.whole_nodes=false", "cluster.memory_per_rank=1T"], [f"{8 * 1024**2}M"], False),
        (["device=cpu", "ranks=4"], ["0"], True),
        (["device=cpu", "ranks=4", "cluster.whole_nodes=false", "cluster.memory_per_rank=100M"], ["400M"], False),
    ],
)
def test_memory_is_all_of_a_whole_node_or_what_the_ranks_take(
    words: list[str], memory: list[str], alone: bool, here: Path
) -> None:
    _, todo = submission("my.yaml", "cluster=venv", *words)
    text = todo.files["jobs/train.sbatch"]
    assert option(text, "mem") == memory
    assert bool(option(text, "exclusive")) == alone
    for stage in ("prepare", "export"):
        aside = todo.files[f"jobs/{stage}.sbatch"]
        assert (option(aside, "mem"), option(aside, "exclusive"), option(aside, "nodes")) == (["32G"], [], ["1"])


def mounts(text: str) -> list[str]:
    """What is mounted in the containers of a script."""
    found = re.findall(r"--container-mounts=(\S+)|--bind (\S+)", text)
    return (found[0][0] or found[0][1]).split(",")


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_a_container_sees_all_that_the_run_needs(runtime: str, here: Path) -> None:
    (here / "held.jsonl").write_text("{}\n")
    words = ["data.held_out_path=held.jsonl", "cluster.scratch=/local", "cluster.container.mounts=[/opt/x,/a:/b:ro]"]
    _, todo = submission("my.yaml", f"cluster={runtime}", "cluster.container.image=~/x.sif", *words)
    places = [here / "runs/my", here / "cache", here / "home/.cache/huggingface"]
    places += [here / "model", here / "chats.jsonl", here / "held.jsonl"]
    wanted = [*(f"{each}:{each}" for each in places), "/local:/local", "/opt/x:/opt/x", "/a:/b:ro"]
    image = f"{here}/home/x.sif"
    for stage in stages.names():
        text = todo.files[f"jobs/{stage}.sbatch"]
        assert mounts(text) == wanted
        if runtime == "pyxis":
            assert f"--container-image={image} " in text
            names = re.findall(r"--container-env=(\S+)", text)[0].split(",")
            exported = set(re.findall(r"^export (\w+)=", text, re.MULTILINE))
            assert exported | {"GALLEY_ATTEMPT_DIR", "GALLEY_HEAD", "GALLEY_PORT", "HF_TOKEN"} <= set(names)
            assert "apptainer" not in text
        else:
            assert f"apptainer exec --nv --bind {','.join(wanted)} {image} bash " in text
            assert "--container" not in text


def test_a_container_sees_the_hubs_cache_where_it_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/shared/hf")
    _, todo = submission("llama3.1-8b-full", "cluster=pyxis")
    text = todo.files["jobs/train.sbatch"]
    assert "export HF_HOME=/shared/hf\n" in text
    assert "/shared/hf:/shared/hf" in mounts(text)
    _, todo = submission("llama3.1-8b-full", "cluster=pyxis", "cluster.variables.HF_HUB_CACHE=/other")
    assert {"/other:/other", "/shared/hf:/shared/hf"} <= set(mounts(todo.files["jobs/train.sbatch"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=/a,b"], "container: a comma or colon in '/a,b/my': that cannot be mounted; choose another place"),
        (["cluster.cache=/c:d"], "container: a comma or colon in '/c:d'"),
        (["cluster.scratch=/x y"], "container: a space in '/x y:/x y'"),
    ],
)
def test_what_cannot_be_mounted_is_refused(words: list[str], message: str, here: Path) -> None:
    with pytest.raises(UserError) as caught:
        submission("my.yaml", "cluster=pyxis", *words)
    assert str(caught.value).startswith(message)


def test_sbatch_itself_reads_directives_as_these_tests_do(tmp_path: Path) -> None:
    if shutil.which("sbatch") is None:
        pytest.skip("sbatch is not installed")
    lines = [
        *(r"--job-name='a\b'", r"--comment='x\'y'", r"--comment='x#y' # --wckey=no", "--comment=a#b"),
        *(f"--comment={shlex.quote(text)}" for text in ("it's", 'say "x"', "$(touch x)", "a b\tc", "é 🙂", "", "*;&|")),
        *("  --comment=''", "--comment='a'\"b\"c", "--contiguous --hold"),
    ]
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=x\nSlurmctldHost=nowhere.invalid\nMessageTimeout=1\nTCPTimeout=1\n"
    )
    script = "#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in lines) + "true\n#SBATCH --comment=late\n"
    (tmp_path / "job.sh").write_text(script)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    env["SLURM_CONF"] = str(tmp_path / "slurm.conf")
    command = ["sbatch", "-vvvv", "--test-only", str(tmp_path / "job.sh")]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:  # what follows is its search for the controller
            said.append(line)
            if "defined options" in line:
                break
        process.kill()
    found = re.findall(r'Found in script, argument "(.*)"$', "".join(said), re.MULTILINE)
    assert found == [word for words in options(script) for word in words]


def test_values_are_inherited_only_from_the_named_variables(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HUB:
        monkeypatch.setenv(name, f"/value-of-{name}")
    monkeypatch.setenv("SOME_TOKEN", "/value-of-SOME_TOKEN")
    _, todo = submission("my.yaml", "cluster=venv")
    for text in todo.files.values():
        found = set(re.findall(r"/value-of-(\w+)", text))
        assert found <= {"HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "XDG_CACHE_HOME"}
