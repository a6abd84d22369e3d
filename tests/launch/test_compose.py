"""Recipe, ZeRO and devices become one run; a run that exists is a recipe too."""

import json
import shutil
from pathlib import Path

import pytest

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley_launch import cli, commands
from galley_launch.base.options import read
from galley_launch.plan import compose, plan, resume
from galley_launch.recipe.schema import Recipe

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
    made = compose.compose(name, read(words), imagine=False)
    made.run.attempt(1).root.mkdir(parents=True)
    made.run.spec.write_text(made.spec.to_json())
    made.run.metrics.write_text('{"step": 1, "steps": 9}\n')
    return made.run


def test_plan_prints_the_bytes_that_run_writes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "my.yaml", *ON_CPU, "lr=1e-3", "files=all"]) == 0
    out, err = capsys.readouterr()
    made = compose.compose("my.yaml", read([*ON_CPU, "lr=1e-3"]), imagine=False)
    files = plan.make(made.spec, made.run, 1, None).files
    written = "\n".join(f"# runs/my/{name}\n{text}" for name, text in files.items())
    assert sorted(files) == ["attempts/0001/placement.json", "run.json"]
    assert files["run.json"] == made.spec.to_json()
    assert out.startswith(written + "\n# prepare\n")
    assert "micro_batch 2 x accumulation 4 x ranks 2" in err
    assert not (here / "runs").exists()


def test_the_task_keeps_paths_as_written_and_the_placement_finds_them(here: Path) -> None:
    spec = compose.compose("my.yaml", read(ON_CPU), imagine=False).spec
    assert (spec.task.model.path, spec.task.data.path) == ("./model", "chats.jsonl")
    assert (spec.placement.paths.model, spec.placement.paths.data) == (str(here / "model"), str(here / "chats.jsonl"))
    assert spec.placement.paths.run == str(here / "runs" / "my")
    assert spec.placement.paths.cache == str(here / "cache")


def test_a_run_directory_goes_on_with_its_own_task(here: Path) -> None:
    run = begun("my.yaml", [*ON_CPU, "lr=1e-3"])
    again = compose.compose("runs/my", read([]), imagine=False)
    old = RunSpec.read(run.spec)
    assert again.spec.task == old.task
    assert again.spec.placement == old.placement
    assert again.spec.name == "my"
    assert again.spec.origin.recipe == "my.yaml"


def test_a_run_directory_goes_on_with_another_placement(here: Path) -> None:
    run = begun("my.yaml", ON_CPU)
    again = compose.compose(
        "runs/my", read(["ranks=1", "deepspeed=zero2", "micro_batch=4", "steps=20"]), imagine=False
    ).spec
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
    again = compose.compose(str(elsewhere / "copied"), read([]), imagine=False)
    assert again.spec.placement.paths.run == str(elsewhere / "copied")
    assert again.spec.placement.paths.model == str(here / "model")
    resume.check(RunDir(elsewhere / "copied"), RunSpec.read(elsewhere / "copied" / "run.json"), again.spec)


def test_data_that_was_not_prepared_must_be_there(here: Path) -> None:
    begun("my.yaml", ON_CPU)
    (here / "chats.jsonl").unlink()
    with pytest.raises(UserError, match="no file at"):
        compose.compose("runs/my", read([]), imagine=False)


def test_a_revision_that_is_taken_out_makes_another_task(here: Path) -> None:
    words = [*ON_CPU, "data.path=org/data"]
    run = begun("my.yaml", [*words, "data.revision=abc123"])
    assert compose.compose("runs/my", read([]), imagine=False).spec.task.data.revision == "abc123"
    again = compose.compose("my.yaml", read(words), imagine=False).spec
    with pytest.raises(UserError, match=r"another task \(data\.revision: abc123 → None\)"):
        resume.check(run, RunSpec.read(run.spec), again)


