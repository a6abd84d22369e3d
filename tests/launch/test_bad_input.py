"""Mistakes: each is one clear line on stderr, exit status 2, and nothing written."""

import json
from pathlib import Path

import pytest
from launch.test_grammar import nothing_happened

from galley.contract.rundir import RunDir
from galley_launch import cli
from galley_launch.base import devices
from launch import fakes

ON_CPU = ["device=cpu", "ranks=2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a recipe, some data, a model without weights, one without a configuration. No GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "visible", list)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 64}')
    (tmp_path / "model" / "model.safetensors").write_text("")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "chats.jsonl").write_text("{}\n")
    (tmp_path / "typo.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_cliping": 1.0}))
    (tmp_path / "my.yaml").write_text(
        "model: {path: ./model}\ndata: {path: chats.jsonl}\nbatch: {samples: 16}\nduration: {steps: 2}\n"
    )
    (tmp_path / "bad.yaml").write_text("model: {path: ./model}\ndata: {path: chats.jsonl}\noptimiser: {lr: 1}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["my.yaml"], "device: no GPU is visible here; use device=cpu ranks=1 to train on the CPU"),
        (["my.yaml", "ranks=4"], "device: no GPU is visible here; use device=cpu ranks=4 to train on the CPU"),
        (["my.yaml", "device=tpu"], "device: 'tpu' is neither cuda nor cpu; write device=cuda or device=cpu"),
        (["my.yaml", "device=cpu", "ranks=0"], "ranks: '0' is not a whole number from 1; write ranks=1, ranks=2 …"),
        (["my.yaml", "device=cpu", "gpus=0"], "gpus: given as 0 with device=cpu; remove one of the two"),
        (["my.yaml", "nodes=2", *ON_CPU], "nodes: 2 nodes are not one box; galley submit RECIPE cluster=NAME nodes=N"),
        (["my.yaml", "cluster=x", *ON_CPU], "cluster: galley run trains on this box; galley submit RECIPE cluster=x"),
        (["my.yaml", "force=1", *ON_CPU], "force: nothing here can be forced; leave it out"),
        (["my.yaml", "name=a/b", *ON_CPU], "name: 'a/b' is not a run's name; use letters, digits, '.', '_' and '-'"),
        (
            ["org/model"],
            "recipe: no file org/model; give a recipe; where org/model is a model, write model.path=",
        ),
        (
            ["smollm2-135m-lora.yaml"],
            "recipe: no file smollm2-135m-lora.yaml; write smollm2-135m-lora for the recipe",
        ),
        (["SmolLM2-135M-LoRA"], "recipe: no recipe 'SmolLM2-135M-LoRA'; did you mean 'smollm2-135m-lora'?"),
        (["nosuch.yaml"], "recipe: no file nosuch.yaml; give a path to a .yaml file, or a name (see galley recipes)"),
        (["smollm2-135m-lara"], "recipe: no recipe 'smollm2-135m-lara'; did you mean 'smollm2-135m-lora'?"),
        (["bad.yaml", *ON_CPU], "bad.yaml: no such key: 'optimiser'; did you mean 'optimizer'?"),
        (["my.yaml", "lrr=1", *ON_CPU], "command line: no such key: 'lrr'; did you mean 'lr'?"),
        (["my.yaml", "lr=fast", *ON_CPU], "command line: optimizer.lr: 'fast' is not a number"),
        (["my.yaml", "samples=3", *ON_CPU], "batch: 3 samples a step / (micro_batch 1 x ranks 2) = 1.5, which is not"),
        (["my.yaml", "data.path=no.jsonl", *ON_CPU], "data.path: no file at HERE/no.jsonl; give the path to it"),
        (["my.yaml", "data.path=chats", *ON_CPU], "data.path: 'chats' is neither a file nor a hub id"),
        (["my.yaml", "data.path=./model", *ON_CPU], "HERE/model: is a model's folder; give one with files of rows"),
        (["my.yaml", "held_out_path=no.jsonl", *ON_CPU], "data.held_out_path: no file at HERE/no.jsonl"),
        (["my.yaml", "model.path=./no", *ON_CPU], "model.path: no model at HERE/no; give a folder"),
        (["my.yaml", "model.path=./empty", *ON_CPU], "model.path: HERE/empty is a model folder without config.json"),
        (
            ["my.yaml", "model.path=./bare", *ON_CPU],
            "model.path: HERE/bare has no weights; put its *.safetensors",
        ),
        (["my.yaml", "model.path=chats.jsonl", *ON_CPU], "model.path: HERE/chats.jsonl is not a model; give a folder"),
        (
            ["my.yaml", "chat_template=chatmll", *ON_CPU],
            "model.chat_template: 'chatmll' is neither a file nor a shipped",
        ),
        (["my.yaml", "deepspeed=zreo2", *ON_CPU], "deepspeed: no preset 'zreo2'; did you mean 'zero2'?"),
        (["my.yaml", "deepspeed=no.json", *ON_CPU], "deepspeed: no file no.json; give a path to a JSON file"),
        (["my.yaml", "deepspeed=typo.json", *ON_CPU], "deepspeed typo.json: DeepSpeed has no key 'gradient_cliping'"),
        (["my.yaml", "init_from=zzz", *ON_CPU], "init_from: no run at runs/zzz; give a run's name or directory"),
        (["my.yaml", "runs=chats.jsonl", *ON_CPU], "chats.jsonl/my: cannot be written to (Not a directory); choose"),
    ],
)
def test_run_refuses(words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = nothing_happened(here, ["run", *words], capsys)
    assert line.replace(str(here), "HERE").startswith(f"galley: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=2"], "gpus: too few devices: no GPU 2 among the visible ones; choose from 0, 1"),
        (["ranks=4"], "ranks: too few devices: 4 ranks for 2 GPUs (0, 1); use ranks=2 or fewer"),
        (["gpus=0", "ranks=2"], "ranks: too few devices: 2 ranks for 1 GPUs (0)"),
        (["gpus=0,0"], "gpus: GPU 0 is given twice; one rank takes one GPU"),
    ],
)
def test_too_few_devices(
    words: list[str], message: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "visible", lambda: [devices.Gpu("0", "GPU-aaaa"), devices.Gpu("1", "GPU-bbbb")])
    assert message in nothing_happened(here, ["run", "my.yaml", *words], capsys)


