"""The stage as a whole: what it writes, that it can be done again, killed, copied and raced."""

import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare.conftest import chat, rows, write_jsonl

import galley.prepare.arrays
import galley.prepare.formats.encode
import galley.prepare.formats.rendering
import galley.prepare.prepare
import galley.storage.cache
from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.columns import COLUMNS, IGNORED, Split
from galley.data.prepared import HELD_OUT, TRAIN, open_split, read_manifest, tokenizer_folder
from galley.prepare.prepare import model_folder as find_model
from galley.prepare.prepare import work, write_manifest

Make = Callable[..., tuple[RunSpec, RunDir]]
ROOT = Path(__file__).parents[2]


def prepare(spec: RunSpec, run: RunDir) -> None:
    work(spec, run, run.attempt(1))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npy")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows(300))


def texts(split: Split, tokenizer: Any) -> dict[int, tuple[str, str]]:
    """Source row to the document's text and its learnt text."""
    found = {}
    for index in range(len(split)):
        sample = split.sample(index)
        ends = [*sample.document_starts[1:], len(sample)]
        for start, end, source in zip(sample.document_starts, ends, sample.sources, strict=True):
            tokens, labels = sample.tokens[start:end], sample.labels[start:end]
            assert labels[0] == IGNORED
            assert sample.positions[start:end].tolist() == list(range(end - start))
            learnt = labels != IGNORED
            assert (labels[learnt] == tokens[learnt]).all()
            found[int(source)] = (tokenizer.decode(tokens), tokenizer.decode(tokens[learnt]))
    return found


def test_every_row_is_there_once_as_the_template_writes_it(make_run: Make, model_folder: Path, data: Path) -> None:
    from transformers import AutoTokenizer

    spec, run = make_run(model_folder, data, held_out=0.1)
    prepare(spec, run)
    manifest = read_manifest(run)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(run))
    train, held_out = open_split(run), open_split(run, HELD_OUT)
    found = texts(train, tokenizer) | texts(held_out, tokenizer)
    assert sorted(found) == list(range(300))
    for index, row in enumerate(rows(300)):
        answer = row["messages"][1]["content"]
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert found[index] == (text, f"{answer}<|im_end|>")
    assert manifest.held_out is not None
    assert (manifest.train.rows, manifest.held_out.rows) == (270, 30)
    for split, facts in ((train, manifest.train), (held_out, manifest.held_out)):
        assert (len(split), split.tokens_total, split.supervised_total) == (
            facts.samples,
            facts.tokens,
            facts.supervised,
        )
        assert split.supervised_total == int((split.labels != IGNORED).sum())
        assert split.lengths.max() == facts.longest <= 128
    assert manifest.packed
    assert manifest.train.tokens / (manifest.train.samples * 128) > 0.85
    assert manifest.model.eos_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_samples_name_their_supervised_tokens(make_run: Make, model_folder: Path, data: Path) -> None:
    spec, run = make_run(model_folder, data)
    prepare(spec, run)
    split = open_split(run)
    for index in range(len(split)):
        assert split.supervised[index] == (split.sample(index).labels != IGNORED).sum()
    with pytest.raises(IndexError):
        split.sample(len(split))
    assert read_manifest(run).held_out is None
    assert not (run.data / HELD_OUT).exists()


