"""What a benchmark without a network needs: a Llama with random weights, a byte-level tokenizer, rows of known length.

Speed and memory depend on shapes, not on what a model has learnt. A row is plain text of ``tokens - 1`` characters of
random words: with one token for each byte and the end-of-sequence token it is exactly ``tokens`` long, so that rows of
a quarter of a sample's length fill samples without padding.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

END = "<|end|>"
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
"""Llama-3.1-8B (its ``config.json``): 8,030,261,248 weights."""
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
"""SmolLM2-135M (its ``config.json``): 134,515,008 weights."""
TOY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
"""Two small layers: seconds on a CPU."""


def write_model(folder: Path, shape: dict[str, Any], device: str = "cpu") -> Path:
    """A Llama of ``shape`` in bf16 with the tokenizer, as safetensors; what is there already is kept.

    ``device`` draws the weights: eight billion take a second on a GPU and minutes on a CPU.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if (folder / "tokenizer.json").is_file():  # written last
        return folder
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=256, pad_token_id=None)
    torch.manual_seed(7)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """One token for each byte, and one for a text's end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END)


def write_rows(path: Path, count: int, tokens: int) -> Path:
    """``count`` rows of plain text of ``tokens`` tokens each, the end-of-sequence token included, as JSON lines."""
    rng = random.Random(7)
    rows = (json.dumps({"text": _text(rng, tokens - 1)}) for _ in range(count))
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return path


def _text(rng: random.Random, size: int) -> str:
    words: list[str] = []
    while sum(map(len, words)) + len(words) <= size:
        words.append("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))))
    return " ".join(words)[:size]
