"""Words of other trainers and of Slurm: understood, or answered with the key to use; none is met with silence."""

import ast
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest

from galley.contract.errors import UserError
from galley_launch import cli
from galley_launch.base import words
from galley_launch.base.grammar import parse
from galley_launch.base.options import RESERVED, read
from galley_launch.cluster.profile import Cluster
from galley_launch.plan import compose, request
from galley_launch.recipe.schema import Recipe, build, keys, resolve_key
from galley_launch.verbs import VERBS

RECIPE = "smollm2-135m-lora"
TABLE = words._table()


def taken(*argv: str) -> tuple[str, ...]:
    """The settings that a command line comes to."""
    return parse(["plan", RECIPE, *argv], VERBS).settings


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse(list(argv), VERBS)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


def is_key(key: str) -> bool:
    if key.startswith("cluster."):
        return key.removeprefix("cluster.") in Cluster.model_fields
    return key in RESERVED or (key in keys() and resolve_key(key) == key)


@pytest.mark.parametrize(
    ("typed", "settings"),
    [
        ("gpu=0", ["gpus=0"]),
        ("gpu=0,1", ["gpus=0,1"]),
        ("wandb=chats", ["tracking.wandb.project=chats"]),
        ("early_stopping=3", ["duration.patience=3"]),
        ("early_stopping_patience=3", ["duration.patience=3"]),
        ("resume=true", []),
        ("resume=True", []),
        ("--resume", []),
        ("--resume_from_checkpoint=last", []),
        ("fp16=true", ["model.dtype=float16"]),
        ("--fp16", ["model.dtype=float16"]),
        ("--bf16 True", ["model.dtype=bfloat16"]),
        ("--bf16 lr=1e-4", ["model.dtype=bfloat16", "lr=1e-4"]),
        ("dtype=bf16", ["model.dtype=bfloat16"]),
        ("--torch-dtype bfloat16", ["model.dtype=bfloat16"]),
        ("mixed_precision=no", ["model.dtype=float32"]),
        ("zero=3", ["deepspeed=zero3"]),
        ("zero_stage=2", ["deepspeed=zero2"]),
        ("stage=sft", []),
        ("r=8", ["method.rank=8"]),
        ("lora_r=8", ["method.rank=8"]),
        ("lora_alpha=16", ["method.alpha=16"]),
        ("lora_target=all", ["method.targets=all-linear"]),
        ("lora_target_modules=q_proj,v_proj", ["method.targets=[q_proj,v_proj]"]),
        ("target_modules=[q_proj,v_proj]", ["method.targets=[q_proj,v_proj]"]),
        ("learning_rate=1e-4", ["optimizer.lr=1e-4"]),
        ("num_train_epochs=3", ["duration.epochs=3"]),
        ("max_steps=100", ["duration.steps=100"]),
        ("max_steps=-1", []),
        ("max_seq_length=512", ["data.max_length=512"]),
        ("lr_scheduler_type=constant_with_warmup", ["schedule.kind=constant"]),
        ("lr_scheduler=cosine", ["schedule.kind=cosine"]),
        ("optim=adamw_torch_fused", ["optimizer.name=adamw"]),
        ("optim=paged_adamw_8bit", ["optimizer.name=paged_adamw_8bit"]),
        ("load_in_4bit=true", ["method.kind=qlora"]),
        ("quantization_bit=8", ["method.kind=lora_int8"]),
        ("finetuning_type=lora", ["method.kind=lora"]),
        ("use_peft=false", ["method.kind=full"]),
        ("model_name_or_path=org/x", ["model.path=org/x"]),
        ("model=org/x", ["model.path=org/x"]),
        ("dataset=my chats.jsonl", ["data.path=my chats.jsonl"]),
        ("val_size=0.1", ["data.held_out=0.1"]),
        ("gradient_checkpointing=true", ["activation_checkpointing=true"]),
        ("flash_attn=fa2", ["model.attention=flash_attention_2"]),
        ("report_to=none", []),
        ("save_steps=50", ["cadence.save_every=50"]),
        ("device=gpu", ["device=cuda"]),
        ("device=cpu", ["device=cpu"]),
        ("gpus=auto", ["gpus=all"]),
        ("gpus=0,1", ["gpus=0,1"]),
        ("nproc_per_node=2", ["ranks=2"]),
        ("use_cpu=true", ["device=cpu"]),
        ("run_name=x", ["name=x"]),
        ("lr=1e-4", ["lr=1e-4"]),
        ("optimizer.name=lion", ["optimizer.name=lion"]),
    ],
)
def test_a_word_that_can_mean_one_thing_only_is_understood(
    typed: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = typed.split() if typed.startswith("--") else [typed]
    command = parse(["plan", RECIPE, *argv], VERBS)
    assert list(command.settings) == settings
    own = settings == [typed]
    assert len(command.notes) == (0 if own else 1)
    assert own or "is read as" in command.notes[0] or "has no effect" in command.notes[0]


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("batch_size=16", "batch.samples is the global batch of one step"),
        ("per_device_train_batch_size=4", "set micro_batch=N"),
        ("gradient_accumulation_steps=8", "accumulation follows by itself: batch.samples / (micro_batch x ranks)"),
        ("output_dir=out", "set name=NAME, and runs=DIRECTORY"),
        ("early_stopping=true", "set duration.patience=3"),
        ("wandb=true", "tracking.wandb.project=NAME"),
        ("resume=false", "name=NEW"),
        ("resume_from_checkpoint=out/checkpoint-500", "galley run runs/NAME"),
        ("warmup_steps=100", "schedule.warmup is a share"),
        ("partition=gpu", "galley submit RECIPE cluster=NAME cluster.partition=VALUE"),
        ("time=4:00:00", "cluster.time=VALUE"),
        ("gres=gpu:4", "ranks=N"),
        ("fsdp=full_shard", "deepspeed=zero3"),
        ("zero=9", "use deepspeed=zero0, zero1, zero2 or zero3"),
        ("push_to_hub=true", "nothing is uploaded"),
        ("template=qwen", "chat_template"),
        ("load_best_model_at_end=true", "step=best"),
        ("eval_strategy=steps", "cadence.eval_every=STEPS"),
        ("optim=fp8", ""),
    ],
)
def test_a_word_that_could_mean_several_is_answered_with_the_key(typed: str, answer: str) -> None:
    if not answer:  # A value that no table knows passes on to the recipe's own types.
        assert taken(typed) == ("optimizer.name=fp8",)
        return
    assert answer in refused("plan", RECIPE, typed)


