"""Damage to valid inputs, drawn from a seeded generator: to values, texts, bytes and files."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

RAW = {
    "@@digits@@": "9" * 4301, "@@minus@@": "-" + "7" * 5000, "@@deep@@": "[" * 3000 + "]" * 3000,
    "@@objects@@": '{"a":' * 3000 + "1" + "}" * 3000, "@@float@@": "1e999", "@@nan@@": "NaN",
}  # fmt: skip
"""Values that Python's own writers refuse, by the word that stands for them until they are written."""
ODD: list[Any] = [
    None, True, False, "", "x", "null", "auto", "Auto", "true", "1e-4", "0x10", -1, 0, 1, 2**31, 2**63, 2**64, 1e308,
    0.5,
    float("nan"), float("inf"), float("-inf"), [], {}, [[]], [None], {"a": 1}, {"": None}, ["a", 1], "\ud800",
    "a\udc80b",
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x00", "\x85", "\u202egnp.exe", "\u2066a\u2069", "a\nb", "a\r\nb",
    "a\tb",
    "\u2028", "x" * 3000, "é" * 700, "日本" * 300, "../../etc/passwd", "/dev/zero", "/dev/stdin", "~", "$HOME", "a b",
    "%s %(x)s", "{0} {x}", "{{ x }}", "'; rm -rf /", "--help", "-1", "1_000", "٣", "１２", "1e5000", *RAW,
]  # fmt: skip
TEXTS = [
    "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(9)
    ),
    "x: " + "[" * 3000, "x: " + "[" * 3000 + "]" * 3000, "- " * 3000, "? " * 2000, "a: {b: " * 1500,
    "".join(f"{' ' * n}a:\n" for n in range(1200)), "&a [*a]", "a: &a {b: *a}", "<<: {a: 1}", "<<: *b",
    "!!python/object/apply:os.system [id]", "a: !!python/name:os.system", "!!binary aGk=", "!!set {a, b}", "a: !!int x",
    "--- a\n--- b\n", "%YAML 9.9\n---\na: 1", "%TAG ! tag:x,2000:\n---\n!a b", "a: b: c", "\ta: 1", "a: 'x", 'a: "\\x',
    "[1, 2", "{", "}", "]", "'", '"', "@", "`", "%", "a: |\n  " + "x" * 5000, "a: >-1\n x", "? [a, b]\n: c",
    "? {a: b}\n: c",
    "null", "~", "[]", "42", "true", "a", "---", "...", "# only a comment", "\ufeffa: 1", "a: \x07", "a: \u202e",
    "a\u2028: 1",
]  # fmt: skip


def value(rng: random.Random, tree: Any) -> Any:
    """A copy of a tree of JSON values with one thing dropped, doubled, renamed, retyped or nested."""
    tree = deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    action = rng.choice(("drop", "odd", "odd", "odd", "odd", "nest", "rename", "double", "swap"))
    if action == "drop":
        del holder[key]
    elif action == "nest":
        holder[key] = rng.choice(({"a": holder[key]}, [holder[key]], [[[holder[key]]] * 2]))
    elif action == "rename" and isinstance(holder, dict):
        holder[rng.choice([str(key)[:-1], f"{key}s", f"{key}.x", *map(str, filter(_short, ODD))])] = holder.pop(key)
    elif action == "double" and isinstance(holder, list):
        holder[key:key] = [holder[key]] * rng.choice((1, 3, 400))
    elif action == "swap":
        other, place = rng.choice(places)
        holder[key], other[place] = deepcopy(other[place]), deepcopy(holder[key])
    else:
        holder[key] = deepcopy(rng.choice(ODD))
    return tree


def _short(each: Any) -> bool:
    return isinstance(each, str) and len(each) < 40


