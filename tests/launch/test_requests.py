"""What jobs ask of Slurm on sites with habits of their own; and what a shell's variables add."""

import re
import shlex
from pathlib import Path

import pytest
from launch.submitting import galley, here, option, options, profile, refused, submission, submitted
from slurm.conftest import fakes as fakes
from slurm.fakes.scenario import Scenario

from galley.contract.errors import UserError

__all__ = ["fakes", "here"]

STAGES = ("prepare", "train", "export")
WORDS = ["my.yaml", "cluster=venv", "nodes=2"]


def scripts(*words: str) -> dict[str, str]:
    files = submission(*WORDS, *words)[1].files
    return {stage: files[f"jobs/{stage}.sbatch"] for stage in STAGES}


def test_gpus_that_are_no_gres(here: Path) -> None:
    found = scripts("cluster.gpu_request=none", "cluster.side.gpus=1")
    for text in found.values():
        assert not [words for words in options(text) if re.match(r"--(gpu|gres|tres)", words[0])]
        assert "--gpu-bind" not in text
    assert "export GALLEY_GPUS=8\n" in found["train"]  # they are looked for all the same
    assert option(found["train"], "exclusive") == [""]


@pytest.mark.parametrize(
    ("words", "train", "side"),
    [
        (["memory_request=none"], [], []),
        (["memory_request=none", "memory_per_rank=64G"], [], []),
        (["memory_request=mem-per-cpu"], [], ["mem-per-cpu=4096M"]),
        (["memory_request=mem-per-cpu", "memory_per_rank=60G"], ["mem-per-cpu=5120M"], ["mem-per-cpu=4096M"]),
        (
            ["memory_request=mem-per-cpu", "memory_per_rank=10G", "side.cores=3"],
            ["mem-per-cpu=854M"],  # rounded up
            ["mem-per-cpu=10923M"],
        ),
        ([], ["mem=0"], ["mem=32G"]),
    ],
)
def test_memory_in_the_sites_way(words: list[str], train: list[str], side: list[str], here: Path) -> None:
    for stage, text in scripts(*(f"cluster.{word}" for word in words)).items():
        asked = [words[0].removeprefix("--") for words in options(text) if words[0].startswith("--mem")]
        assert asked == (train if stage == "train" else side), stage


def test_a_site_that_demands_a_number_of_tasks(here: Path) -> None:
    found = scripts("cluster.ntasks=true")
    assert [option(found[stage], "ntasks") for stage in STAGES] == [["1"], ["2"], ["1"]]
    assert option(scripts()["train"], "ntasks") == []


GPU = ["constraint=h100", "qos=gpu", "account=a", "reservation=r", "partition=gpu"]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], {"partition": "gpu", "qos": "gpu", "account": "a", "reservation": "r"}),
        (["side.partition=gpu"], {"partition": "gpu", "qos": "gpu", "account": "a", "reservation": "r"}),
        (["side.partition=cpu"], {"partition": "cpu", "account": "a"}),
        (
            ["side.constraint=cpu"],
            {"partition": "gpu", "qos": "gpu", "account": "a", "reservation": "r", "constraint": "cpu"},
        ),
        (
            ["side.partition=cpu", "side.qos=c", "side.account=b", "side.constraint=x", "side.reservation=s"],
            {"partition": "cpu", "qos": "c", "account": "b", "constraint": "x", "reservation": "s"},
        ),
        (["side.account=", "side.qos="], {"partition": "gpu", "reservation": "r"}),
    ],
)
def test_jobs_beside_training_go_where_their_own_keys_say(words: list[str], asked: dict[str, str], here: Path) -> None:
    profile("x", "partition: p\n")
    found = scripts(*(f"cluster.{word}" for word in [*GPU, *words]))
    names = ("partition", "account", "qos", "constraint", "reservation")
    for stage in ("prepare", "export"):
        assert {name: value for name in names for value in option(found[stage], name)} == asked
    train = {name: value for name in names for value in option(found["train"], name)}
    assert train == dict(word.split("=") for word in GPU)