@pytest.mark.parametrize(
    ("argv", "verb", "left"),
    [
        (["train", RECIPE], "run", ()),
        (["run", RECIPE, "--dry-run"], "plan", ()),
        (["run", "--dry-run", RECIPE, "lr=1"], "plan", ("lr=1",)),
        (["train", RECIPE, "dry_run=true"], "plan", ()),
        (["plan", RECIPE, "--dry-run"], "plan", ()),
        (["dry-run", RECIPE], "plan", ()),
        (["submit", RECIPE, "--dry-run", "cluster=venv"], "plan", ("cluster=venv",)),
        (["resume", "runs/x"], "run", ()),
        (["preprocess", RECIPE], "prepare", ()),
        (["logs", "x", "--follow"], "logs", ()),
        (["logs", "x", "-f"], "logs", ()),
        (["tail", "-f", "x"], "logs", ()),
    ],
)
def test_verbs_of_others_are_understood(argv: list[str], verb: str, left: tuple[str, ...]) -> None:
    command = parse(argv, VERBS)
    assert (command.verb, command.settings) == (verb, left)
    assert len(command.positionals) == 1


@pytest.mark.parametrize("word", sorted(TABLE.verb_answers))
def test_other_verbs_are_answered(word: str) -> None:
    assert f"no such command: {word!r}; {TABLE.verb_answers[word]}" in refused(word, RECIPE)


def test_a_verb_that_destroys_something_is_never_guessed() -> None:
    assert not {"stop", "cancel", "forget"} & set(TABLE.verbs.values())
    assert set(TABLE.verbs.values()) <= set(VERBS)
    assert not set(TABLE.verbs) & set(VERBS)
    assert not set(TABLE.verb_answers) & {*VERBS, *TABLE.verbs}


def test_on_a_cluster_slurms_words_are_the_profiles() -> None:
    assert parse(["submit", RECIPE, "partition=gpu", "--time", "4:00:00"], VERBS).settings == (
        "cluster.partition=gpu", "cluster.time=4:00:00",
    )  # fmt: skip
    assert taken("cluster=venv", "partition=gpu", "account=x") == (
        "cluster=venv", "cluster.partition=gpu", "cluster.account=x",
    )  # fmt: skip
    assert parse(["clusters", "venv", "partition=gpu"], VERBS).settings == ("cluster.partition=gpu",)
    assert "submit: has no dry run; write: galley plan RECIPE cluster=NAME" in refused("submit", RECIPE, "--dry-run")


# The table itself


