"""The sweep over architectures tells what passed from what was refused and what failed; a few of them in each run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from architectures.sweep import PRELOAD, page, sweep, try_one
from ranks import Ranks

FEW = {
    "llama": ("passed", ""), "gpt2": ("passed", ""), "llama4_text": ("passed", ""), "mamba": ("passed", ""),
    "opt": ("passed", ""), "falcon": ("passed", ""), "cwm": ("passed", ""), "bloom": ("passed", ""),
    "bert": ("refused", "is bidirectional"), "blt": ("no twin", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def forked() -> Iterator[Ranks]:
    server = Ranks(preload=PRELOAD)
    yield server
    server.close()


@pytest.mark.long
@pytest.mark.parametrize("kind", list(FEW))
def test_an_architecture_passes_or_is_refused_in_one_line(kind: str, forked: Ranks, tmp_path: Path) -> None:
    row = try_one(forked, kind, tmp_path)
    assert (row["outcome"], FEW[kind][1] in row["line"]) == (FEW[kind][0], True), row


def test_what_is_known_is_not_tried_again_and_is_told(tmp_path: Path) -> None:
    rows = [
        {"kind": "one", "outcome": "passed", "stage": "", "line": "", "packed": True, "seconds": 1.2},
        {"kind": "two", "outcome": "failed", "stage": "train", "line": "Error: a|b in /tmp/x/run/y", "seconds": 3.0},
    ]
    known = tmp_path / "known.jsonl"
    known.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sweep(known, 1, ["one", "two"])
    assert found == rows
    lines = page(found, 5).splitlines()
    assert "2 of 5 tried: 1 passed, 0 refused in one line, 0 of which transformers makes no small model, 1 failed." in (
        " ".join(lines)
    )
    assert lines[-2:] == [
        "| two | failed train |  | 3 | Error: a\\|b in run/y |",
        "| one | passed | yes | 1 |  |",
    ]
