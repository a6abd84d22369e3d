"""What a recipe needs, as its file's header says it, and the words by which it is found. The standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass

_COUNTS = {"one": 1, "two": 2, "four": 4, "eight": 8, "sixteen": 16}
_COUNT = rf"(\d+|{'|'.join(_COUNTS)})"
_GPUS = re.compile(rf"(?:{_COUNT} nodes of )?{_COUNT} GPUs? of (\d+) GB")
_MEMORY = re.compile(r"\babout (\d+(?:\.\d+)?) GB on each GPU")
_UNIT = re.compile(r"(\d)[ -]+(?=(?:gb?|b|k|nodes?|gpus?)\b)")
# What people ask for, where a recipe's own words are others.
_SYNONYMS = {
    "mixture of experts": "moe",
    "qlora": "4bit 4-bit nf4",
    "lora_int8": "8bit 8-bit",
    "nodes": "multinode multi-node cluster",
    "orders into json": "extraction structured",
}


@dataclass(frozen=True)
class Needs:
    """GPUs and memory, in the words of a table; empty where the header does not say."""

    gpus: str = ""
    """``1x8GB``; ``2x8x40GB`` are two nodes of eight."""
    memory: str = ""
    """What the recipe takes of each GPU: ``6.5GB``."""


def of_header(text: str) -> Needs:
    """What the comment block at the beginning of a recipe's ``text`` says."""
    header = re.match(r"(?:#.*\n?)*", text)
    plain = " ".join(re.sub(r"^#", "", header[0] if header else "", flags=re.MULTILINE).split())
    _, _, needs = plain.partition("Needs ")
    gpus, memory = _GPUS.search(needs.partition(";")[0]), _MEMORY.search(plain)
    return Needs(_gpus(gpus) if gpus else "", f"{memory[1]}GB" if memory else "")


def _gpus(found: re.Match[str]) -> str:
    nodes, count, size = found.groups()
    numbers = [_COUNTS.get(word) or int(word) for word in (nodes, count) if word]
    return "x".join([*map(str, numbers), f"{size}GB"])


def _plain(text: str) -> str:
    """``24 GB`` and ``24GB`` alike, in small letters."""
    return _UNIT.sub(r"\1", text.lower())


def matches(words: tuple[str, ...], row: tuple[str, ...]) -> bool:
    """Whether every word occurs in ``row``: a number of its own, ``8GB``, is not found in ``48 GB``."""
    text = _plain(" ".join(row))
    text += "".join(f" {more}" for said, more in _SYNONYMS.items() if said in text)
    patterns = (re.escape(_plain(word.strip())) for word in words)
    return all(re.search(rf"(?<![\d.]){each}" if each[:1].isdigit() else each, text) for each in patterns)