def test_options_of_srun(here: Path) -> None:
    for text in scripts("cluster.srun=[--mpi=none,--overlap]").values():
        words = shlex.split(re.findall(r"^ *srun (?:.*\\\n)*.*$", text, re.MULTILINE)[0])
        assert [word for word in words if word.strip()][-5:-3] == ["--mpi=none", "--overlap"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("srun: [--nodes=3]", "srun.0: '--nodes=3' sets nodes, which the job script sets itself"),
        ("srun: [--export=NONE]", "srun.0: '--export=NONE' sets export"),
        ("srun: [--cpu-bind=cores]", "srun.0: '--cpu-bind=cores' sets cpu-bind"),
        ("srun: [-l]", "srun.0: '-l' is not an option such as --mpi=none; change it"),
        ("clusters: 'a,b'", "clusters: 'a,b' is not the name of one cluster, such as alpha"),
        ("device: rocm", "device: 'rocm' means AMD's GPUs, which are not supported: "),
        ("device: HIP", "device: 'HIP' means AMD's GPUs, which are not supported: "),
        ("gpu_type: mi300x", "gpu_type: 'mi300x' means AMD's GPUs, which are not supported: "),
        ("gpu_type: gfx942", "gpu_type: 'gfx942' means AMD's GPUs, which are not supported: "),
        ("gpu_type: amd-mi250", "gpu_type: 'amd-mi250' means AMD's GPUs"),
        ("memory_request: lots", "memory_request: 'lots' should be 'mem', 'mem-per-cpu' or 'none'"),
        ("gpu_request: tres", "gpu_request: 'tres' should be 'gpus-per-node', 'gres' or 'none'"),
        ("chain: maybe", "chain: 'maybe' should be 'nodes' or 'login'"),
    ],
)
def test_what_a_profile_may_not_ask_for(text: str, said: str, here: Path) -> None:
    profile("x", text)
    with pytest.raises(UserError) as caught:
        submission("my.yaml", "cluster=x")
    assert str(caught.value).startswith(f"clusters/x.yaml: {said}")


@pytest.mark.parametrize("kind", ["1g.10gb", "a100_3g.20gb", "h100-1g.12gb+me", "nvidia_a100_1g.5gb", "2G.20GB"])
def test_a_slice_of_a_gpu_has_one_rank(kind: str, here: Path) -> None:
    with pytest.raises(UserError, match=r"^cluster.gpu_type: .* is a slice of a GPU \(MIG\): .*; write ranks=1"):
        submission(*WORDS, f"cluster.gpu_type={kind}")
    assert kind in submission(*WORDS, f"cluster.gpu_type={kind}", "ranks=1")[1].files["jobs/train.sbatch"]


@pytest.mark.parametrize("kind", ["h100", "a100_40g", "a100-sxm4-80gb", "rtx4090", "gh200", "mi", "l40s"])
def test_a_whole_gpu_has_as_many_ranks_as_there_are(kind: str, here: Path) -> None:
    assert submission(*WORDS, f"cluster.gpu_type={kind}")[0].spec.placement.ranks_per_node == 8


