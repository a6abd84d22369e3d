"""``make demo``: a small language model learns to read orders, on this machine, in minutes.

    python demo/demo.py [key=value …]        the words go to galley run, as they are: runs=DIRECTORY, epochs=2, …

Leaves in the run's directory, beside what every run leaves: answers-before.jsonl, answers-after.jsonl, loss.png and
demo.json. Ends with 1 where the model did not learn its task, 2 where something is missing that you can fix.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# What libraries say about loading would bury what is to be read here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import data
import model
import plot
import score

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir, read_json, write_atomic
from galley_launch.recipe.paths import cache

ENOUGH = 0.8
"""Share of right answers below which the demo has failed."""
STOPPED = 130
"""Exit status after Ctrl-C."""


@dataclass(frozen=True)
class Place:
    """Where this demo's files are."""

    run: RunDir

    @property
    def record(self) -> Path:
        """What the demo found out; written last."""
        return self.run.root / "demo.json"

    @property
    def picture(self) -> Path:
        """The loss curve."""
        return self.run.root / "loss.png"

    def answers(self, when: str) -> Path:
        """All answers, ``before`` or ``after`` training."""
        return self.run.root / f"answers-{when}.jsonl"


def main(words: list[str]) -> int:
    """The demo; returns the exit status."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found nothing else
    settings = dict(word.lstrip("-").split("=", 1) for word in words if "=" in word)
    place = Place(RunDir(Path(settings.get("runs", "runs")) / settings.get("name", "demo")))
    known = read_json(place.record)
    if known:
        print(f"The demo is finished; to start afresh: rm -r {place.run.root}\n")
        return close(place, known)
    try:
        return close(place, perform(place, words))
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


def perform(place: Place, words: list[str]) -> dict[str, Any]:
    """Score, train, score again; returns what ``demo.json`` says."""
    started = time.time()
    print("A language model of 135 million parameters is trained to turn orders into JSON.")
    path, whence = model.find(place.run, cache() / "demo")
    step("model", f"SmolLM2-135M-Instruct, {whence}")
    step("data", f"{data.TRAIN_ROWS} orders to train on; {data.HELD_OUT_ROWS} to be scored on share no value with them")
    rows = score.read(data.HELD_OUT_FILE)
    step("before", "the model as it was released answers those")
    before = examine(place, "before", model.loadable(path, cache()), rows)
    step("train", "LoRA under DeepSpeed ZeRO-2")
    train(place, path, words)
    step("after", "the exported model, loaded with plain transformers, answers the same")
    after = examine(place, "after", str(place.run.export / "model"), rows)
    facts = {
        "score_before": before.score,
        "score_after": after.score,
        "rows": len(rows),
        "seconds_training": round(seconds_training(place.run), 1),
        "seconds_total": round(time.time() - started, 1),
        "model": path,
        "sample": {"before": asdict(before.samples[0]), "after": asdict(after.samples[0])},
    }
    subtitle = f"exact answers on orders never seen: {before.score:.0%} before, {after.score:.0%} after"
    plot.draw(place.run.metrics, place.picture, "SmolLM2-135M learns to read orders", subtitle)
    write_atomic(place.record, json.dumps(facts, indent=2) + "\n")
    return facts


def step(name: str, text: str) -> None:
    """A heading."""
    print(f"\n{name:<8}{text}", flush=True)


def examine(place: Place, when: str, path: str, rows: list[score.Turns]) -> score.Report:
    """Score the model at ``path``, keep its answers, say how it did. Answers from before are not asked for twice."""
    kept = place.answers(when)
    if when == "before" and kept.exists():
        report = score.Report([score.Sample(**json.loads(line)) for line in kept.read_text("utf-8").splitlines()], 0.0)
    else:
        report = score.score(path, rows)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in report.samples))
    right = sum(sample.right for sample in report.samples)
    print(f"        {right} of {len(rows)} right: {report.score:.1%} ({report.seconds:.0f} s)")
    return report


def devices() -> list[str]:
    """Two GPUs at most, for a model this small gains nothing from more; two CPU ranks where there is none."""
    count = torch.cuda.device_count()
    return [f"ranks={min(count, 2)}"] if count else ["device=cpu", "ranks=2"]


def train(place: Place, path: str, words: list[str]) -> None:
    """``galley run demo``, as anybody would type it. Ends the demo where it did not come to its end."""
    command = ["run", "demo", f"model.path={path}", *devices(), *words]
    print(f"        galley {' '.join(command)}\n", flush=True)
    child = subprocess.Popen([sys.executable, "-m", "galley_launch", *command])
    status = None
    while status is None:
        with suppress(KeyboardInterrupt):  # The terminal sends it to galley too, which saves and ends; so wait.
            status = child.wait()
    exported = (place.run.export / "model" / "config.json").is_file()
    done = any((read_json(each.exit) or {}).get("verdict") == "done" for each in place.run.attempts())
    if status or not (exported and done):
        print("demo: training did not finish; make demo again resumes it", file=sys.stderr)
        raise SystemExit(status or STOPPED)


def seconds_training(run: RunDir) -> float:
    """Seconds from the end of preparation to the ranks' last word, over all attempts: loading and saving count."""
    total = 0.0
    for attempt in run.attempts():
        with suppress(OSError):  # an attempt that was stopped before it trained
            total += attempt.log("rank-0").stat().st_mtime - attempt.log("prepare").stat().st_mtime
    return total


def close(place: Place, facts: dict[str, Any]) -> int:
    """Show the sample, say where everything is and what to try next; returns the exit status."""
    before, after = facts["sample"]["before"], facts["sample"]["after"]
    print("\norder   " + before["message"].replace("\n", "\n" + " " * 8))
    print(f"before  {' '.join(before['given'].split())[:200]}")
    print(f"after   {after['given']}")
    print(f"\nscore   {facts['score_before']:.1%} before, {facts['score_after']:.1%} after, on {facts['rows']} orders")
    print(f"time    {facts['seconds_training']:.0f} s of training, {facts['seconds_total']:.0f} s in all")
    print_places(place)
    print_next(place, facts["model"])
    if facts["score_after"] < ENOUGH:
        print(
            f"\ndemo: {facts['score_after']:.1%} is below {ENOUGH:.0%}: the model did not learn its task",
            file=sys.stderr,
        )
        return 1
    return 0


def print_places(place: Place) -> None:
    """Where everything is."""
    print()
    for name, path in (
        ("model", place.run.export / "model"), ("adapter", place.run.export / "adapter"), ("curve", place.picture),
        ("metrics", place.run.metrics), ("answers", place.answers("after")), ("record", place.record),
    ):  # fmt: skip
        print(f"{name:<8}{path}")


def typed(path: Path) -> str:
    """``path`` as somebody in this directory would type it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def print_next(place: Place, path: str) -> None:
    """Three commands to paste."""
    python, command = typed(Path(sys.executable)), Path(sys.executable).parent / "galley"
    galley = typed(command) if command.exists() else f"{python} -m galley_launch"
    here = " ".join(devices())
    exported = place.run.export / "model"
    print("\nNext, to paste:")
    print(f'  {python} demo/ask.py {exported} "Please send 12 brass pans on 3 May 2027, 450 euros is fine. Anna Holm"')
    print(f"  {galley} run demo name=demo-full method.kind=full lr=1e-4 model.path={path} {here}")
    print(f"  {galley} plan qwen3-4b-qlora")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
