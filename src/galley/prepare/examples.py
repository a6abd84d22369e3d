"""Rows as they will be trained on, for a person to read before anything is: ``galley prepare`` prints some."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from galley.contract.rundir import RunDir
from galley.contract.text import plain
from galley.data.columns import I32, IGNORED, U32
from galley.data.prepared import Manifest, open_split, row_names, tokenizer_folder

LINES, WIDTH = 30, 160
"""Of one row: what is longer is left out in its middle."""


def examples(run: RunDir, manifest: Manifest, count: int) -> list[str]:
    """Lines that show ``count`` rows of the training split, spread over it: ``+`` before what is trained on.

    They are decoded from the prepared tokens, so they are what ranks read, special tokens included.
    """
    split = open_split(run)
    documents = len(split.documents) - 1
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(run))
    lines = []
    for index in np.unique(np.linspace(0, documents - 1, min(count, documents)).astype(int)):
        span = slice(int(split.documents[index]), int(split.documents[index + 1]))
        (name,) = row_names(manifest.train.shares, [int(split.sources[index])])
        counted = f"{int((split.labels[span] != IGNORED).sum()):,} of {span.stop - span.start:,} tokens"
        lines.append(f"data: row {name}: {counted} are trained on, those in lines with +")
        lines += _shortened(_marked(tokenizer, split.tokens[span], split.labels[span]))
    return lines


def _marked(tokenizer: PreTrainedTokenizerBase, tokens: U32, labels: I32) -> list[str]:
    """The text of one document, a line where it has one, and where training begins or ends."""
    lines: list[str] = []
    pairs = zip(tokens.tolist(), (labels != IGNORED).tolist(), strict=True)
    for trained, part in groupby(pairs, lambda pair: pair[1]):
        text = plain(str(tokenizer.decode([token for token, _ in part], skip_special_tokens=False)))
        # The line break after an end of turn is no line of its own.
        shown = text.removesuffix("\n").removeprefix("\n" if lines else "")
        lines += [f"{'+' if trained else ' '} {_fitting(line)}" for line in shown.split("\n") if shown]
    return lines


def _fitting(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[:WIDTH]} … {len(line) - WIDTH:,} characters more"


def _shortened(lines: list[str]) -> list[str]:
    if len(lines) <= LINES:
        return lines
    half = LINES // 2
    return [*lines[:half], f"  … {len(lines) - 2 * half:,} lines more …", *lines[-half:]]
