"""What is known of a model without loading it."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from galley.contract.errors import UserError
from galley_launch.recipe import catalogue, model_facts
from galley_launch.recipe.model_facts import Facts
from launch import sizes


def test_a_gguf_header_gives_the_facts(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(_gguf())
    assert model_facts.of_model(str(path)) == Facts(hidden_size=576, layers=30, vocab=3)


def test_a_broken_gguf_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(_gguf()[:40])
    with pytest.raises(UserError, match="cannot be read"):
        model_facts.of_model(str(path))
    path.write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match="is not a GGUF file"):
        model_facts.of_model(str(path))


def _gguf() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    tokens = struct.pack("<IIQ", 9, 8, 3) + text("a") + text("bb") + text("ccc")
    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.rope.scale") + struct.pack("<If", 6, 1.0),
        text("llama.embedding_length") + struct.pack("<II", 4, 576),
        text("llama.block_count") + struct.pack("<II", 4, 30),
        text("tokenizer.ggml.scores") + struct.pack("<IIQ3f", 9, 6, 3, 0, 0, 0),
        text("tokenizer.ggml.tokens") + tokens,
        text("tokenizer.ggml.merges") + b"never read",
    ]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}, Facts(64, 2, 100)),
        ({"n_embd": 64, "n_layer": 2, "vocab_size": 100}, Facts(64, 2, 100)),
        ({"text_config": {"hidden_size": 64}, "hidden_size": None}, Facts(64)),
    ],
)
def test_a_config_gives_the_facts(config: dict[str, Any], found: Facts, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_facts.of_model(str(tmp_path)) == found


def test_a_model_that_was_downloaded_before_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--org--model" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 64}')
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert model_facts.of_model("org/model").hidden_size == 64
    assert model_facts.of_model("org/other") == Facts()


def test_the_table_knows_the_models_of_every_recipe() -> None:
    for path in catalogue.recipes().values():
        assert catalogue.read(path).tree["model"]["path"] in model_facts.table()


@pytest.mark.parametrize("model", sorted(model_facts.table()))
def test_the_number_of_parameters_follows_from_the_shapes(model: str) -> None:
    """To the last one: the stated numbers are those of the hub's files."""
    shapes = model_facts.table()[model]
    assert sizes.parameters(shapes) == shapes["parameters"]
    assert model_facts.of_model(model) == Facts(
        *(shapes[name] for name in ("hidden_size", "layers", "vocab", "parameters"))
    )
