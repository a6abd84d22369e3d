"""Recipe, ZeRO and devices become one run; a run that exists is a recipe too."""

import json
import shutil
from pathlib import Path

import pytest

from galley.errors import UserError
from galley.rundir import RunDir
from galley.spec import RunSpec
from galley_launch import cli, commands, compose, plan, resume

ON_CPU = ["device=cpu", "ranks=2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a recipe, data and a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALLEY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 64}')
    (tmp_path / "model" / "model.safetensors").write_text("")
    (tmp_path / "chats.jsonl").write_text("{}\n")
    text = "model: {path: ./model}\ndata: {path: chats.jsonl}\nbatch: {samples: 16}\nduration: {steps: 9}\n"
    (tmp_path / "my.yaml").write_text(text + "micro_batch: 2\ndeepspeed: zero3\n")
    return tmp_path


def begun(name: str, words: list[str]) -> RunDir:
    """A run that took a step."""
    made = compose.compose(name, words, imagine=False)
    made.run.attempt(1).root.mkdir(parents=True)
    made.run.spec.write_text(made.spec.to_json())
    made.run.metrics.write_text('{"step": 1, "steps": 9}\n')
    return made.run


def test_plan_prints_the_bytes_that_run_writes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "my.yaml", *ON_CPU, "lr=1e-3"]) == 0
    out, err = capsys.readouterr()
    made = compose.compose("my.yaml", [*ON_CPU, "lr=1e-3"], imagine=False)
    assert out.startswith("# runs/my/run.json\n" + made.spec.to_json() + "\n# prepare\n")
    assert "micro_batch 2 x accumulation 4 x ranks 2" in err
    assert not (here / "runs").exists()


def test_the_task_keeps_paths_as_written_and_the_placement_finds_them(here: Path) -> None:
    spec = compose.compose("my.yaml", ON_CPU, imagine=False).spec
    assert (spec.task.model.path, spec.task.data.path) == ("./model", "chats.jsonl")
    assert (spec.placement.paths.model, spec.placement.paths.data) == (str(here / "model"), str(here / "chats.jsonl"))
    assert spec.placement.paths.run == str(here / "runs" / "my")
    assert spec.placement.paths.cache == str(here / "cache")


def test_a_run_directory_goes_on_with_its_own_task(here: Path) -> None:
    run = begun("my.yaml", [*ON_CPU, "lr=1e-3"])
    again = compose.compose("runs/my", [], imagine=False)
    old = RunSpec.read(run.spec)
    assert again.spec.task == old.task
    assert again.spec.placement == old.placement
    assert again.spec.name == "my"
    assert again.spec.origin.recipe == "my.yaml"


def test_a_run_directory_goes_on_with_another_placement(here: Path) -> None:
    run = begun("my.yaml", ON_CPU)
    again = compose.compose("runs/my", ["ranks=1", "deepspeed=zero2", "micro_batch=4", "steps=20"], imagine=False).spec
    place = again.placement
    assert (place.ranks_per_node, place.zero_stage, place.micro_batch, place.accumulation) == (1, 2, 4, 4)
    resume.check(run, RunSpec.read(run.spec), again)
    assert again.task.duration.steps == 20


def test_a_run_copied_elsewhere_goes_on_there(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = begun("my.yaml", ON_CPU)
    run.data.mkdir()
    run.data_manifest.write_text("{}")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(run.root, elsewhere / "copied")
    (here / "chats.jsonl").unlink()  # Prepared data travels with the run; its source need not.
    again = compose.compose(str(elsewhere / "copied"), [], imagine=False)
    assert again.spec.placement.paths.run == str(elsewhere / "copied")
    assert again.spec.placement.paths.model == str(here / "model")
    resume.check(RunDir(elsewhere / "copied"), RunSpec.read(elsewhere / "copied" / "run.json"), again.spec)


def test_data_that_was_not_prepared_must_be_there(here: Path) -> None:
    begun("my.yaml", ON_CPU)
    (here / "chats.jsonl").unlink()
    with pytest.raises(UserError, match="no file at"):
        compose.compose("runs/my", [], imagine=False)


def test_a_pinned_revision_is_kept(here: Path) -> None:
    words = [*ON_CPU, "data.path=org/data"]
    run = begun("my.yaml", words)
    body = json.loads(run.spec.read_text())
    body["task"]["data"]["revision"] = "abc123"
    run.spec.write_text(json.dumps(body))
    again = compose.compose("my.yaml", words, imagine=False).spec
    assert again.task.data.revision == "abc123"
    resume.check(run, RunSpec.read(run.spec), again)


def test_init_from_takes_the_exported_model(here: Path) -> None:
    run = begun("my.yaml", ON_CPU)
    shutil.copytree(here / "model", run.export / "model")
    spec = compose.compose("my.yaml", [*ON_CPU, "init_from=my", "name=next"], imagine=False).spec
    assert spec.task.model.path == str(run.export.absolute() / "model")
    assert spec.name == "next"


def test_the_name_is_the_recipes_unless_it_is_given(here: Path) -> None:
    assert compose.compose("my.yaml", ON_CPU, imagine=False).run.root == Path("runs/my")
    assert compose.compose("my.yaml", [*ON_CPU, "name=a", "runs=b"], imagine=False).run.root == Path("b/a")


def test_threads_are_shared_among_ranks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(6)))
    spec = compose.compose("my.yaml", ON_CPU, imagine=False).spec
    stages = plan.make(spec, RunDir(here / "runs/my"), 1, None).stages
    assert spec.placement.threads == 3
    assert [stage.env["OMP_NUM_THREADS"] for stage in stages] == ["6", "3", "6"]
    assert compose.compose("my.yaml", [*ON_CPU, "threads=1"], imagine=False).spec.placement.threads == 1


def test_stages_reach_no_hub_but_prepare(here: Path) -> None:
    spec = compose.compose("my.yaml", ON_CPU, imagine=False).spec
    prepare, train, export = plan.make(spec, RunDir(here / "runs/my"), 3, "/src").stages
    assert "HF_HUB_OFFLINE" not in prepare.env
    assert train.env["HF_HUB_OFFLINE"] == export.env["HF_HUB_OFFLINE"] == "1"
    for stage in (prepare, train, export):
        assert stage.env["PYTHONSAFEPATH"] == "1"
        assert stage.env["PYTHONPATH"] == "/src"
        assert stage.env["GALLEY_ATTEMPT"] == "3"
        assert stage.env["DS_ACCELERATOR"] == "cpu"
        assert stage.env["CUDA_VISIBLE_DEVICES"] == ""
        assert stage.argv[-1] == str(here / "runs/my/run.json")
    assert "--nproc-per-node 2" in train.shell()


@pytest.mark.parametrize(
    ("package", "inherited", "found"),
    [
        ("/code/src/galley", "", "/code/src"),
        ("/code/src/galley", "/lib:.:/here::rel", "/code/src:/lib"),
        ("/venv/site-packages/galley", "", None),
        ("/venv/site-packages/galley", "/lib", "/lib"),
        ("/venv/site-packages/galley", ".", ""),
    ],
)
def test_the_users_folder_is_never_on_the_path(package: str, inherited: str, found: str | None) -> None:
    assert plan.python_path(Path(package), inherited, Path("/here")) == found


def test_a_second_plan_names_the_second_attempt(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun("my.yaml", ON_CPU)
    assert commands.show_plan("my.yaml", ON_CPU) == 0
    assert "GALLEY_ATTEMPT=2" in capsys.readouterr().out