def test_what_the_contract_refuses_is_said_of_what_it_is_about(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a run").mkdir()
    shutil.move(begun("my.yaml", ON_CPU).spec, here / "a run" / "run.json")
    with pytest.raises(UserError, match=r"^name: 'a run': .*; use letters, digits, '\.', '_' and '-'$"):
        compose.compose("./a run", read([]), imagine=False)
    monkeypatch.setattr(Recipe, "samples_per_step", 32)
    with pytest.raises(UserError, match=r"^recipe: the task wants 16 samples a step, the placement makes 32; change"):
        compose.compose("my.yaml", read(ON_CPU), imagine=False)


def test_init_from_takes_the_exported_model(here: Path) -> None:
    run = begun("my.yaml", ON_CPU)
    shutil.copytree(here / "model", run.export / "model")
    spec = compose.compose("my.yaml", read([*ON_CPU, "init_from=my", "name=next"]), imagine=False).spec
    assert spec.task.model.path == str(run.export.absolute() / "model")
    assert spec.name == "next"


def test_the_name_is_the_recipes_unless_it_is_given(here: Path) -> None:
    assert compose.compose("my.yaml", read(ON_CPU), imagine=False).run.root == Path("runs/my")
    assert compose.compose("my.yaml", read([*ON_CPU, "name=a", "runs=b"]), imagine=False).run.root == Path("b/a")


def test_threads_are_shared_among_ranks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(6)))
    spec = compose.compose("my.yaml", read(ON_CPU), imagine=False).spec
    stages = plan.make(spec, RunDir(here / "runs/my"), 1, None).stages
    assert spec.placement.threads == 3
    assert [stage.env["OMP_NUM_THREADS"] for stage in stages] == ["6", "3", "6"]
    assert compose.compose("my.yaml", read([*ON_CPU, "threads=1"]), imagine=False).spec.placement.threads == 1


def test_stages_reach_no_hub_but_prepare(here: Path) -> None:
    spec = compose.compose("my.yaml", read(ON_CPU), imagine=False).spec
    prepare, train, export = plan.make(spec, RunDir(here / "runs/my"), 3, "/src").stages
    assert "HF_HUB_OFFLINE" not in prepare.env
    assert train.env["HF_HUB_OFFLINE"] == export.env["HF_HUB_OFFLINE"] == "1"
    for stage in (prepare, train, export):
        assert stage.env["PYTHONSAFEPATH"] == "1"
        assert stage.env["PYTHONPATH"] == "/src"
        assert stage.env["GALLEY_ATTEMPT"] == "3"
        assert stage.env["DS_ACCELERATOR"] == "cpu"
        assert stage.env["CUDA_VISIBLE_DEVICES"] == ""
        assert stage.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
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
    assert commands.show_plan("my.yaml", read(ON_CPU)) == 0
    assert "GALLEY_ATTEMPT=2" in capsys.readouterr().out


def ended(run: RunDir, **words: object) -> None:
    run.attempt(1).exit.write_text(json.dumps({"verdict": "done", "step": 9} | words))


def test_a_plan_of_a_finished_run_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun("my.yaml", ON_CPU)
    ended(run, exported=True)
    assert cli.main(["plan", "my.yaml", *ON_CPU]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "galley: note: run my is finished: galley run would write and start nothing\n" in err
    assert cli.main(["plan", "my.yaml", *ON_CPU, "steps=20"]) == 0
    assert "GALLEY_ATTEMPT=2" in capsys.readouterr().out


def test_a_plan_of_a_trained_run_is_its_export(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(begun("my.yaml", ON_CPU))
    assert cli.main(["plan", "my.yaml", *ON_CPU, "files=all"]) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("# ")] == ["# runs/my/run.json", "# export"]
    assert "GALLEY_ATTEMPT=1" in out
    assert "run my is trained: galley run only exports it" in err


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_plan_is_refused_as_the_run_would_be(verb: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun("my.yaml", ON_CPU)
    assert cli.main([verb, "my.yaml", *ON_CPU, "lr=1e-3"]) == 2
    out, err = capsys.readouterr()
    todo = "give name=NEW for another run, or remove this one: rm -r runs/my"
    assert (out, err) == ("", f"galley: runs/my: trains another task (optimizer.lr: 0.0002 → 0.001); {todo}\n")


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_run_of_another_version_is_one_line(verb: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun("my.yaml", ON_CPU)
    run.spec.write_text(run.spec.read_text().replace('"schema": 1', '"schema": 2'))
    assert cli.main([verb, "my.yaml", *ON_CPU]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("galley: runs/my/run.json: cannot be read: ")
    assert "it was written by another version" in err


def test_a_run_that_goes_on_keeps_how_its_order_follows_from_the_seed(here: Path) -> None:
    """Runs that were begun before there was a choice have no ``seeding``: they go on as they began."""
    assert compose.compose("my.yaml", read(ON_CPU), imagine=False).spec.task.seeding == 2
    run = begun("my.yaml", [*ON_CPU, "seeding=1"])
    old = json.loads(run.spec.read_text())
    del old["task"]["seeding"]
    run.spec.write_text(json.dumps(old))
    for name in ("my.yaml", str(run.root)):
        made = compose.compose(name, read(ON_CPU), imagine=False)
        assert made.spec.task.seeding == 1
        resume.check(made.run, RunSpec.read(run.spec), made.spec)
    made = compose.compose("my.yaml", read([*ON_CPU, "seeding=2"]), imagine=False)
    with pytest.raises(UserError, match=r"trains another task \(seeding: 1 → 2\)"):
        resume.check(made.run, RunSpec.read(run.spec), made.spec)
