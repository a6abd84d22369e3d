"""What the recipes' headers promise: names, arithmetic, commands. Nothing of it was run on a GPU."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest

from galley_launch.base import assets
from galley_launch.base.options import read
from galley_launch.plan import compose
from galley_launch.recipe import catalogue, model_facts
from galley_launch.recipe.schema import Recipe, build, header
from launch import sizes

FOLDER = assets.folder("recipes")
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "demo")
NUMBERS = {"one": 1, "two": 2, "four": 4, "eight": 8, "16": 16}
GPUS = re.compile(r"(?:(\w+) nodes of )?(one|two|four|eight) GPUs? of (\d+) GB")
PART = re.compile(
    r"(weights|adapter|gradients and AdamW|gathered layers|activations|logits|CUDA and buffers) (\d+\.\d)\b"
)
GIB, MARGIN = 2**30 / 1e9, 0.97


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALLEY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


@cache
def recipe(name: str) -> Recipe:
    path = FOLDER / f"{name}.yaml"
    return build(catalogue.read(path).tree, str(path))


def section(name: str, title: str) -> str:
    """A section of a header, as one line."""
    text = re.search(rf"^{title} +(.*(?:\n +.*)*)", header((FOLDER / f"{name}.yaml").read_text()), re.MULTILINE)
    assert text, f"{name} has no {title}"
    return " ".join(text[1].split())


def place(name: str) -> tuple[int, float]:
    """GPUs that a header asks for, and the GB of each."""
    found = GPUS.search(section(name, "Needs"))
    assert found, f"{name} does not say how many GPUs of how many GB"
    return NUMBERS[found[1] or "one"] * NUMBERS[found[2]], float(found[3]) * GIB


def arithmetic(name: str) -> dict[str, float]:
    stage = int(recipe(name).deepspeed[4])
    offload = recipe(name).deepspeed.endswith("offload_cpu")
    return sizes.memory(shapes(name), recipe(name), stage, place(name)[0], offload)


def shapes(name: str) -> dict[str, Any]:
    return model_facts.table()[recipe(name).model.path]


def test_there_is_a_recipe_for_every_purse() -> None:
    families = {re.match("[a-z]+", name)[0] for name in NAMES}  # type: ignore[index]
    assert families == {"gemma", "llama", "mistral", "olmo", "phi", "qwen", "smollm"}
    assert len(NAMES) >= 18
    ranks = {place(name)[0] for name in NAMES}
    assert {1, 8, 16, 128} <= ranks
    small = [name for name in NAMES if place(name) == (1, 8 * GIB)]
    assert {recipe(name).method.kind for name in small} == {"full", "lora", "qlora"}
    assert {recipe(name).deepspeed for name in NAMES} == {"zero2", "zero3", "zero3_offload_cpu"}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_family_size_and_method(name: str) -> None:
    model = recipe(name).model.path.rpartition("/")[2].lower()
    found = re.fullmatch(r"([a-z]+)[\d.]*(?:-small)?-(\d+(?:\.\d+)?)([bm])(?:-a3b)?-(full|lora|qlora)", name)
    assert found
    assert found[1] in model
    assert found[4] == recipe(name).method.kind
    stated = float(found[2]) * {"b": 1e9, "m": 1e6}[found[3]]
    assert shapes(name)["parameters"] == pytest.approx(stated, rel=0.5 if stated < 1.5e9 else 0.08)


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_in_a_header_is_computed(name: str) -> None:
    parts, text = arithmetic(name), section(name, "Memory")
    assert dict(PART.findall(text)) == {part: f"{size:.1f}" for part, size in parts.items()}
    assert text.startswith(f"about {sum(parts.values()):.1f} GB on each GPU: ")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_the_gpus_that_it_names(name: str) -> None:
    _, size = place(name)
    assert sum(arithmetic(name).values()) < size * MARGIN
    assert (
        f"{round(size / GIB)} GB" in recipe(name).about or "CPU" in recipe(name).about or "nodes" in recipe(name).about
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_disk_in_a_header_is_enough(name: str) -> None:
    found = re.search(r"([\d.]+) ([GT]B) of disk", section(name, "Needs"))
    assert found
    stated = float(found[1]) * {"GB": 1, "TB": 1000}[found[2]]
    assert 1.0 <= stated / sizes.disk(shapes(name), recipe(name)) < 1.3


def commands(name: str) -> list[tuple[str, list[str]]]:
    """``galley`` commands of a header, and what it says to set instead, as verb and words."""
    text = header((FOLDER / f"{name}.yaml").read_text())
    typed = re.findall(r"galley (run|submit|plan) ([\w.-]+(?: [\w.]+=\S+)*)", text)
    instead = section(name, "Instead") + section(name, "Expect")
    said = re.findall(r"(?<!\S)[a-z_.]+=[a-z0-9._]+(?: [a-z_.]+=[a-z0-9._-]+)*", instead)
    return [(verb, shlex.split(words)) for verb, words in typed] + [("plan", [name, *each.split()]) for each in said]


@pytest.mark.parametrize("name", [*NAMES, "demo"])
def test_the_commands_in_a_header_plan(name: str, here: Path) -> None:
    found = commands(name) if name != "demo" else [("run", ["demo"]), ("run", ["demo", "device=cpu", "ranks=2"])]
    assert any(words[0] == name for verb, words in found if verb != "plan")
    for verb, (first, *words) in found:
        made = compose.compose(first, read(words, submits=verb == "submit"), imagine=True)
        asked = dict(word.split("=") for word in words)
        assert made.spec.placement.nodes == int(asked.get("nodes", 1))
        assert made.spec.name == first


def test_headers_say_more_than_one_command() -> None:
    every = [(verb, tuple(words)) for name in NAMES for verb, words in commands(name)]
    assert len(every) > len(NAMES) + 20
    assert sum(verb == "submit" for verb, _ in every) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_a_header_names_recipes_that_exist(name: str) -> None:
    text = header((FOLDER / f"{name}.yaml").read_text())
    named = set(re.findall(r"\b[a-z]+[\d.]*(?:-[a-z]+)?-[\d.]+[bm](?:-a3b)?-(?:full|lora|qlora)\b", text))
    assert named - {name}, "say when to choose another"
    assert named <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_those_of_the_field(name: str) -> None:
    """Adapters take rates ten times those of full fine-tuning, and large models lower ones than small."""
    found, billions = recipe(name), shapes(name)["parameters"] / 1e9
    low, high = (1e-4, 5e-4) if found.method.kind != "full" else (2e-6, 2e-5) if billions > 1 else (1e-5, 1e-3)
    assert low <= found.optimizer.lr <= high
    assert found.data.held_out > 0
    assert found.cadence.eval_every


def test_a_recipe_that_extends_another_changes_little() -> None:
    lora, qlora = recipe("llama3.1-8b-lora"), recipe("llama3.1-8b-qlora")
    data, method = lora.data.model_copy(update={"max_length": 2048}), lora.method.model_copy(update={"kind": "qlora"})
    assert qlora == lora.model_copy(update={"data": data, "method": method, "about": qlora.about})


def test_the_template_for_llama_bases_writes_turns() -> None:
    template = jinja2.Environment().from_string((FOLDER / "templates" / "llama3.jinja").read_text())
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]
    text = template.render(messages=turns, bos_token="<s>", add_generation_prompt=False)
    assert text == (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
    )
    asked = template.render(messages=turns[:1], bos_token="<s>", add_generation_prompt=True)
    assert text.startswith(asked)
