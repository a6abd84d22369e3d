"""The demo's task: messy order messages in, strict JSON out. Deterministic; the standard library only.

``python demo/data.py`` writes the files that the repository ships: the same bytes each time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from itertools import product
from pathlib import Path
from typing import Any

from pools import HELD_OUT, TRAIN, Pools

SYSTEM = "Turn the order into JSON with the keys customer, order, total and date."
SEED = 20
FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "data" / "orders"
TRAIN_FILE, HELD_OUT_FILE = FOLDER / "train.jsonl", FOLDER / "held-out.jsonl"
TRAIN_ROWS, HELD_OUT_ROWS = 400, 120

Row = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Order:
    """What a message says; its JSON is the answer."""

    customer: str
    order: str
    """How many of what: ``12 brass pans``."""
    total: str
    """Currency and amount: ``EUR 240``, however the message writes it."""
    date: str
    """ISO 8601: ``2026-03-12``, however the message writes it."""


CURRENCIES: dict[str, tuple[str, ...]] = {
    "USD": ("${0}", "{0} dollars", "USD {0}"),
    "EUR": ("€{0}", "{0} euros", "EUR {0}"),
    "GBP": ("£{0}", "{0} pounds", "GBP {0}"),
}

DATES: tuple[Callable[[date], str], ...] = (
    lambda day: f"{day.day} {day:%B} {day.year}",
    lambda day: f"{day:%B} {day.day}, {day.year}",
    lambda day: f"{day:%b} {day.day} {day.year}",
    lambda day: f"{day:%d.%m.%Y}",
    lambda day: day.isoformat(),
)


def deal(values: list[Any], rng: random.Random) -> tuple[list[Any], list[Any]]:
    """Shuffle and cut in two: three quarters to train on, a quarter to be scored on."""
    rng.shuffle(values)
    cut = len(values) * 3 // 4
    return values[:cut], values[cut:]


def orders(pools: Pools, numbers: list[int], amounts: list[int], days: list[date], rng: random.Random) -> Iterator[Row]:
    """Rows without end, each a conversation of system, user and assistant."""
    names = [" ".join(pair) for pair in product(pools.first, pools.last)]
    items = [" ".join(pair) for pair in product(pools.kinds, pools.things)]
    while True:
        currency, amount, day = rng.choice(list(CURRENCIES)), rng.choice(amounts), rng.choice(days)
        total = f"{currency} {amount}"
        order = Order(rng.choice(names), f"{rng.choice(numbers)} {rng.choice(items)}", total, day.isoformat())
        said = {"total": rng.choice(CURRENCIES[currency]).format(amount), "date": rng.choice(DATES)(day)}
        message = rng.choice(pools.phrases).format(**{**asdict(order), **said})
        yield conversation(message, json.dumps(asdict(order), ensure_ascii=False))


def conversation(message: str, answer: str) -> Row:
    """One row in the format that Galley trains on."""
    turns = (("system", SYSTEM), ("user", message), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def make(seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to be scored on; no value of the one is in the other."""
    rng = random.Random(seed)
    start = date(2026, 1, 1)
    numbers = deal(list(range(2, 100)), rng)
    amounts = deal(list(range(100, 5000)), rng)
    days = deal([start + timedelta(days=n) for n in range(2 * 365)], rng)
    early = [day for day in days[0] if day.day < 10]  # "3 May" to "-05-03" is what takes most practice
    training = orders(TRAIN, numbers[0], amounts[0], days[0] + early, random.Random(seed + 1))
    held_out = orders(HELD_OUT, numbers[1], amounts[1], days[1], random.Random(seed + 2))
    return [next(training) for _ in range(TRAIN_ROWS)], [next(held_out) for _ in range(HELD_OUT_ROWS)]


def write(rows: list[Row], path: Path) -> Path:
    """Write ``rows`` as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    for each, file in zip(make(), (TRAIN_FILE, HELD_OUT_FILE), strict=True):
        print(f"{len(each)} rows in {write(each, file)}")