def test_one_cluster_of_a_federation(here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.set(cluster=";alpha")
    assert galley(capsys, "submit", *WORDS, "cluster.clusters=alpha")[0] == 0
    assert all("--clusters=alpha" in argv for argv in submitted(fakes))
    assert galley(capsys, "status", "my")[0] == 0
    assert galley(capsys, "cancel", "my")[0] == 0
    asked = [call for call in fakes.calls() if call["program"] in ("squeue", "scancel", "sinfo")]
    assert {call["program"] for call in asked} == {"squeue", "scancel", "sinfo"}
    assert {call["env"].get("SLURM_CLUSTERS") for call in asked} == {"alpha"}


SHELL = {"SBATCH_ACCOUNT": "acc", "SBATCH_PARTITION": "gpu", "SLURM_CLUSTERS": "alpha", "SBATCH_TIMELIMIT": "10"}


def test_what_the_shell_says_to_every_sbatch(
    here: Path, fakes: Scenario, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    status, _, err = galley(capsys, "submit", *WORDS, "cluster.partition=long")
    assert status == 0
    assert "galley: note: jobs take cluster.account=acc, as SBATCH_ACCOUNT says\n" in err
    assert "galley: note: SBATCH_PARTITION=gpu is not used: jobs take cluster.partition=long\n" in err
    assert "galley: note: jobs take cluster.clusters=alpha, as SLURM_CLUSTERS says\n" in err
    assert "galley: note: SBATCH_TIMELIMIT is not used: jobs take what the profile says\n" in err
    text = (here / "runs/my/jobs/train.sbatch").read_text()
    assert (option(text, "account"), option(text, "partition")) == (["acc"], ["long"])
    assert all("--clusters=alpha" in argv for argv in submitted(fakes))
    for call in fakes.calls("sbatch"):
        assert not [name for name in call["env"] if name.startswith("SBATCH_")]
    for word in ("all", "a,b"):
        monkeypatch.setenv("SLURM_CLUSTERS", word)
        made, _ = submission(*WORDS)
        assert f"SLURM_CLUSTERS={word} is not used: jobs take cluster.clusters=none" in made.notes


SINFO = "gpu*|up|1-00:00:00|3|idle|96|1031000|gpu:h100:8|h100\ncpu|up|infinite|9|idle|32|64000|(null)|(null)\n"
SINFO += "short|up|30:00|9|idle|96|640000|gpu:8|(null)\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["cluster.time=2-0"],
            "cluster.time: 2-0 is more than partition gpu allows, 1-00:00:00: the job would wait for ever",
        ),
        (["cluster.partition=short"], "cluster.time: 24:00:00 is more than partition short allows, 00:30:00: the job"),
        (["cluster.side.partition=short"], "cluster.side.time: 4:00:00 is more than partition short allows, 00:30:00"),
    ],
)
def test_a_time_that_no_partition_allows(
    words: list[str], said: str, here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm takes such a job, unless EnforcePartLimits is set, and never starts it."""
    fakes.set(partitions=SINFO)
    assert refused(here, capsys, "submit", *WORDS, *words).startswith(said)
    assert submitted(fakes) == []
    assert galley(capsys, "submit", *WORDS, *words, "cluster.qos=long")[0] == 0  # which may allow more


@pytest.mark.parametrize(
    "words", [[], ["cluster.partition=gpu,short"], ["cluster.partition=cpu"], ["cluster.partition=hidden"]]
)
def test_a_time_that_some_partition_allows(
    words: list[str], here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.set(partitions=SINFO)
    status, _, err = galley(capsys, "submit", *WORDS, *words)
    assert status == 0
    told = {
        "cluster.partition=cpu": "8 GPUs a node, but cpu has 0",
        "cluster.partition=hidden": "no partition 'hidden'",
    }
    assert told.get("".join(words), "") in err


@pytest.mark.parametrize(
    ("said", "words", "where", "shows"),
    [
        ("Invalid account or account/partition combination specified", [], "cluster.account", "no --account is given"),
        ("Invalid account or account/partition combination specified", ["account=x"], "cluster.account", "--account=x"),
        ("You must specify an account with -A", [], "cluster.account", "no --account is given"),
        ("Invalid qos specification", ["qos=x"], "cluster.qos", "--qos=x"),
        (
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            [],
            "cluster.qos",
            "",
        ),
        ("Invalid feature specification", ["constraint=x"], "cluster.constraint", "--constraint=x"),
        ("Requested reservation is invalid", ["reservation=x"], "cluster.reservation", "--reservation=x"),
        ("Requested time limit is invalid (missing or exceeds some limit)", [], "cluster.time", "--time=24:00:00"),
        ("User's group not permitted to use this partition", [], "cluster.partition", ""),
        ("Invalid generic resource (gres) specification", ["gpu_request=gres"], "cluster.gpu_request", "--gres=gpu:8"),
        ("Memory specification can not be satisfied", [], "cluster.memory_per_rank", "--mem=0"),
        ("Please specify --ntasks", [], "cluster.ntasks", "no --ntasks is given"),
        ("Please use --mem-per-cpu instead of --mem", [], "cluster.memory_per_rank", "memory_request=mem-per-cpu"),
        ("--mem not allowed; memory is allocated by GPU", [], "cluster.memory_per_rank", "--mem=0"),
        ("GPU jobs must request exactly 16 cores per GPU", [], "cluster.cores_per_rank", ""),
        ("Required partition not available (inactive or drain)", [], "cluster.partition", ""),
        ("MaxGRESPerAccount", [], "cluster.qos", ""),
        ("requested walltime exceeds the maximum", [], "cluster.time", "--time=24:00:00"),
        ("No cluster 'x' known by database.", ["clusters=x"], "cluster.clusters", "--clusters=x"),
        ("Something that nobody foresaw", [], "slurm", "--nodes=2 --gpus-per-node=8"),
    ],
)
def test_a_refusal_names_the_key_that_answers_it(
    said: str, words: list[str], where: str, shows: str, here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.set(partitions=SINFO, refuses=said)
    profile("x", "side: {prepare: here}\n")
    line = refused(here, capsys, "submit", "my.yaml", "cluster=x", "nodes=2", *(f"cluster.{word}" for word in words))
    assert line.startswith(f"{where}: Slurm refuses the train job ("), line
    assert shows in line
    assert said in line
    assert len(line) < 480


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["nodes=9", "batch.samples=144"], "nodes"),
        (["cluster.partition=cpu"], "cluster.gpus_per_node"),
        (["cluster.cores_per_rank=16"], "cluster.cores_per_rank"),
        (["cluster.memory_per_rank=500G", "cluster.whole_nodes=false"], "cluster.memory_per_rank"),
        (["ranks=2"], "slurm"),
    ],
)
def test_a_configuration_that_is_not_there_names_what_is_too_much(
    words: list[str], where: str, here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.set(partitions=SINFO, refuses="Requested node configuration is not available")
    profile("x", "side: {prepare: here}\n")
    assert refused(here, capsys, "submit", "my.yaml", "cluster=x", *words).startswith(
        f"{where}: Slurm refuses the train"
    )


def test_a_refusal_of_the_side_names_its_own_key(
    here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.set(partitions=SINFO, refuses="Invalid qos specification")
    assert refused(here, capsys, "submit", *WORDS).startswith("cluster.side.qos: Slurm refuses the prepare job (")


@pytest.mark.parametrize("key", ["cluster.partition", "cluster.side.partition"])
def test_an_unknown_partition_is_named_by_the_key_that_gave_it(
    key: str, here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.set(partitions=SINFO, refuses="Invalid partition name specified")
    line = refused(here, capsys, "submit", *WORDS, f"{key}=nowhere")
    assert line.startswith(f"{key}: no partition 'nowhere' (")
