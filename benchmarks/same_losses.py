"""Do two checkouts of Galley train to the same bits? ``python benchmarks/same_losses.py OLD NEW [FOLDER]``.

Each case is a shipped recipe on a tiny stand-in of its model (``tests/recipes``), planned by each checkout's own
command line, prepared and trained for four steps by its own data plane, on a CPU. Every loss and gradient norm must
agree to the bit. A run that FOLDER already holds is not run again, so that a long comparison can be made in pieces
(``--only``). Exit status 1 where a number differs or a run fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """One run that both checkouts make."""

    recipe: str
    ranks: int
    zero: str
    words: str = ""

    @property
    def name(self) -> str:
        return re.sub(r"[^\w.-]+", "-", "-".join([self.recipe, str(self.ranks), self.zero, *self.words.split()]))


LORA, FULL, QLORA = "llama3.2-1b-lora", "gemma3-270m-full", "llama3.2-3b-qlora"
CASES = [
    *(Case(name, *place) for name in (LORA, FULL, QLORA) for place in ((1, "zero2"), (2, "zero2"), (2, "zero3"))),
    Case("smollm2-360m-full", 2, "zero0", "data.packing=false"),
    Case("qwen3-30b-a3b-lora", 2, "zero2"),
    Case("olmo2-1b-full", 2, "zero3", "data.path=texts.jsonl data.format=text model.chat_template=null"),
]
"""Llama, Gemma, SmolLM2, OLMo and Qwen's mixture of experts; conversations and plain text, packed but for one."""
SMALL = (
    "device=cpu", "threads=1", "data.path=talks.jsonl", "data.max_length=256", "batch.samples=8", "duration.steps=4",
    "cadence.eval_every=2",
)  # fmt: skip
"""What differs from each recipe, beside ranks and the preset."""
NUMBERS = ("loss", "grad_norm", "held_out_loss")
FIRST_SEEDING = 1
"""How seeds become the order of samples in runs that do not say; a checkout that has a choice is asked for this one."""
MAKE_MODELS = """
import sys
from pathlib import Path
import yaml
from recipes import twins
hub, *recipes = map(Path, sys.argv[1:])
for model in {yaml.safe_load(recipe.read_text())["model"]["path"] for recipe in recipes}:
    if not twins.snapshot(hub, model).exists():
        twins.make(hub, model)
"""
Row = dict[str, Any]


def write_inputs(folder: Path) -> None:
    """Conversations and texts of unequal length, and the stand-ins of the models in a hub's cache."""
    answers = ["The cook says: " + "Rome. Paris. " * (1 + number % 7) for number in range(120)]
    talks = [
        [
            {"role": "user", "content": f"What is the capital of country {number}?"},
            {"role": "assistant", "content": answer},
        ]
        for number, answer in enumerate(answers)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": answer}) + "\n" for answer in answers))
    path = ":".join(str(ROOT / part) for part in ("tests", "launch", "src"))
    recipes = {str(ROOT / "recipes" / f"{case.recipe}.yaml") for case in CASES}
    command = [sys.executable, "-c", MAKE_MODELS, str(folder / "hub"), *sorted(recipes)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=folder, check=True)


def planned(checkout: Path, home: Path, env: dict[str, str], case: Case) -> tuple[Row, list[str]]:
    """``run.json`` and the shell commands of prepare and train, read from what ``galley plan`` prints."""
    given = {word.partition("=")[0]: word for word in (*SMALL, *case.words.split())}
    words = [case.recipe, *given.values(), f"ranks={case.ranks}", f"deepspeed={case.zero}", f"name={case.name}"]
    command = [sys.executable, "-m", "galley_launch", "plan", *words, f"runs={home / 'runs'}", "files=all"]
    done = subprocess.run(command, cwd=home.parent, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(words)}: {done.stderr.strip()}")
    text = done.stdout.partition("/run.json\n")[2]
    spec: Row
    spec, _ = json.JSONDecoder().raw_decode(text)
    lines = text.splitlines()
    return spec, [lines[lines.index(f"# {stage}") + 1] for stage in ("prepare", "train")]


def train(checkout: Path, home: Path, hub: Path, case: Case) -> list[Row]:
    """The rows of ``metrics.jsonl`` of one run, without clocks. Its output is in ``stages.log`` of the run."""
    env = os.environ | {"HF_HUB_CACHE": str(hub), "GALLEY_CACHE": str(home / "cache")}
    env["PYTHONPATH"] = f"{checkout / 'launch'}:{checkout / 'src'}"
    run = home / "runs" / case.name
    if not (run / "done").exists():
        spec, commands = planned(checkout, home, env, case)
        if "seeding" in spec["task"]:
            spec["task"]["seeding"] = FIRST_SEEDING
        (run / "attempts" / "0001").mkdir(parents=True, exist_ok=True)
        (run / "run.json").write_text(json.dumps(spec, indent=2))
        for command in commands:
            with (run / "stages.log").open("a") as log:
                status = subprocess.run(["bash", "-c", command], cwd=home, env=env, stdout=log, stderr=log).returncode
            if status:
                raise SystemExit(f"{checkout}: {case.name}: exit status {status}; see {run / 'stages.log'}")
        (run / "done").touch()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{"step": row["step"]} | {name: row[name] for name in NUMBERS if name in row} for row in rows]


