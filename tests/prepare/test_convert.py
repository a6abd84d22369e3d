"""GGUF to safetensors: once for each content, with tokenizer and template."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare.conftest import CHATML, rows, train_tokenizer, write_jsonl

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.prepared import open_split, read_manifest
from galley.prepare.convert import convert_gguf
from galley.prepare.prepare import work

WIDTH, HEADS, FEED = 32, 4, 64


def write_gguf(path: Path) -> None:
    """A Llama of two layers, in full precision, with the vocabulary and merges of a small tokenizer."""
    import gguf

    tokenizer = train_tokenizer(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(names))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([3 if name.startswith("<|") else 1 for name in names])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(names.index("<|im_end|>"))
    writer.add_bos_token_id(names.index("<|im_start|>"))
    writer.add_chat_template(CHATML)
    for name, shape in tensors(len(names)).items():
        writer.add_tensor(name, np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, WIDTH), "output_norm.weight": (WIDTH,)}
    shapes["output.weight"] = (vocabulary, WIDTH)
    for layer in range(2):
        parts: dict[str, tuple[int, ...]] = {f"attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
        parts |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "ffn_down": (WIDTH, FEED)}
        parts |= {"ffn_gate": (FEED, WIDTH), "ffn_up": (FEED, WIDTH)}
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return shapes


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def test_a_gguf_is_converted_once(
    make_run: Callable[..., tuple[RunSpec, RunDir]], gguf_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    data = write_jsonl(tmp_path / "rows.jsonl", rows(5))
    spec, run = make_run(gguf_file, data)
    work(spec, run, run.attempt(1))
    model = read_manifest(run).model
    assert model.source == str(gguf_file)
    weights: Any = AutoModelForCausalLM.from_pretrained(model.path)
    assert {str(each.dtype) for each in weights.parameters()} == {"torch.bfloat16"}
    assert "quantization_config" not in json.loads((Path(model.path) / "config.json").read_text())
    assert (model.hidden_size, model.layers) == (WIDTH, 2)
    assert len(open_split(run).sources) == 5
    capsys.readouterr()
    again, other = make_run(shutil.copy(gguf_file, tmp_path / "renamed.gguf"), data, name="other")
    work(again, other, other.attempt(1))
    assert "converting" not in capsys.readouterr().out
    assert read_manifest(other).model.path == model.path


def test_the_weights_are_those_of_the_file(gguf_file: Path, cache: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = convert_gguf(gguf_file, cache)
    expected = np.random.default_rng(0).normal(0, 0.1, (FEED, WIDTH)).astype(np.float32)
    found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").model.layers[1].mlp.up_proj.weight
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2**-8)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"<html>")
    with pytest.raises(UserError, match="is not a GGUF file; download it again"):
        convert_gguf(path, tmp_path)
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(UserError, match="is not a complete GGUF file: GGUF version 0"):
        convert_gguf(path, tmp_path)
    assert list(tmp_path.glob("models/*/")) == []