def test_no_foreign_word_is_galleys_own() -> None:
    own = {*keys(), *RESERVED, *(key for verb in VERBS.values() for key in verb.keys)}
    assert not words.known() & own
    assert all(is_key(resolve_key(key) if "." not in key and key not in RESERVED else key) for key in TABLE.own)


def test_no_foreign_word_has_two_meanings() -> None:
    raw = tomllib.loads(Path(words.__file__).with_name("words.toml").read_text(encoding="utf-8"))
    keyed = [name for part in ("same", "answers") for names in raw[part].values() for name in names.split()]
    keyed += [name for names in raw["values"] for name in names.split()]
    verbs = [*raw["verbs"], *(name for names in raw["verb_answers"].values() for name in names.split())]
    for listed in (keyed, verbs):
        assert len(listed) > 50
        assert {name for name in listed if listed.count(name) > 1} == set()


@pytest.mark.parametrize("own", sorted({*TABLE.same.values(), *TABLE.cluster.values()}))
def test_what_a_word_is_taken_for_exists(own: str) -> None:
    assert is_key(own)


def _cells() -> list[tuple[str, str, str]]:
    tables = {**TABLE.own, **TABLE.values}
    return [
        (key, value, cell) for key, cells in tables.items() for value, cell in cells.items() if isinstance(cell, str)
    ]


@pytest.mark.parametrize(("key", "value", "cell"), _cells())
def test_what_a_value_is_taken_for_passes(key: str, value: str, cell: str) -> None:
    typed = {"*": "0.5" if "held_out" in cell else "3"}.get(value, value)
    settings = taken(f"{key}={typed}")
    assert all(is_key(setting.partition("=")[0]) for setting in settings)
    recipe = request.resolve(RECIPE, read(settings)).recipe
    assert recipe.model.path


def _named(text: str) -> list[str]:
    return re.findall(r"\b([a-z_]+(?:\.[a-z_]+)*)=", text)


@pytest.mark.parametrize("text", sorted({*TABLE.answers.values(), *TABLE.verb_answers.values()}))
def test_an_answer_names_keys_that_exist_and_is_short(text: str) -> None:
    assert len(text) < 150
    assert all(is_key(key) or key in ("log_every", "mail-type", "type") for key in _named(text)), _named(text)
    named = re.findall(r"\b(?:batch|cadence|data|duration|method|model|optimizer|schedule)\.([a-z_]+)", text)
    assert all(any(key.endswith(f".{leaf}") for key in keys()) for leaf in named), named
    assert set(re.findall(r"galley ([a-z]+)", text)) <= set(VERBS) | {"forget"}


def _fields(package: str, file: str, names: set[str]) -> list[str]:
    """Annotated names of classes, read from the library's source: importing it takes seconds."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(next(iter(spec.submodule_search_locations))) / file).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]
    assert len(classes) == len(names)
    return [part.target.id for node in classes for part in node.body if isinstance(part, ast.AnnAssign)]


@pytest.mark.parametrize(
    ("package", "file", "names"),
    [
        ("transformers", "training_args.py", {"TrainingArguments"}),
        ("trl", "trainer/sft_config.py", {"SFTConfig"}),
        ("trl", "trainer/model_config.py", {"ModelConfig"}),
        ("trl", "scripts/utils.py", {"ScriptArguments"}),
    ],
)
def test_every_argument_of_other_trainers_has_an_answer(package: str, file: str, names: set[str]) -> None:
    fields = _fields(package, file, names)
    assert len(fields) > 5
    own = {*keys(), *RESERVED}
    assert [name for name in fields if name not in own and name not in words.known()] == []


# Names that axolotl's and LLaMA-Factory's examples set (their YAML files of July and August 2026).
EXAMPLES = """
base_model model_type tokenizer_type load_in_8bit load_in_4bit datasets dataset_prepared_path val_set_size output_dir
sequence_len sample_packing pad_to_sequence_len adapter lora_model_dir lora_r lora_alpha lora_dropout
lora_target_linear lora_target_modules lora_fan_in_fan_out wandb_project wandb_entity wandb_watch wandb_name
wandb_log_model gradient_accumulation_steps micro_batch_size num_epochs optimizer lr_scheduler learning_rate
train_on_inputs group_by_length bf16 fp16 tf32 gradient_checkpointing early_stopping_patience resume_from_checkpoint
local_rank logging_steps flash_attention warmup_steps warmup_ratio evals_per_epoch saves_per_epoch debug
fsdp fsdp_config model_name_or_path trust_remote_code stage do_train finetuning_type lora_rank
lora_target dataset template cutoff_len max_samples overwrite_cache preprocessing_num_workers dataloader_num_workers
save_steps plot_loss overwrite_output_dir save_only_model report_to per_device_train_batch_size num_train_epochs
lr_scheduler_type ddp_timeout val_size per_device_eval_batch_size eval_strategy eval_steps eval_dataset
quantization_bit quantization_method double_quantization flash_attn enable_liger_kernel use_unsloth neat_packing
use_dora use_rslora pissa_init loraplus_lr_ratio mask_history train_on_prompt freeze_trainable_layers
additional_target adapter_name_or_path gradient_clipping mixed_precision num_processes num_machines
"""


@pytest.mark.parametrize("name", EXAMPLES.split())
def test_keys_of_other_trainers_files_have_an_answer(name: str) -> None:
    """On the command line, and in a recipe's file, where the line is named as before."""
    if name in keys():
        return
    assert words.meaning(name, "true")
    if name in Recipe.model_fields:  # A section: optimizer.
        return
    with pytest.raises(UserError, match=f"no such key: '{name}'; ") as error:
        build({name: "true"}, "mine.yaml")
    assert "did you mean" not in str(error.value)
    assert "galley show RECIPE" not in str(error.value)


