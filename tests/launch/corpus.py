"""The corpus of failures: what each file says is expected, and its sections laid out as the attempt of a run."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from galley.contract.rundir import Attempt, RunDir
from galley_launch.job.diagnose.evidence import Evidence, collect

FILES = sorted((Path(__file__).parent / "failures").glob("*.txt"))
FILLER = b"step  7/600  loss 1.2841  lr 1.9e-04  norm 0.71  31,204 tokens/s  71.9 GB  1 h 02 min left\n"


@dataclass(frozen=True)
class Case:
    """A file of the corpus."""

    kind: str
    who: str
    retry: bool
    nodes: tuple[str, ...]
    shows: str
    settings: dict[str, str]
    """Of the section ``slurm``: ``state``, ``status``, ``step``."""
    sections: dict[str, bytes]


def read(path: Path) -> Case:
    """``# expect: KIND | WHO | retry=yes|no | nodes=a,b``, ``# shows: TEXT``, then sections ``== NAME``."""
    head, *parts = re.split(rb"^== (.+)\n?", path.read_bytes(), flags=re.MULTILINE)
    sections = {name.decode().strip(): body for name, body in zip(parts[::2], parts[1::2], strict=True)}
    first, second = head.decode().splitlines()
    kind, who, retry, *more = first.removeprefix("# expect: ").split(" | ")
    slurm = next(name for name in sections if name.split()[0] == "slurm")
    del sections[slurm]
    return Case(
        kind=kind,
        who="" if who == "-" else who,
        retry={"retry=yes": True, "retry=no": False}[retry],
        nodes=tuple(more[0].removeprefix("nodes=").split(",")) if more else (),
        shows=second.removeprefix("# shows: "),
        settings=dict(word.split("=", 1) for word in slurm.split()[1:]),
        sections=sections,
    )


def lay(case: Case, root: Path) -> tuple[RunDir, Attempt]:
    """Write the case as the attempt of a run."""
    run = RunDir(root)
    attempt = run.attempt(1)
    for folder in (attempt.logs, attempt.root / "errors", attempt.heartbeats, attempt.preflight):
        folder.mkdir(parents=True)
    if "step" in case.settings:
        run.metrics.write_text(json.dumps({"step": int(case.settings["step"])}) + "\n")
    for name, body in case.sections.items():
        write(run, attempt, name.split(), body)
    return run, attempt


def write(run: RunDir, attempt: Attempt, words: list[str], body: bytes) -> None:
    match words:
        case ["raw", "metrics"]:
            run.metrics.write_bytes(body)
        case ["raw", name]:
            (attempt.root / name).write_bytes(body)
        case [name] if name.startswith("jobs/logs/train-"):
            (run.root / name).parent.mkdir(parents=True)
            (run.root / name).write_bytes(body)
            attempt.job.write_text(json.dumps({"job": Path(name).stem.removeprefix("train-")}))
        case ["hang"]:
            (attempt.root / "hang-node.json").write_bytes(body)
        case ["errors" | "heartbeats" | "preflight" as folder]:
            for number, line in enumerate(body.splitlines()):
                (attempt.root / folder / f"{number:03}.json").write_bytes(line)
        case [log, *options]:
            sizes = {key: int(size) for key, size in (option.split("=") for option in options)}
            before = FILLER * (sizes.get("pad", 0) // len(FILLER)) + b"#" * sizes.get("bar", 0) + b"\n"
            (attempt.logs / log).write_bytes(before * bool(sizes) + body)


def evidence(case: Case, root: Path) -> Evidence:
    """The case as :func:`collect` finds it."""
    run, attempt = lay(case, root)
    status = case.settings.get("status")
    return collect(run, attempt, int(status) if status else None, case.settings.get("state", ""))