def numbers(rows: list[Row]) -> dict[tuple[int, str], str]:
    """(Step, name) to a number's exact bits, as a hexadecimal float."""
    return {(row["step"], name): float(row[name]).hex() for row in rows for name in NUMBERS if name in row}


def compared(case: Case, old: list[Row], new: list[Row]) -> tuple[str, bool]:
    """A line of the table, and whether all numbers agree."""
    before, after = numbers(old), numbers(new)
    differing = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    complete = {step for step, name in before if name == "loss"} == {1, 2, 3, 4}
    losses = " ".join(f"{row['loss']:.6f}" for row in old if "loss" in row)
    verdict = f"{len(before)} of {len(before)}" if not differing else f"**differ**: {differing}"
    words = case.words.replace(" ", "<br>")
    return (
        f"| {case.recipe} | {case.ranks} | {case.zero} | {words} | {losses} | {verdict} |",
        complete and not differing,
    )


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def page(old: Path, new: Path, lines: list[str]) -> str:
    names = ("torch", "transformers", "deepspeed", "peft", "bitsandbytes", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    processors = Path("/proc/cpuinfo").read_text().splitlines()
    chip = next((line.partition(": ")[2] for line in processors if line.startswith("model name")), "")
    head = [
        f"# The same losses before and after, {time.strftime('%Y-%m-%d')}",
        "",
        f"`{commit(old)}` beside `{commit(new)}`; `benchmarks/same_losses.py` wrote this.",
        f"Python {platform.python_version()}, {versions}; {chip or platform.machine()}, {os.cpu_count()} cores.",
        "",
        "Each line is a recipe on a tiny stand-in of its model (two layers, 64 wide, random weights), planned, "
        "prepared and trained for four steps by each checkout. *Same bits*: how many of the losses, gradient norms "
        "and held-out losses of all steps agree to the last bit. For all of them, not as their recipes say: "
        f"{', '.join(f'`{word}`' for word in SMALL)}.",
        "",
        "| recipe | ranks | ZeRO | also | losses of steps 1 to 4 | same bits |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="run the cases whose name has this in it, and write no page")
    args = parser.parse_args()
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="same-losses-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_inputs(folder)
    lines: list[str] = []
    same = True
    for case in (case for case in CASES if args.only in case.name):
        rows = []
        for side, checkout in (("old", args.old.resolve()), ("new", args.new.resolve())):
            (folder / side).mkdir(exist_ok=True)
            rows.append(train(checkout, folder / side, folder / "hub", case))
        line, agree = compared(case, rows[0], rows[1])
        lines, same = [*lines, line], same and agree
        print(line, flush=True)
    if not args.only:
        path = ROOT / "benchmarks" / "results" / f"same-losses-{time.strftime('%Y-%m-%d')}.md"
        path.write_text(page(args.old, args.new, lines))
        print(f"wrote {path}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
