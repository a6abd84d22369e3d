"""Model folders and GGUF files that were damaged: one line before anything is built, and no memory is taken."""

from __future__ import annotations

import json
import os
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
from fuzz import world

from galley.contract.errors import UserError
from galley.contract.headers import read_gguf, read_safetensors
from galley.prepare.configs import check_config
from galley.prepare.convert import convert_gguf
from galley.storage.weights import check_folder
from galley_launch.recipe import model_facts

SINGLE = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    world.model(tmp_path / "model")
    return tmp_path / "model"


def header(path: Path, body: Any, length: int | None = None, rest: bytes = b"") -> None:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + rest)


def entry(**more: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **more}}


def test_a_sound_folder_is_taken(folder: Path, tmp_path: Path) -> None:
    check_folder("model.path", folder)
    check_config(folder, trust=False)
    world.gguf(tmp_path / "m.gguf")
    assert read_gguf(tmp_path / "m.gguf")["tokenizer.ggml.tokens"] == 32
    assert model_facts.of_gguf(tmp_path / "m.gguf") == model_facts.Facts(64, 2, 32)


@pytest.mark.parametrize(
    ("body", "length", "message"),
    [
        ([], None, "not a JSON object"),
        (b"[" * 3000, None, "nests too deep"),
        (b'{"a":' * 100_000, None, "nests too deep"),
        (b"\xff{}", None, "utf-8"),
        ({}, 1 << 63, "cut short"),
        ({}, 2**64 - 1, "cut short"),
        ({"a": 1}, None, "says nothing usable about 'a'"),
        ({"a": []}, None, "says nothing usable about 'a'"),
        (entry(dtype=7), None, "says nothing usable about 'a'"),
        (entry(shape="2"), None, "no shape and offsets for 'a'"),
        (entry(shape=[-2]), None, "no shape and offsets for 'a'"),
        (entry(shape=[2.0]), None, "no shape and offsets for 'a'"),
        (entry(shape=[True]), None, "no shape and offsets for 'a'"),
        (entry(shape=[10**30]), None, "no shape and offsets for 'a'"),
        (entry(data_offsets=[8, 0]), None, "no shape and offsets for 'a'"),
        (entry(data_offsets=[0]), None, "no shape and offsets for 'a'"),
        (entry(data_offsets=None), None, "no shape and offsets for 'a'"),
        (entry(shape=[3]), None, "of [3] F32 has 8 bytes"),
        (entry(dtype="BF16"), None, "of [2] BF16 has 8 bytes"),
        (entry(data_offsets=[0, 8]), None, "bytes, but its header says"),
    ],
)
def test_headers_of_safetensors(folder: Path, body: Any, length: int | None, message: str) -> None:
    header(folder / SINGLE, body, length)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_safetensors(folder / SINGLE)
    with pytest.raises(UserError, match="is damaged: ") as caught:
        check_folder("model.path", folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", ["directory", "fifo", "link", "device"])
@pytest.mark.parametrize("name", [SINGLE, "model.safetensors.index.json", "config.json", "tokenizer.json"])
@pytest.mark.timeout(30)
def test_something_else_in_the_place_of_a_file(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/nowhere/at/all")
    if kind == "directory" and name == "tokenizer.json":
        check_folder("model.path", folder)  # no file of the weights; the tokenizer is looked for later
        return
    with pytest.raises(UserError, match=r"model\.path: "):
        check_folder("model.path", folder)


@pytest.mark.parametrize(
    "value",
    [[], {}, "x", {"weight_map": 5}, *({"weight_map": {"a": file}} for file in (5, "../b", "x" * 3000, "\0", ""))],
)
def test_indices(folder: Path, value: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"model\.path: "):
        check_folder("model.path", folder)


@pytest.mark.parametrize("text", ["[]", "5", '"x"', "null", "", "[" * 3000, '{"a":' * 3000, "\xff", "9" * 5000])
def test_configurations_that_are_no_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json' is not a JSON object"):
        check_folder("model.path", folder)
    with pytest.raises(UserError, match=r"config\.json is not"):
        model_facts.of_model(str(folder))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 2**31), ("num_hidden_layers", 1000), ("num_hidden_layers", "2"), ("num_hidden_layers", 0),
     ("num_hidden_layers", True), ("hidden_size", -1), ("hidden_size", 2**60), ("hidden_size", {}),
     ("vocab_size", "288"),
     ("rope_parameters", []), ("layer_types", ["x"]), ("eos_token_id", "x"), ("rms_norm_eps", "x"), ("auto_map", 7)],
)  # fmt: skip
def test_configurations_of_no_model(folder: Path, key: str, value: Any) -> None:
    """Building two thousand million layers would take all memory and time: their tensors are counted first."""
    body = world.CONFIG | {key: value}
    (folder / "config.json").write_text(json.dumps(body))
    check_folder("model.path", folder)
    with pytest.raises(UserError, match=r"model\.path: .*config\.json") as caught:
        check_config(folder, trust=False)
    assert len(str(caught.value)) < 500
    assert model_facts.of_model(str(folder)).vocab in (288, None)


def damaged_gguf(path: Path, old: bytes, new: bytes) -> Path:
    world.gguf(path)
    before = path.read_bytes()
    assert old in before
    path.write_bytes(before.replace(old, new, 1))
    return path


COUNT, LENGTH = struct.pack("<Q", 8), struct.pack("<Q", len("general.architecture"))
HUGE = [struct.pack("<Q", number) for number in (2**64 - 1, 2**63, 2**40, 10**9)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("huge", HUGE, ids=["2^64", "2^63", "2^40", "10^9"])
@pytest.mark.parametrize("place", ["tensors", "pairs", "key", "string", "array", "numbers", "arrays in arrays"])
def test_lengths_of_gguf_are_held_against_the_file(tmp_path: Path, place: str, huge: bytes) -> None:
    """Memory is not taken for what the file cannot hold."""
    array = struct.pack("<IQ", 8, 32)
    old, new = {
        "tensors": (struct.pack("<QQ", 0, 8), huge + COUNT),
        "pairs": (struct.pack("<QQ", 0, 8), struct.pack("<Q", 0) + huge),
        "key": (LENGTH + b"general.arch", huge + b"general.arch"),
        "string": (struct.pack("<IQ", 8, 5) + b"llama", struct.pack("<I", 8) + huge + b"llama"),
        "array": (array, struct.pack("<I", 8) + huge),
        "numbers": (struct.pack("<IQ", 6, 32), struct.pack("<I", 6) + huge),
        "arrays in arrays": (array, struct.pack("<I", 9) + huge),
    }[place]
    path = damaged_gguf(tmp_path / "m.gguf", old, new)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"cannot be read \("):
        model_facts.of_gguf(path)
    with pytest.raises(UserError, match="is not a complete GGUF file"):
        convert_gguf(path, tmp_path / "cache")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


@pytest.mark.parametrize("size", [0, 3, 4, 8, 20, 30, 100, 300])
def test_gguf_that_is_cut_short(tmp_path: Path, size: int) -> None:
    world.gguf(tmp_path / "m.gguf")
    os.truncate(tmp_path / "m.gguf", size)
    with pytest.raises(UserError, match="cannot be read"):
        model_facts.of_gguf(tmp_path / "m.gguf")