def _places(tree: Any, depth: int = 0) -> Any:
    """Every place below ``tree`` that holds a value: its holder, and its key there."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, below in list(items)[:60] if depth < 8 else ():
        yield tree, key
        yield from _places(below, depth + 1)


def raw(text: str) -> str:
    """``text`` with what the words of :data:`RAW` stand for."""
    return re.sub(r"[\"']?(@@\w+@@)[\"']?", lambda found: RAW.get(found[1], found[1]), text)


def as_json(tree: Any) -> bytes:
    """JSON; halves of characters as escapes."""
    return raw(json.dumps(tree)).encode()


def as_yaml(tree: Any) -> bytes:
    """YAML, as people write it."""
    return raw(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)).encode("utf-8", "surrogatepass")


def text(rng: random.Random, before: bytes) -> bytes:
    """A text put in place of another, before or behind it, or into one of its lines."""
    odd = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    lines = before.splitlines(keepends=True)
    at = rng.randrange(len(lines) + 1)
    match rng.randrange(5):
        case 0:
            return odd
        case 1:
            return before + b"\n" + odd
        case 2:
            return b"".join([*lines[:at], odd, b"\n", *lines[at:]])
        case 3:
            return b"".join(lines[:at] + lines[at + 1 :])
        case _:
            return b"".join(lines[:at] + lines[max(0, at - 1) :])


def octets(rng: random.Random, before: bytes) -> bytes:
    """Bytes that were cut, flipped, doubled, put in, zeroed, or read in another encoding."""
    at = rng.randrange(len(before) + 1)
    end = min(len(before), at + rng.choice((1, 2, 8, 64, 1000)))
    match rng.randrange(11):
        case 0:
            return before[:at]
        case 1:
            flipped = bytearray(before)
            for _ in range(rng.choice((1, 1, 3, 20))):
                if flipped:
                    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 2:
            return before[:at] + before[at:end] * rng.choice((2, 50)) + before[end:]
        case 3:
            return before[:at] + rng.randbytes(rng.choice((1, 4, 16))) + before[at:]
        case 4:
            return before[:at] + b"\xff" * (end - at) + before[end:]
        case 5:
            return before[:at] + bytes(end - at) + before[end:]
        case 6:
            return before.decode("latin-1").encode("utf-16")
        case 7:
            return b"\xef\xbb\xbf" + before
        case 8:
            return b""
        case 9:
            return rng.choice([each for each in ODD if isinstance(each, str)]).encode("utf-8", "surrogatepass")
        case _:
            return (
                before[:at] + rng.choice((b"\x1b[2J", b"\xed\xa0\x80", "\u202e".encode(), b"\x00", b"\r")) + before[at:]
            )


def place(rng: random.Random, path: Path) -> str:
    """Put something else in the place of a file, or of a folder; returns what."""
    what = rng.choice(("directory", "fifo", "nothing", "link to nothing", "link to a device", "link to itself", "huge"))
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    match what:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link to nothing":
            path.symlink_to("/nowhere/at/all")
        case "link to a device":
            path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/tty")))
        case "link to itself":
            path.symlink_to(path.name)
        case "huge":
            with path.open("wb") as file:
                file.truncate(1 << 40)
    return what


def file(rng: random.Random, path: Path) -> str:
    """Damage a file by what it holds; returns what was done."""
    dice = rng.random()
    if dice < 0.12 or not path.is_file():
        return f"{path.name}: {place(rng, path)}"
    before = path.read_bytes()
    if path.suffix == ".json" and dice < 0.75:
        after, what = as_json(value(rng, json.loads(before))), "value"
    elif path.suffix == ".yaml" and dice < 0.6:
        after, what = as_yaml(value(rng, yaml.safe_load(before))), "value"
    elif path.suffix == ".jsonl" and before.strip() and dice < 0.75:
        rows = before.splitlines()
        at = rng.randrange(len(rows))
        rows[at] = as_json(value(rng, json.loads(rows[at])))
        after, what = b"\n".join(rows) + b"\n", f"value in line {at + 1}"
    elif path.suffix in (".yaml", ".json", ".jsonl", ".jinja") and dice < 0.85:
        after, what = text(rng, before), "text"
    else:
        after, what = octets(rng, before), "bytes"
    path.unlink()  # not through a second name of the valid file
    path.write_bytes(after)
    return f"{path.name}: {what} {after[:300]!r}{'…' if len(after) > 300 else ''}"
