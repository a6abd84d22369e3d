"""The GPUs and memory that a recipe needs, read from its file's header, and the search of ``galley recipes WORD``.

The standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_COUNTS = {"one": 1, "two": 2, "four": 4, "eight": 8, "sixteen": 16}
_COUNT = rf"(\d+|{'|'.join(_COUNTS)})"
# Headers are prose with a fixed form: "Needs two nodes of eight GPUs of 40 GB; …" and "about 6.5 GB on each GPU".
_GPUS = re.compile(rf"(?:{_COUNT} nodes of )?{_COUNT} GPUs? of (\d+) GB")
_MEMORY = re.compile(r"\babout (\d+(?:\.\d+)?) GB on each GPU")
# A number and its unit with a blank or hyphen between them ("24 GB", "4-bit" is not one), which is taken out.
_UNIT = re.compile(r"(\d)[ -]+(?=(?:gb?|b|k|nodes?|gpus?)\b)")
# Text in a recipe's row, and words that people search for instead.
_SYNONYMS = {
    "mixture of experts": "moe",
    "qlora": "4bit 4-bit nf4",
    "lora_int8": "8bit 8-bit",
    "nodes": "multinode multi-node cluster",
    "orders into json": "extraction structured",
}


@dataclass(frozen=True)
class Needs:
    """GPUs and memory as the table shows them; empty where the header does not have them."""

    gpus: str = ""
    """``1x8GB``; ``2x8x40GB`` are two nodes of eight."""
    memory: str = ""
    """What the recipe takes of each GPU: ``6.5GB``."""


def of_header(text: str) -> Needs:
    """The needs in the comment block at the beginning of a recipe's ``text``."""
    # Joined to one line first, because a sentence of the header may go over several.
    header = re.match(r"(?:#.*\n?)*", text)
    plain = " ".join(re.sub(r"^#", "", header[0] if header else "", flags=re.MULTILINE).split())
    _, _, needs = plain.partition("Needs ")
    gpus, memory = _GPUS.search(needs.partition(";")[0]), _MEMORY.search(plain)
    return Needs(_gpus(gpus) if gpus else "", f"{memory[1]}GB" if memory else "")


def _gpus(match: re.Match[str]) -> str:
    nodes, count, size = match.groups()
    numbers = [_COUNTS.get(word) or int(word) for word in (nodes, count) if word]
    return "x".join([*map(str, numbers), f"{size}GB"])


def _plain(text: str) -> str:
    """``24 GB`` and ``24GB`` alike, in small letters."""
    return _UNIT.sub(r"\1", text.lower())


def matches(words: tuple[str, ...], row: tuple[str, ...]) -> bool:
    """Whether every word occurs in ``row``. A word with a digit in front must begin a number: 8GB is not in 48 GB."""
    text = _plain(" ".join(row))
    text += "".join(f" {synonyms}" for phrase, synonyms in _SYNONYMS.items() if phrase in text)
    patterns = (re.escape(_plain(word.strip())) for word in words)
    return all(re.search(rf"(?<![\d.]){pattern}" if pattern[:1].isdigit() else pattern, text) for pattern in patterns)