def test_the_data_is_looked_for_beside_the_recipe_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "deep").mkdir()
    text = (here / "my.yaml").read_text().replace("./model", str(here / "model"))
    (here / "deep" / "my.yaml").write_text(text.replace("chats", "others"))
    line = nothing_happened(here, ["run", "deep/my.yaml", *ON_CPU], capsys)
    assert f"data.path: no file at {here}/others.jsonl, nor at {here}/deep/others.jsonl;" in line
    (here / "deep" / "others.jsonl").write_text("{}")
    assert cli.main(["plan", "deep/my.yaml", *ON_CPU, "files=all"]) == 0
    assert f'"data": "{here}/deep/others.jsonl"' in capsys.readouterr().out


def test_torch_that_is_not_installed_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = nothing_happened(here, ["run", "my.yaml", *ON_CPU], capsys)
    assert "install the rest, in a checkout of Galley: pip install -c constraints.txt '.[train]'" in line


def test_a_directory_that_cannot_be_written_to(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = nothing_happened(here, ["run", "my.yaml", "runs=/proc", *ON_CPU], capsys)  # Not even root may.
    assert line.startswith("galley: /proc/my: cannot be written to (")
    assert line.endswith("; choose a directory that you can write to: runs=DIRECTORY\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["status", "nosuch"], "run: no run 'nosuch' here or in runs/; known: broken, x"),
        (["logs", "x", "rank=0"], "rank: no log of rank 0 in attempt 1; the ranks have not started"),
        (["stop", "x"], "runs/x: is not running; see galley status"),
        (["export", "x", "step=first"], "step: 'first' is not a step; write step=last, step=best or step=N"),
        (["export", "x", "step=7"], "step: runs/x has no checkpoint of step 7; it has: none yet"),
        (["run", "runs/broken", *ON_CPU], "runs/broken/run.json: cannot be read: "),
        (["run", "runs/x", "name=y", *ON_CPU], "name: runs/x is a run that exists; leave name and runs out"),
        (
            ["plan", "my.yaml", "init_from=x"],
            "init_from: runs/x has no exported model; write it first: galley export x",
        ),
        (["plan", "my.yaml", "init_from=x", "model.path=./model"], "init_from: and model.path both say where"),
    ],
)
def test_verbs_for_runs_refuse(argv: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(Path("runs/x"))
    run.attempt(1).logs.mkdir(parents=True)
    run.spec.write_text(fakes.spec(run.root.absolute()).to_json())
    (here / "runs" / "broken").mkdir()
    (here / "runs" / "broken" / "run.json").write_text("{}")
    assert message in nothing_happened(here, argv, capsys)