@pytest.mark.parametrize("name", ["learning_rat", "num_train_epoch", "gradient_acumulation_steps"])
def test_a_misspelt_foreign_word_is_recognised(name: str) -> None:
    with pytest.raises(UserError, match=r"did you mean '\w+'\?"):
        resolve_key(name)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["fp16"], "'fp16' is an unexpected word; write model.dtype=float16"),
        (["early_stopping"], "write duration.patience=VALUE"),
        (["zero3"], "deepspeed=zero3"),
        (["resume"], "resumes by itself"),
        (["lr", "=", "1e-4"], "write key=value without spaces around ="),
        (["config=x.yaml"], "the recipe's name or file comes first"),
        (["hf_token=x"], "tokens stay in the environment"),
        (["cache_dir=/x"], "HF_HOME"),
    ],
)
def test_a_word_that_stands_alone_is_answered_too(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", RECIPE, *words]) == 2
    assert answer in capsys.readouterr().err


# GPUs by name, and runs by name


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0,0", "gpus: GPU 0 is given twice"),
        ("[1,2,1]", "gpus: GPU 1 is given twice"),
        ("[]", "gpus: names no GPU; write gpus=0,1 or gpus=all"),
        ("", "gpus: names no GPU"),
        (",", "gpus: names no GPU"),
        ("all,0", "write gpus=all alone"),
        ("0-3", "gpus: '0-3' is neither a GPU's number nor its UUID; write gpus=0,1,2,3"),
        ("cuda:1", "gpus: 'cuda:1' is neither a GPU's number nor its UUID"),
    ],
)
def test_gpus_are_checked_at_plan(value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", RECIPE, f"gpus={value}"]) == 2
    assert message in capsys.readouterr().err


def test_all_gpus_are_those_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from galley_launch.base import devices

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "visible", lambda: [devices.Gpu("0"), devices.Gpu("1")])
    assert compose.compose(RECIPE, read(["gpus=all"]), imagine=False).spec.placement.gpus == ["0", "1"]
    assert compose.compose(RECIPE, read([]), imagine=False).spec.placement.gpus == ["0", "1"]


def test_a_run_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for base in ("runs", "elsewhere"):
        made = compose.compose(RECIPE, read(["device=cpu", "ranks=2", "name=mine", f"runs={base}"]), imagine=False)
        made.run.root.mkdir(parents=True)
        made.run.spec.write_text(made.spec.to_json())
        made.run.attempt(1).root.mkdir(parents=True)
        made.run.attempt(1).exit.write_text(json.dumps({"verdict": "stopped"}))
    again = compose.compose("mine", read([]), imagine=False)
    assert (again.run.root, again.spec.name) == (Path("runs/mine"), "mine")
    assert again.spec.placement.ranks_per_node == 2
    other = compose.compose("mine", read(["runs=elsewhere"]), imagine=False)
    assert other.run.root == Path("elsewhere/mine")
    with pytest.raises(UserError, match="is a run that exists"):
        compose.compose("mine", read(["name=other"]), imagine=False)


def test_a_recipe_comes_before_a_run_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = compose.compose(RECIPE, read(["device=cpu", "lr=1"]), imagine=False)
    made.run.root.mkdir(parents=True)
    made.run.spec.write_text(made.spec.to_json())
    assert request.find(RECIPE).run is None
    with pytest.raises(UserError, match="no recipe 'min'"):
        request.find("min")
