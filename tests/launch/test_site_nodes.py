"""What sites' nodes are like: modules, scratch, variables, names, memory, private files; faults with their remedy."""

import json
import os
import re
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launch.attempts import allocate, attempted, report, stepped, submitted, training
from launch.preflight_nodes import Start, checks, end, starting
from launch.submitting import here, profile, submission
from slurm.conftest import fakes as fakes
from slurm.fakes.scenario import Scenario

from galley.contract.rundir import Attempt, RunDir
from galley_launch.base import assets
from galley_launch.job import chain, finish, names
from galley_launch.job.diagnose.evidence import collect
from galley_launch.job.node.preflight import bad_nodes
from galley_launch.submit import scripts
from galley_launch.submit import submission as submitting

__all__ = ["fakes", "here"]

NODE = assets.folder("slurm") / "node.sh"


def train(*words: str) -> str:
    return submission("my.yaml", *words)[1].files["jobs/train.sbatch"]


def loaded(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """What the part of a job script before its first decision does, with ``folder`` for ``/etc/profile.d``."""
    head = script.partition("verdict() {")[0].replace("/etc/profile.d", str(folder))
    base = {"PATH": "/usr/bin:/bin", "HOME": str(folder), **env}
    command = ["bash", "-c", f'{head}\necho "MODULEPATH=${{MODULEPATH:-}} EXPORT=${{SLURM_EXPORT_ENV:-}}"']
    return subprocess.run(command, env=base, capture_output=True, text=True, check=False, timeout=30)


@pytest.fixture
def modules(here: Path) -> Path:
    """A folder like ``/etc/profile.d``, whose files need one another in order."""
    folder = here / "profile.d"
    folder.mkdir()
    (folder / "00-site.sh").write_text("SITE=/opt/site\n")
    (folder / "zz-environment.sh").write_text('module() { echo "module $*"; }\nexport MODULEPATH=$SITE/modules\n')
    (folder / "zzz.csh").write_text("exit 1\n")
    profile("x", "modules: [cuda/12.8]\n")
    return folder


def test_modules_come_from_the_sites_own_files_in_order(modules: Path) -> None:
    done = loaded(train("cluster=x"), modules)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "module load cuda/12.8\nMODULEPATH=/opt/site/modules EXPORT=\n"


def test_folders_of_modules_that_the_user_has_come_after_the_sites(
    modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODULEPATH", "/opt/site/modules:/home/me/my modules")
    done = loaded(train("cluster=x"), modules)
    assert "MODULEPATH=/opt/site/modules:/home/me/my modules EXPORT=" in done.stdout
    assert "MODULEPATH" not in train("cluster=venv")  # nothing is loaded


def test_a_node_without_modules_says_what_helps(modules: Path) -> None:
    (modules / "zz-environment.sh").unlink()
    done = loaded(train("cluster=x"), modules)
    assert done.returncode == 78
    assert done.stderr.startswith("galley: modules: no module command on ")
    assert "cluster.setup" in done.stderr


def test_a_sites_export_none_does_not_reach_the_steps(modules: Path) -> None:
    assert "EXPORT=\n" in loaded(train("cluster=x"), modules, SLURM_EXPORT_ENV="NONE", SRUN_EXPORT_ENV="NONE").stdout
    done = subprocess.run(["bash", str(NODE), "train"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=False)
    assert done.returncode == 78
    assert done.stderr.startswith(b"galley: export: the job's variables do not reach its steps on ")


def node(here: Path, pattern: str, **env: str) -> tuple[int, str, str]:
    """Status, the scratch that the preflight is told of, and complaints of node.sh."""
    python = here / "python"
    python.write_text('#!/bin/bash\nprintf %s "$GALLEY_SCRATCH"\n')
    python.chmod(0o755)
    known = {
        "GALLEY_RUN": str(here),
        "GALLEY_PYTHON": str(python),
        "GALLEY_ATTEMPT_DIR": str(here),
        "GALLEY_THREADS": "1",
    }
    full = {"PATH": "/usr/bin:/bin", "SLURMD_NODENAME": "n1", **known, "GALLEY_SCRATCH_PATTERN": pattern, **env}
    done = subprocess.run(["bash", str(NODE), "preflight"], env=full, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{here}/$SLURM_JOB_ID", "{here}/77"),
        ("{here}/${{SLURM_JOB_ID}}-$USER/x", "{here}/77-me/x"),
        ("$LOCAL_DISK/a b", "{here}/disk$USER/a b"),
        ("{here}/$SLURMD_NODENAME", "{here}/n1"),
    ],
)
def test_scratch_with_variables_of_the_job_is_made_on_the_node(pattern: str, expected: str, here: Path) -> None:
    given = {"SLURM_JOB_ID": "77", "USER": "me", "LOCAL_DISK": f"{here}/disk$USER"}
    assert node(here, pattern.format(here=here), **given) == (0, expected.format(here=here), "")


def test_scratch_with_a_variable_that_no_node_has(here: Path) -> None:
    status, _, err = node(here, "/local/$SLURM_JOB_IDD")
    assert (status, err) == (78, "galley: scratch: $SLURM_JOB_IDD is not set on n1; cluster.scratch names it\n")


@pytest.mark.parametrize("inside", [False, True])
def test_variables_of_a_job_are_no_business_of_the_submitter(
    inside: bool, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROJECT", "/shared/p")
    if inside:  # an interactive job's shell
        monkeypatch.setenv("SLURM_JOB_ID", "5")
        monkeypatch.setenv("TMPDIR", "/tmp/5")
    for written, expected in (
        ("/local/$SLURM_JOB_ID", "/local/$SLURM_JOB_ID"),
        ("$TMPDIR/x", "$TMPDIR/x"),
        ("$PROJECT/${SLURM_JOB_ID}", "/shared/p/${SLURM_JOB_ID}"),
        ("/local/$NOT_SET_HERE", "/local/$NOT_SET_HERE"),
    ):
        text = train("cluster=venv", f"cluster.scratch={written}")
        assert f"export GALLEY_SCRATCH_PATTERN={shlex.quote(expected)}\n" in text
    assert "export GALLEY_SCRATCH=/shared/p/x\n" in train("cluster=venv", "cluster.scratch=$PROJECT/x")


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_containers_mount_it_where_the_job_has_it(runtime: str, here: Path) -> None:
    words = [
        "cluster.container.image=/x.sif",
        "cluster.container.mounts=[/l/$SLURM_JOB_ID:/w]",
        "runs=/r/$SLURM_JOB_ID",
    ]
    text = train(f"cluster={runtime}", "cluster.scratch=/local/$SLURM_JOB_ID", *words)
    word = re.findall(r"(?:--bind |--container-mounts=)?(\S*/local/\S+)", text.partition("srun ")[2])[0]
    shown = subprocess.run(
        ["bash", "-c", f"printf %s {word.removeprefix('--container-mounts=')}"],
        env={"SLURM_JOB_ID": "77"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "/local/77:/local/77" in shown
    assert "/l/77:/w" in shown
    assert "/r/$SLURM_JOB_ID/my:/r/$SLURM_JOB_ID/my" in shown  # a folder that is really called so


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return RunDir(tmp_path / "runs" / "x").begin_attempt()


@pytest.fixture
def start(attempt: Attempt, tmp_path: Path) -> Any:
    yield from starting(attempt, tmp_path)


def test_scratch_that_is_mounted_noexec(start: Start, attempt: Attempt, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    under = f'unshare -rm sh -c \'mount -t tmpfs -o noexec,size=2g x {scratch} && exec "$@"\' sh "$@"'
    ((status, output),) = end(start(0, 1, 0, under=under, GALLEY_SCRATCH=str(scratch)))
    assert status == 1
    said = f"disk: {scratch} is mounted noexec, so compiled kernels cannot be loaded from it; set cluster.scratch"
    assert said in output


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["cluster.memory_per_rank=64G"], 8 * 64 * 1024),
        (["cluster.memory_per_rank=2G", "ranks=2"], 2 * 2 * 1024),
        ([], None),
    ],
)
def test_the_memory_that_a_node_must_have_is_asked_for(words: list[str], needed: int | None, here: Path) -> None:
    found = re.findall(r"^export GALLEY_MEMORY_MB=(\d+)$", train("cluster=venv", *words), re.MULTILINE)
    assert found == ([str(needed)] if needed else [])


def test_an_offloaded_optimizer_needs_memory_of_the_host(here: Path) -> None:
    (here / "model" / "config.json").write_text('{"hidden_size": 64}')
    words = ["cluster=venv", "method.kind=full", "deepspeed=zero3_offload_cpu", "nodes=2", "model.path=Qwen/Qwen3-8B"]
    (found,) = re.findall(r"^export GALLEY_MEMORY_MB=(\d+)$", train(*words), re.MULTILINE)
    assert 40_000 < int(found) < 60_000  # 12 bytes of 8.2 B parameters, on two nodes


def test_too_little_memory_is_found(start: Start, attempt: Attempt) -> None:
    free = next(
        int(line.split()[1]) // 1024 for line in Path("/proc/meminfo").read_text().splitlines() if "Avail" in line
    )
    ((status, output),) = end(start(0, 1, 0, GALLEY_MEMORY_MB=2 * free))
    assert (status, f"{2 * free} MiB needed" in output) == (1, True)
    end(start(0, 1, 0, GALLEY_MEMORY_MB=free // 2))
    assert checks(attempt)["memory"]["ok"]


def test_the_heads_name_that_does_not_resolve(start: Start) -> None:
    ((_, output),) = end(start(1, 2, 0, GALLEY_HEAD="no-such-node.invalid", GALLEY_PREFLIGHT_S=3))
    line = next(line for line in output.splitlines() if ": name: " in line)
    assert "no-such-node.invalid, the head's name, does not resolve here" in line
    assert line.endswith("have the site put it into DNS or /etc/hosts of its nodes")


@pytest.mark.parametrize(
    ("name", "nodes", "known"),
    [
        ("n1", ["n1", "n2"], "n1"),
        ("n1.cluster.local", ["n1", "n2"], "n1"),
        ("N1.cluster.local", ["n1", "n2"], "n1"),
        ("n1", ["n1.a", "n2.a"], "n1.a"),
        ("n1", ["n1.a", "n1.b"], ""),
        ("n10", ["n1"], ""),
        ("", ["n1"], ""),
        (".local", ["n1"], ""),
    ],
)
def test_a_node_goes_by_two_names(name: str, nodes: list[str], known: str) -> None:
    assert names.known_as(name, nodes) == known


def test_the_head_is_told_by_a_name_that_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str, *_: object) -> list[object]:
        if name != "n1.cluster.local":
            raise socket.gaierror(-2, "Name or service not known")
        return [name]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "gethostname", lambda: "n1")
    monkeypatch.setattr(socket, "getfqdn", lambda: "n1.cluster.local")
    assert names.reachable("n1") == "n1.cluster.local"
    assert names.reachable("n2") == "n2"  # another node: nobody here knows better


def test_a_node_that_calls_itself_by_its_long_name_is_known(tmp_path: Path, fakes: Scenario) -> None:
    """Its report counts, and what is avoided is the name that Slurm has: sbatch would refuse every job for another."""
    run = submitted(tmp_path / "run")
    attempt = attempted(run, facts={"job": "101", "successor": "900"})
    chain.note(run, "train", "900")
    fakes.job("900")
    report(attempt, "n1")
    report(attempt, "n2", "devices")
    for name in ("n1", "n2"):
        (attempt.preflight / f"{name}.json").rename(attempt.preflight / f"{name}.cluster.local.json")
    assert bad_nodes(attempt, ["n1", "n2"]) == {"n2": "devices: devices is bad"}
    finish.end_training(run, attempt, 1, "preflight")
    assert set(chain.excluded(run)) == {"n2"}


@pytest.mark.parametrize(("host", "avoided"), [("n2.cluster.local", {"n2"}), ("n2", {"n2"}), ("elsewhere", set())])
def test_the_node_to_avoid_has_slurms_name(host: str, avoided: set[str], tmp_path: Path, fakes: Scenario) -> None:
    run = submitted(tmp_path / "run")
    message = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
    error = {"who": "rank-1", "status": 1, "message": message, "host": host}
    attempt = attempted(run, errors=[error], facts={"job": "101"}, rank_0="step 1\n")
    stepped(run, 5)
    assert collect(run, attempt, 1, "").errors[0]["host"] == (host.partition(".")[0])
    finish.end_training(run, attempt, 1, "train")
    assert json.loads(attempt.exit.read_text())["again"] is True
    assert set(chain.excluded(run)) == avoided


@pytest.mark.parametrize(("state", "words"), [("gone", "does not exist"), ("there", "cannot be read")])
def test_a_file_of_secrets_that_nodes_cannot_read(
    state: str, words: str, tmp_path: Path, fakes: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    run = submitted(tmp_path / "run")
    run.cluster.write_text(
        json.dumps(json.loads(run.cluster.read_text()) | {"secrets_file": str(scripts.secrets_file(run))})
    )
    assert submitting.keep_secrets(run, ["HF_TOKEN", "WANDB_API_KEY"]) == ["HF_TOKEN"]
    assert b"hf_of_the_user" not in b"".join(path.read_bytes() for path in run.root.rglob("*") if path.is_file())
    allocate(monkeypatch)
    training(run)
    assert not run.attempt(1).log("job").exists()
    monkeypatch.delenv("HF_TOKEN")
    if state == "gone":
        scripts.secrets_file(run).unlink()
    training(run)
    said = run.attempt(2).log("job").read_text()
    assert said.startswith(
        f"galley: secrets: HF_TOKEN of galley submit did not reach the job: {scripts.secrets_file(run)} {words}"
    )
    assert "XDG_CONFIG_HOME" in said
    submitting.keep_secrets(run, ["HF_TOKEN"])  # not set any more
    training(run)
    assert not run.attempt(3).log("job").exists()


def test_the_clock_reads_only_what_was_appended(tmp_path: Path) -> None:
    run = submitted(tmp_path / "run")
    measures = chain.Measures(run)
    assert measures.longest() == (0.0, 0.0)
    stepped(run, 1000, step_s=2.0)
    assert measures.longest() == (2.0, 0.0)
    before = run.metrics.stat().st_size
    with run.metrics.open("a") as file:
        file.write('{"step": 1001, "step_s": 3.0, "save_s": 9.0}\n{"step": 1002, "st')
    # Whatever stood before may be unreadable now: it is not read again.
    with run.metrics.open("r+b") as file:
        file.write(b"\0" * before)
    assert measures.longest() == (3.0, 9.0)
    with run.metrics.open("a") as file:
        file.write('ep_s": 4.0}\n')
    assert measures.longest() == (4.0, 9.0)
    stepped(run, 3, step_s=1.0)  # rows after a checkpoint were dropped
    assert measures.longest() == (1.0, 0.0)
    os.truncate(run.metrics, 0)
    assert measures.longest() == (0.0, 0.0)