def test_again_is_quick_and_loads_nothing_heavy(make_run: Make, model_folder: Path, data: Path) -> None:
    spec, run = make_run(model_folder, data)
    prepare(spec, run)
    check = (
        "import sys; from galley.prepare.prepare import work; from galley.ranks.stage import run_stage\n"
        f"status = run_stage('prepare', work, [{str(run.spec)!r}])\n"
        "sys.exit(status or ', '.join({'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "data: ready" in done.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}


def test_the_same_task_gives_the_same_bytes(make_run: Make, model_folder: Path, data: Path, tmp_path: Path) -> None:
    one, two = (make_run(model_folder, data, name=name, cache=tmp_path / name, held_out=0.2) for name in "ab")
    for spec, run in (one, two):
        prepare(spec, run)
    assert contents(one[1].data) == contents(two[1].data)


def test_another_seed_gives_another_order(make_run: Make, model_folder: Path, data: Path) -> None:
    runs = [make_run(model_folder, data, name=f"seed{seed}", seed=seed, held_out=0.2) for seed in (1, 2)]
    for spec, run in runs:
        prepare(spec, run)
    sources = [open_split(run, HELD_OUT).sources.tolist() for _, run in runs]
    assert sorted(sources[0]) != sorted(sources[1])


def test_a_second_run_takes_what_the_cache_has(
    make_run: Make, model_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (
        make_run(model_folder, data, name="first", seed=77),
        make_run(model_folder, data, name="2nd", seed=77),
    )
    prepare(*first)
    assert "data: preparing" in capsys.readouterr().out
    prepare(*second)
    assert "data: preparing" not in capsys.readouterr().out
    one, two = (run.data / TRAIN / "tokens.npy" for _, run in (first, second))
    assert one.samefile(two)  # linked, not copied
    assert one.stat().st_mode & 0o222 == 0  # so neither is written to in place
    shutil.rmtree(first[1].root)
    assert two.is_file()


def test_not_packed_when_not_wanted(make_run: Make, model_folder: Path, data: Path) -> None:
    spec, run = make_run(model_folder, data, packing=False)
    prepare(spec, run)
    manifest, split = read_manifest(run), open_split(run)
    assert not manifest.packed
    assert manifest.packing_reason is None
    assert len(split) == manifest.train.documents == 300
    assert all(len(split.sample(index).document_starts) == 1 for index in range(300))


def test_how_an_adapter_begins_is_settled_once(make_run: Make, model_folder: Path, data: Path) -> None:
    from safetensors.torch import load_file

    spec, run = make_run(model_folder, data, method={"init": "pissa", "rank": 2})
    prepare(spec, run)
    began, when = load_file(run.adapter_init), run.adapter_init.stat().st_mtime_ns
    assert began
    assert all(2 in value.shape and value.abs().sum() > 0 for value in began.values())
    prepare(spec, run)
    assert run.adapter_init.stat().st_mtime_ns == when


def test_held_out_from_its_own_file(make_run: Make, model_folder: Path, data: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "held_out.jsonl", [chat("Q?", "Held.")] * 7)
    spec, run = make_run(model_folder, data, held_out_path=str(other))
    prepare(spec, run)
    manifest = read_manifest(run)
    assert manifest.held_out is not None
    assert (manifest.train.documents, manifest.held_out.documents) == (300, 7)
    assert {source.what for source in manifest.sources} == {"data", "held_out"}


def test_one_row_at_least_is_held_out(make_run: Make, model_folder: Path, tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", rows(3))
    spec, run = make_run(model_folder, few, held_out=0.01)
    prepare(spec, run)
    assert len(open_split(run, HELD_OUT).sources) == 1
    assert len(open_split(run).sources) == 2


@pytest.mark.parametrize("overlong", ["drop", "truncate", "truncate_left"])
def test_long_rows(make_run: Make, model_folder: Path, tmp_path: Path, overlong: str) -> None:
    records = [*rows(5), chat("Long?", "word " * 500), chat("long " * 500, "Never reached")]
    data = write_jsonl(tmp_path / "long.jsonl", records)
    spec, run = make_run(model_folder, data, overlong=overlong)
    prepare(spec, run)
    facts = read_manifest(run).train
    if overlong == "drop":
        assert (facts.documents, facts.dropped_overlong, facts.truncated) == (5, 2, 0)
    elif overlong == "truncate_left":  # the end of both is an answer
        assert (facts.documents, facts.truncated, facts.dropped_unsupervised, facts.longest) == (7, 2, 0, 128)
        labels = open_split(run).labels
        starts = COLUMNS["documents"].open(run.data / TRAIN)[:-1]
        assert (labels[starts] == IGNORED).all()
    else:
        assert (facts.documents, facts.truncated, facts.dropped_unsupervised, facts.longest) == (6, 1, 1, 128)


def test_a_long_row_is_refused_where_asked(
    make_run: Make, model_folder: Path, tmp_path: Path, refused: Callable[[RunDir], str]
) -> None:
    data = write_jsonl(tmp_path / "long.jsonl", [*rows(5), chat("Long?", "word " * 500), chat("?", "longer " * 900)])
    _, run = make_run(model_folder, data, overlong="refuse")
    line = refused(run)
    assert re.fullmatch(
        rf"{data}:6: has [\d,]+ tokens, more than data.max_length=128; "
        r"use data.max_length=(\d+), or data.overlong=drop or truncate",
        line,
    ), line


def test_blank_lines_count_as_lines(make_run: Make, model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "blank.jsonl"
    path.write_text("\n" + json.dumps(chat("a", "b")) + "\n\n  \n" + json.dumps(chat("c", "d")))
    spec, run = make_run(model_folder, path, packing=False)
    prepare(spec, run)
    assert sorted(open_split(run).sources) == [1, 4]


def test_copied_to_another_machine(
    make_run: Make, model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There the raw data is missing, the cache is empty, and the model lies elsewhere."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    raw = shutil.copy(data, tmp_path / "raw.jsonl")
    spec, run = make_run(model, raw, cache=tmp_path / "cache")
    prepare(spec, run)
    before = contents(run.data)
    there = RunDir(shutil.copytree(run.root, tmp_path / "there"))
    shutil.rmtree(model)
    shutil.rmtree(tmp_path / "cache")
    raw.unlink()
    moved, _ = make_run(model_folder, raw, name="unused", cache=tmp_path / "cache2")
    moved = moved.model_copy(update={"task": spec.task})
    prepare(moved, there)
    assert "is not on this machine" in capsys.readouterr().out
    assert contents(there.data) == before
    assert read_manifest(there).model.path == str(model_folder)


def test_another_model_in_its_place(
    make_run: Make, model_folder: Path, base_folder: Path, data: Path, refused: Any
) -> None:
    spec, run = make_run(model_folder, data)
    prepare(spec, run)
    manifest = read_manifest(run)
    lost = manifest.model.model_copy(update={"path": "/nowhere"})
    write_manifest(manifest.model_copy(update={"model": lost}), run)
    with pytest.raises(Exception, match="is not the model that the run began with"):
        prepare(with_model_path(spec, base_folder), run)


def with_model_path(spec: RunSpec, place: Path) -> RunSpec:
    paths = spec.placement.paths.model_copy(update={"model": str(place)})
    return spec.model_copy(update={"placement": spec.placement.model_copy(update={"paths": paths})})


def change(folder: Path) -> None:
    """As if another export had been put there: same sizes, other weights."""
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def test_a_model_that_changed_since(
    make_run: Make, model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    spec, run = make_run(model, data)
    prepare(spec, run)
    os.utime(model / "model.safetensors", (1, 1))
    prepare(spec, run)
    change(model)
    for again in (prepare, find_model):
        with pytest.raises(UserError) as caught:
            again(spec, run)
        assert str(caught.value) == (
            f"model.path: '{model}' changed since the run began; put it back as it was, or start a new run"
        )
    capsys.readouterr()
    assert find_model(with_model_path(spec, model_folder), run).model.path == str(model_folder)
    assert f"{model} changed since the run began, fetching it again" in capsys.readouterr().out


def test_a_model_with_added_rows_is_not_compared_with_itself_before(
    make_run: Make, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(base_folder, tmp_path / "model")
    spec, run = make_run(model, data, chat_template="chatml", cache=tmp_path / "cache")
    prepare(spec, run)
    grown = Path(read_manifest(run).model.path)
    assert grown.is_relative_to(tmp_path / "cache")
    prepare(spec, run)
    shutil.rmtree(grown)
    prepare(spec, run)
    assert read_manifest(run).model.path == str(grown)
    assert grown.is_dir()
    change(model)
    prepare(spec, run)  # what ranks load is in the cache, as it was
    shutil.rmtree(grown)
    with pytest.raises(UserError, match="is not the model that the run began with; bring that one here"):
        prepare(spec, run)


def test_a_model_that_is_nowhere_is_said_in_a_line(
    make_run: Make, model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, run = make_run(model_folder, data)
    with pytest.raises(UserError, match=r"manifest.json: is missing, .*; prepare the run's data: galley run$"):
        find_model(spec, run)
    model = shutil.copytree(model_folder, tmp_path / "model")
    spec, run = make_run(model, data)
    prepare(spec, run)
    (model / "model.safetensors").unlink()  # config.json alone is no model
    with pytest.raises(UserError, match=r"has no model\.safetensors and no index of shards"):
        find_model(spec, run)
    shutil.rmtree(model)
    with pytest.raises(UserError, match=f"^model.path: '{model}' does not exist; give a model's folder"):
        find_model(spec, run)
    assert find_model(with_model_path(spec, model_folder), run) == read_manifest(run)
    assert read_manifest(run).model.path == str(model_folder)

    def closed(_: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(galley.prepare.prepare, "fingerprint", closed)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\); check its permissions"):
        find_model(spec, run)


def test_data_that_changed_since(make_run: Make, model_folder: Path, tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", rows(5))
    spec, run = make_run(model_folder, raw)
    prepare(spec, run)
    os.utime(raw, (1, 1))  # the same content at another time is the same
    prepare(spec, run)
    raw.write_text(raw.read_text().replace("Answer 1", "Answer X"))
    with pytest.raises(Exception, match=r"raw.jsonl: changed since the run began; put it back"):
        prepare(spec, run)


def test_lost_arrays_are_made_again(make_run: Make, model_folder: Path, data: Path) -> None:
    spec, run = make_run(model_folder, data)
    prepare(spec, run)
    before = contents(run.data)
    (run.data / TRAIN / "labels.npy").unlink()
    prepare(spec, run)
    assert contents(run.data) == before


def test_a_base_model_gets_chatml_and_rows_to_train(make_run: Make, base_folder: Path, data: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec, run = make_run(base_folder, data, chat_template="chatml")
    prepare(spec, run)
    manifest = read_manifest(run)
    model = manifest.model
    assert model.added_tokens == ["<|im_start|>", "<|im_end|>"]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(run))
    assert model.added_token_ids == tokenizer.convert_tokens_to_ids(model.added_tokens)
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.eos_ids[0] == tokenizer.eos_token_id
    old, new = (AutoModelForCausalLM.from_pretrained(path) for path in (base_folder, model.path))
    assert model.vocab == new.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(old, part)().weight, getattr(new, part)().weight
        rows_before = len(before)
        assert torch.equal(before, after[:rows_before])
        mean = before.double().mean(0).float()
        assert torch.equal(after[rows_before:], mean.expand_as(after[rows_before:]))
    found = texts(open_split(run), tokenizer)
    assert found[0] == (
        "<|im_start|>user\nQuestion 0?<|im_end|>\n<|im_start|>assistant\nAnswer 0<|im_end|>\n",
        "Answer 0<|im_end|>",
    )


def test_a_template_of_ones_own(make_run: Make, base_folder: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|stop|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    spec, run = make_run(base_folder, data, chat_template=str(path))
    prepare(spec, run)
    manifest = read_manifest(run)
    assert manifest.model.added_tokens == ["<|stop|>", "<|assistant|>"]
    assert {source.what for source in manifest.sources} == {"data", "chat_template"}


def fork(target: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    """A child that has everything imported already."""
    child = multiprocessing.get_context("fork").Process(target=target, daemon=True)
    child.start()
    return child


# Reading, packing, writing, linking, syncing and renaming, each after a pause that is long enough to be hit.
PAUSED = [
    (galley.prepare.formats.rendering, "tokenize"),
    (galley.prepare.arrays, "write_split"),
    (galley.prepare.arrays, "pack"),
    (galley.prepare.formats.encode, "_copy"),
    (galley.storage.cache, "fsync_tree"),
    (galley.storage.cache, "_link"),
    (galley.storage.cache, "fsync_path"),
    (os, "replace"),
    (os, "fsync"),
]


def slowly(spec: RunSpec, run: RunDir) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def after_a_pause(whole: Callable[..., Any]) -> Callable[..., Any]:
        def paused(*args: Any, **more: Any) -> Any:
            time.sleep(0.01)
            return whole(*args, **more)

        return paused

    for module, name in PAUSED:
        setattr(module, name, after_a_pause(getattr(module, name)))
    prepare(spec, run)


def without_check(spec: RunSpec, cache: Path) -> None:
    """Bring the packing check's answer along: torch's threads do not survive a fork."""
    shutil.copytree(Path(spec.placement.paths.cache) / "isolation", cache / "isolation")


@pytest.mark.slow
def test_killed_at_any_moment(make_run: Make, model_folder: Path, data: Path, tmp_path: Path) -> None:
    """Whatever is left, nobody takes it for whole, and the next try completes."""
    spec, run = make_run(model_folder, data, cache=tmp_path / "cache", held_out=0.1)
    expected_spec, expected = make_run(model_folder, data, name="expected", held_out=0.1)
    prepare(expected_spec, expected)
    without_check(expected_spec, tmp_path / "cache")
    chance, completed, began = random.Random(0), 0, []
    for _ in range(12):
        child = fork(lambda: slowly(spec, run))
        child.join(chance.uniform(0.02, 1.2))
        completed += child.exitcode == 0
        began.append(any((tmp_path / "cache" / "data").glob(".*.tmp")))
        child.kill()
        child.join()
        if run.data_manifest.exists():
            assert contents(run.data) == contents(expected.data)
            run.data_manifest.unlink()
            shutil.rmtree(tmp_path / "cache" / "data", ignore_errors=True)
    assert any(began), "no child was killed in the middle"
    prepare(spec, run)
    assert contents(run.data) == contents(expected.data)
    assert not list((tmp_path / "cache" / "data").glob(".*.tmp"))


def test_two_runs_at_once(make_run: Make, model_folder: Path, data: Path, tmp_path: Path) -> None:
    runs = [make_run(model_folder, data, name=name, cache=tmp_path / "cache", seed=5) for name in ("one", "two")]
    first = make_run(model_folder, data, name="first")
    prepare(*first)
    without_check(first[0], tmp_path / "cache")
    children = [fork(lambda run=run: slowly(*run)) for run in runs]  # type: ignore[misc]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert contents(runs[0][1].data) == contents(runs[1][1].data)
    files = [run.data / TRAIN / "tokens.npy" for _, run in runs]
    assert files[0].samefile(files[1])  # one waited for the other, and both have the same entry


def test_a_split_is_mapped_not_read(make_run: Make, model_folder: Path, data: Path) -> None:
    spec, run = make_run(model_folder, data)
    prepare(spec, run)
    assert isinstance(open_split(run).tokens, np.memmap)
    assert np.shares_memory((split := open_split(run)).tokens, split.sample(0).tokens)
