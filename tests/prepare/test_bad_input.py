"""Every mistake that prepare can meet: one line that says where, what and what to do, and nothing prepared."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare.conftest import chat, rows, save_model, train_tokenizer, write_jsonl

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec

Make = Callable[..., tuple[RunSpec, RunDir]]
Refused = Callable[[RunDir], str]
ANSWER = {"role": "assistant", "content": "b"}

BAD_ROWS = [
    ("not json", "x.jsonl:2: not JSON: "),
    ('{"messages": [', "x.jsonl:2: not JSON: "),
    ("[1, 2]", "x.jsonl:2: not a conversation: a list, not an object"),
    ('"text"', "x.jsonl:2: not a conversation: a string, not an object"),
    ("{}", "x.jsonl:2: not a conversation: no `messages`, only nothing"),
    (
        '{"conversations": [], "id": 1}',
        "x.jsonl:2: is a row of the format sharegpt, not of chat; put rows",
    ),
    ('{"messages": "hello"}', "x.jsonl:2: not a conversation: `messages` is a string"),
    ('{"messages": []}', "x.jsonl:2: not a conversation: `messages` is an empty list"),
    ('{"messages": ["a"]}', "x.jsonl:2: not a conversation: messages[0] is a string, not an object"),
    (
        '{"messages": [{"role": "user", "content": "a"}]}',
        "x.jsonl:2: not a conversation: no message has the role",
    ),
    (json.dumps({"messages": [{"role": "human", "content": "a"}, ANSWER]}), "messages[0] has role 'human', not one of"),
    (json.dumps({"messages": [{"content": "a"}, ANSWER]}), "messages[0] has role None, not one of"),
    (json.dumps({"messages": [{"role": "user"}, ANSWER]}), "messages[0] has no content"),
    (json.dumps({"messages": [{"role": "user", "content": 3}, ANSWER]}), "messages[0] has content that is a number"),
    (
        json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}, ANSWER]}),
        "messages[0] has content with a part that is not text: 'image'",
    ),
    (json.dumps({"messages": [ANSWER], "tools": {"a": 1}}), "`tools` is an object, not a list of objects"),
]


@pytest.mark.parametrize(("line", "expected"), BAD_ROWS, ids=[line[:30] for line, _ in BAD_ROWS])
def test_a_row_that_is_not_a_conversation(
    make_run: Make, model_folder: Path, tmp_path: Path, refused: Refused, line: str, expected: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(chat("a", "b")) + "\n" + line + "\n")
    said = refused(make_run(model_folder, path)[1])
    assert expected in said
    assert said.startswith(f"{path}:2: ")


def test_a_file_that_is_not_utf8(make_run: Make, model_folder: Path, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(chat("a", "b")).encode() + b"\n\xff\xfe\n")
    assert refused(make_run(model_folder, path)[1]).startswith(f"{path}:2: not UTF-8: invalid start byte at byte 0")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_data(make_run: Make, model_folder: Path, tmp_path: Path, refused: Refused, content: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    assert refused(make_run(model_folder, path)[1]) == (
        f"data.path: '{path}' holds no rows; give one with conversations"
    )


def test_data_that_is_missing_or_a_folder(make_run: Make, model_folder: Path, tmp_path: Path, refused: Refused) -> None:
    missing = tmp_path / "no.jsonl"
    assert refused(make_run(model_folder, missing)[1]) == (
        f"data.path: '{missing}' does not exist; give the path of a file or folder"
    )
    (tmp_path / "empty").mkdir()
    line = refused(make_run(model_folder, tmp_path / "empty")[1])
    assert line.startswith(f"{tmp_path}/empty: is a folder without files of rows; give one with .jsonl")
    some = write_jsonl(tmp_path / "some.jsonl", rows(3))
    said = refused(make_run(model_folder, some, held_out_path=str(missing))[1])
    assert said.startswith(f"data.held_out_path: '{missing}' does not exist")


def test_every_token_masked(make_run: Make, model_folder: Path, tmp_path: Path, refused: Refused) -> None:
    template = tmp_path / "masks.jinja"
    # It writes an answer otherwise as soon as it stands in a conversation that has a system prompt.
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' and messages[0].role == 'system' %}"
        "{{ messages | length }}{% endif %}{{ m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt and messages[0].role == 'system' %}!{% endif %}"
    )
    record = {"messages": [{"role": "system", "content": "s"}, *chat("a", "b")["messages"]]}
    path = write_jsonl(tmp_path / "x.jsonl", [record] * 3)
    said = refused(make_run(model_folder, path, chat_template=str(template))[1])
    assert said.startswith(f"data.path: every token of every row of '{path}' is masked; ")


def test_no_row_fits(make_run: Make, model_folder: Path, tmp_path: Path, refused: Refused) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [chat("a", "word " * 100), chat("a", "word " * 200)])
    said = refused(make_run(model_folder, path, max_length=16)[1])
    found = re.fullmatch(
        rf"data.max_length: no row of '{path}' fits into 16 tokens: the shortest has (\d+); "
        r"use data.max_length=(\d+) to keep all, or data.overlong=truncate",
        said,
    )
    assert found, said
    shortest, longest = map(int, found.groups())
    assert 100 < shortest < longest


def test_nothing_left_to_train_on(make_run: Make, model_folder: Path, tmp_path: Path, refused: Refused) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [chat("a", "b")])
    said = refused(make_run(model_folder, path, held_out=0.5)[1])
    assert said == "data.held_out: 0.5 of 1 rows leaves none to train on; give more rows, or use data.held_out=0"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", rows(5))


def without(source: Path, target: Path, *names: str) -> Path:
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns(*names)))


def test_a_model_that_is_missing(make_run: Make, data: Path, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "no"
    assert refused(make_run(path, data)[1]) == (
        f"model.path: '{path}' does not exist; give a model's folder, a .gguf file or a hub id"
    )
    assert "is a file" in refused(make_run(data, data)[1])
    assert "does not exist" in refused(make_run(tmp_path / "no.gguf", data)[1])


def test_a_model_folder_without_weights(
    make_run: Make, model_folder: Path, data: Path, tmp_path: Path, refused: Refused
) -> None:
    folder = without(model_folder, tmp_path / "model", "*.safetensors")
    said = refused(make_run(folder, data)[1])
    assert said == (
        f"model.path: '{folder}' has no model.safetensors and no index of shards; give a folder with safetensors"
    )
    (folder / "pytorch_model.bin").touch()
    assert "but pytorch_model.bin, a pickle, which could run code" in refused(make_run(folder, data)[1])
    (folder / "consolidated.safetensors").touch()
    assert "but consolidated.safetensors; give the folder as save_pretrained" in refused(make_run(folder, data)[1])
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert "model-1.safetensors' is missing, though the index lists it" in refused(make_run(folder, data)[1])


def test_a_damaged_model(make_run: Make, model_folder: Path, data: Path, tmp_path: Path, refused: Refused) -> None:
    folder = without(model_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is damaged: " in refused(make_run(folder, data)[1])
    weights.write_bytes(b"<html>not found</html>")
    assert "is damaged: " in refused(make_run(folder, data)[1])
    (folder / "config.json").write_text("[]")
    assert "config.json' is not a JSON object" in refused(make_run(folder, data)[1])
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(make_run(folder, data)[1])
    (folder / "adapter_config.json").touch()
    assert "is an adapter, not a model" in refused(make_run(folder, data)[1])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, " (fp8)"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}}, " (gptq)"),
        ({"compression_config": {"format": "int-quantized"}}, ""),
    ],
)
def test_a_model_that_is_already_quantised(
    make_run: Make, model_folder: Path, data: Path, tmp_path: Path, refused: Refused, changes: Any, named: str
) -> None:
    folder = without(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert refused(make_run(folder, data)[1]) == (
        f"model.path: '{folder}' is already quantised{named}; "
        "take the unquantised model (method.kind=qlora quantises it itself)"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "novel"}, "transformers does not know the model type 'novel'; update transformers"),
        (
            {"model_type": "novel", "auto_map": {"AutoConfig": "code.Config"}},
            "needs Python code from its repository; read that code, then set model.trust_remote_code=true",
        ),
        ({"model_type": "vit"}, "a vit model is not a causal language model"),
    ],
)
def test_an_architecture_that_is_unknown(
    make_run: Make, model_folder: Path, data: Path, tmp_path: Path, refused: Refused, changes: Any, expected: str
) -> None:
    folder = without(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert expected in refused(make_run(folder, data)[1])


def test_a_base_model_without_a_template(make_run: Make, base_folder: Path, data: Path, refused: Refused) -> None:
    assert refused(make_run(base_folder, data)[1]) == (
        f"model.chat_template: '{base_folder}' brings none, as base models do; use model.chat_template=chatml"
    )
    said = refused(make_run(base_folder, data, chat_template="chatlm")[1])
    assert said.startswith("model.chat_template: 'chatlm' cannot be read")
    assert said.endswith("give chatml or a .jinja file")


def test_a_model_without_a_tokenizer(
    make_run: Make, model_folder: Path, data: Path, tmp_path: Path, refused: Refused
) -> None:
    folder = without(model_folder, tmp_path / "model", "tokenizer*", "*.jinja")
    said = refused(make_run(folder, data)[1])
    assert said.startswith(f"model.path: '{folder}' has no tokenizer that loads (")


def test_a_tokenizer_of_another_model(
    make_run: Make, tokenizer: Any, data: Path, tmp_path: Path, refused: Refused
) -> None:
    folder = tmp_path / "model"
    save_model(folder, rows=100)
    tokenizer.save_pretrained(folder)
    said = refused(make_run(folder, data)[1])
    assert "but the model has 100 embeddings; take the tokenizer that belongs to it" in said


def test_a_row_that_the_template_refuses(
    make_run: Make, model_folder: Path, data: Path, tmp_path: Path, refused: Refused
) -> None:
    folder = without(model_folder, tmp_path / "model")
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    own = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(strict + own)
    record = {"messages": [{"role": "system", "content": "s"}, *chat("a", "b")["messages"]]}
    path = write_jsonl(tmp_path / "x.jsonl", [*rows(2), record])
    assert refused(make_run(folder, path)[1]) == (
        f"{path}:3: the chat template refuses this conversation: no system prompt; "
        "move the system message's text into the first user message (data.refused_rows=merge does), or use another "
        "model.chat_template"
    )


def test_an_attention_that_the_model_lacks(make_run: Make, data: Path, tmp_path: Path, refused: Refused) -> None:
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    tokenizer = train_tokenizer(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    folder = tmp_path / "model"
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    BloomForCausalLM._from_config(config, attn_implementation="eager").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = refused(make_run(folder, data, chat_template="chatml")[1])
    assert said == "model.attention: a bloom model has no sdpa attention; use model.attention=eager"


def test_a_failed_preparation_leaves_its_reason(
    make_run: Make, model_folder: Path, tmp_path: Path, refused: Refused
) -> None:
    _, run = make_run(model_folder, tmp_path / "no.jsonl")
    said = refused(run)
    (error,) = run.attempt(1).errors()
    assert (error["who"], error["status"], error["message"]) == ("prepare", 2, said)
