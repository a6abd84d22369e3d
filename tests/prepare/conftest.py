"""A tiny tokenizer, tiny models, and runs that use them; made once a session, in a second or two."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec

CORPUS = [
    "The quick brown fox jumps over the lazy dog while the cook in the galley stirs the soup.",
    "def parse(text: str) -> list[int]:\n    return [int(word) for word in text.split()]\n",
    "What is the capital of France? The capital of France is Paris. And of Italy? Rome.",
    "Ça va déjà très bien, merci; über allen Gipfeln ist Ruh. 日本語のテキスト 🙂🚀",
] * 3
SPECIALS = [
    "<|endoftext|>", "<s>", "</s>", "[INST]", "[/INST]", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>",
    "<|User|>", "<|Assistant|>", "<think>", "</think>",
]  # fmt: skip
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(specials: list[str], **names: str) -> Any:
    """A byte-level BPE of a few hundred tokens, in transformers' wrapper."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Llama 3 and others report offsets without the space that a token begins with.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in specials])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def save_model(folder: Path, rows: int, layers: int = 2) -> None:
    """A Llama of random weights with ``rows`` embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer with every family's special tokens and ChatML."""
    made = train_tokenizer(SPECIALS, bos_token="<s>", eos_token="<|im_end|>")
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A chat model: weights, tokenizer, template."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    save_model(folder, len(tokenizer))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: no template, no control tokens."""
    folder = tmp_path_factory.mktemp("models") / "base"
    base = train_tokenizer(["<|endoftext|>"], eos_token="<|endoftext|>")
    save_model(folder, len(base))
    base.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the session, so that the packing check runs once for each architecture."""
    return tmp_path_factory.mktemp("cache")


def chat(question: str, answer: str) -> dict[str, Any]:
    """A row of one question and one answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def rows(count: int) -> list[dict[str, Any]]:
    """Rows of many lengths, each with its number in it."""
    return [chat(f"Question {n}?", f"Answer {n}" + " and the quick brown fox" * (n % 7)) for n in range(count)]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """Write records one a line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def make_run(tmp_path: Path, cache: Path) -> Callable[..., tuple[RunSpec, RunDir]]:
    """Write a ``run.json``; keywords go to ``task.data``, ``task.model``, or are ``ranks``, ``deepspeed``, ``seed``."""

    def make(model: str | Path, data: str | Path, name: str = "run", **more: Any) -> tuple[RunSpec, RunDir]:
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        here = Path(more.pop("cache", cache))
        spec = build_spec(root, str(model), str(data), here, **more)
        (root / "run.json").write_text(spec.to_json())
        return spec, RunDir(root)

    return make


def build_spec(root: Path, model: str, data: str, cache: Path, **more: Any) -> RunSpec:
    """A spec whose paths are ``model`` and ``data`` as given."""
    ranks, seed, template = more.pop("ranks", 1), more.pop("seed", 0), more.pop("chat_template", None)
    zero, trust = more.pop("deepspeed", {}), more.pop("trust_remote_code", False)
    revision, attention = more.pop("revision", None), more.pop("attention", "sdpa")
    held_out, method = more.get("held_out_path"), more.pop("method", {})
    about_model = {"path": model, "revision": revision, "chat_template": template, "attention": attention}
    task = {
        "model": {**about_model, "trust_remote_code": trust},
        "data": {"path": None if more.get("sources") else data, "max_length": 128, **more},
        "method": method,
        "batch": {"samples": ranks},
        "duration": {"steps": 1},
        "seed": seed,
    }
    paths = {"run": str(root), "model": model, "held_out": held_out, "chat_template": template}
    sources = [source["path"] for source in more.get("sources", [])]
    paths |= {"sources": sources} if sources else {"data": data}  # type: ignore[dict-item]
    placement = {
        "device": "cpu",
        "ranks_per_node": ranks,
        "deepspeed": {"train_batch_size": ranks, **zero},
        "paths": {**paths, "cache": str(cache)},
    }
    origin = {"recipe": "test", "version": "0"}
    return RunSpec.model_validate({"schema": 1, "name": "test", "task": task, "placement": placement, "origin": origin})


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[RunDir], str]:
    """Run prepare, which must fail as a user's mistake, and give its one line."""
    from galley.prepare.prepare import work
    from galley.ranks.stage import run_stage

    def run(directory: RunDir) -> str:
        capsys.readouterr()
        assert run_stage("prepare", work, [str(directory.spec)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        line = lines[-1]
        assert line.startswith("galley: "), lines
        assert "Traceback" not in "".join(lines)
        assert not directory.data_manifest.exists()
        return line.removeprefix("galley: ")

    return run
