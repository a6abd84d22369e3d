"""Recipes and profiles that multiply or nest without end, or are no files: one line, at once, with file and line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from galley_launch import cli
from galley_launch.base import devices

LEVELS = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 10))
BOMBS = {
    "nine levels of ten": "x0: &x0 [a, a, a, a, a, a, a, a, a, a]\n" + LEVELS,
    "two levels of twenty": f"a: &a [x]\nb: &b [{', '.join(['*a'] * 20)}]\nc: [{', '.join(['*b'] * 20)}]\n",
    "one list": f"a: &a [x]\nb: [{', '.join(['*a'] * 1000)}]\n",
    "maps": "a: &a {k: v}\n" + "".join(f"b{n}: {{p: *a, q: *a}}\n" for n in range(30)),
}
NESTS = {
    "flow lists": "about: " + "[" * 3000 + "]" * 3000 + "\n",
    "open flow lists": "about: " + "[" * 3000 + "\n",
    "flow maps": "about: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n",
    "block maps": "".join(f"{' ' * n}a:\n" for n in range(900)),
    "block lists": "about:\n  " + "- " * 3000 + "a\n",
    "keys": "? " * 2000 + "a\n",
    "tags": "about: !a " * 1 + "[" * 50 + "]" * 50 + "\n",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(devices, "visible", list)
    for name in ("recipes", "clusters"):
        (tmp_path / name).mkdir()
    (tmp_path / "good.yaml").write_text(
        "model: {path: org/m}\ndata: {path: org/d}\nbatch: {samples: 16}\nduration: {steps: 99}\n"
    )
    return tmp_path


def refusal(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command is refused within two seconds."""
    began = time.monotonic()
    assert cli.main(words.split()) == 2
    assert time.monotonic() - began < 5
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert len(err) <= 500
    return err


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_aliases_that_multiply(here: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "recipes" / "bomb.yaml").write_text(text)
    (here / "clusters" / "bomb.yaml").write_text(text)
    for words in ("plan bomb device=cpu ranks=1", "show bomb", "copy bomb x"):
        assert "recipes/bomb.yaml:" in (line := refusal(words, capsys))
        assert "not readable as YAML: more than 20 aliases (*name)" in line
    assert "clusters/bomb.yaml:" in refusal("plan good.yaml cluster=bomb", capsys)
    assert cli.main(["recipes"]) == 0
    assert "galley: note: recipes/bomb.yaml:" in capsys.readouterr().err


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", NESTS.values(), ids=NESTS)
def test_nesting_without_end(here: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "deep.yaml").write_text(text)
    (here / "clusters" / "deep.yaml").write_text(text)
    for words, place in (("plan deep.yaml", "deep.yaml:"), ("plan good.yaml cluster=deep", "clusters/deep.yaml:")):
        line = refusal(words, capsys)
        assert place in line
        assert "not readable as YAML" in line


def test_a_list_on_the_command_line_nests_no_deeper(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "targets" in refusal("plan good.yaml targets=" + "[" * 3000 + "]" * 3000, capsys)


def test_a_few_aliases_are_fine(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "good.yaml").write_text(
        "model: {path: &id org/m}\ndata: {path: *id}\nbatch: {samples: 16}\nduration: {steps: 99}\n"
    )
    assert cli.main(["plan", "good.yaml", "device=cpu", "ranks=1"]) == 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "device", "endless", "directory", "link"])
def test_a_recipe_or_profile_that_is_no_file(here: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("recipes", "clusters"):
        path = here / folder / "odd.yaml"
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "endless":
            with path.open("wb") as file:
                file.truncate(1 << 40)
        else:
            path.symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    refusal("plan odd", capsys)
    refusal("show odd", capsys)
    refusal("plan good.yaml cluster=odd", capsys)
    refusal("clusters odd", capsys)
    assert cli.main(["recipes"]) == 0
    assert "recipes/odd.yaml: cannot be read: " in capsys.readouterr().err
    cli.main(["clusters"])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err


LONG = "9" * 5000
"""More digits than Python's int() takes (4,300)."""


@pytest.mark.parametrize(
    "word",
    [f"{key}={LONG}" for key in (
        "steps", "seed", "batch.samples", "batch.tokens", "method.rank", "micro_batch", "threads", "profile", "ranks",
        "lr", "epochs", "gpus", "betas", "data.max_length", "cadence.keep", "deepspeed", "name", "init_from",
    )] + [f"gpus=0-{LONG}", f"steps=-{LONG}", f"steps={LONG}.0", f"lr=1e{LONG}", f"betas=[{LONG},1]"],
)  # fmt: skip
def test_numbers_of_more_digits_than_python_reads(here: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    key, _, value = word.partition("=")
    device = "" if key == "gpus" else "device=cpu" if key == "ranks" else "device=cpu ranks=1"
    line = refusal(f"plan good.yaml {device} {word}", capsys)
    assert "conversion" not in line
    assert "parse input" not in line
    if key in ("steps", "seed", "batch.samples", "method.rank") and value.isdigit():
        assert "99999999999999999999… has too many digits" in line


@pytest.mark.parametrize(
    "word", [f"nodes={LONG}", f"cluster.time={LONG}", f"cluster.time={LONG}:00:00", f"cluster.gpus_per_node={LONG}",
             f"cluster.memory={LONG}G", f"cluster.side.cores={LONG}", f"cluster.attempts={LONG}"]
)  # fmt: skip
def test_numbers_of_a_cluster(here: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(f"plan good.yaml cluster=venv {word}", capsys)
    assert "conversion" not in line
    assert "parse input" not in line


@pytest.mark.parametrize(
    "text", ["duration: {steps: X}", "seed: X", "batch: {samples: X}", "optimizer: {betas: [X, X]}"]
)
def test_numbers_in_yaml(here: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    key = text.partition(":")[0]
    kept = [line for line in (here / "good.yaml").read_text().splitlines() if not line.startswith(f"{key}:")]
    (here / "good.yaml").write_text("\n".join([*kept, text.replace("X", LONG)]) + "\n")
    line = refusal("plan good.yaml device=cpu ranks=1", capsys)
    assert "good.yaml: " in line
    assert "conversion" not in line
    assert "parse input" not in line


def test_numbers_in_a_deepspeed_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "ds.json").write_text(f'{{"train_batch_size": {LONG}}}')
    line = refusal("plan good.yaml device=cpu ranks=1 deepspeed=ds.json", capsys)
    assert "holds a number of more than 4,300 digits" in line
