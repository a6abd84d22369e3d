"""Puts the fake commands on PATH and says what they answer."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

PROGRAMS = ("sbatch", "squeue", "scontrol", "sacct", "sinfo", "scancel", "srun")
COMMAND = Path(__file__).with_name("command.py")
EMPTY: dict[str, Any] = {
    "controller": "up",  # or down
    "away": 0,  # so many calls that the controller does not answer before it is up
    "accounting": "disabled",  # or up, down
    "lag": 0,  # calls of sacct that do not know a job yet
    "delay": 0,  # seconds before every answer
    "notice": "",  # a site's own text, on both streams
    "refuses": "",  # sbatch: with these words
    "accepts": 0,  # so many jobs before it refuses
    "cluster": "",  # after the id that sbatch prints, ";name"
    "next": 100,
    "jobs": {},  # id: columns of squeue
    "scripts": {},  # id: columns that change with each call of squeue
    "forgotten": [],  # ids that only accounting knows
    "foreign": [],  # ids of other users' jobs
    "partitions": "",
    "nodes": "",
    "version": "slurm 24.05.4",
}


class Scenario:
    """A folder with ``bin/`` (for PATH), ``scenario.json`` and ``calls.jsonl``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for name in PROGRAMS:
            text = f"#!{sys.executable} -IS\n" + COMMAND.read_text(encoding="utf-8")
            (self.bin / name).write_text(text, encoding="utf-8")
            (self.bin / name).chmod(0o755)
        self.set(**EMPTY)

    def set(self, **values: Any) -> None:
        """Change the scenario; keys are those of :data:`EMPTY`."""
        unknown = set(values) - set(EMPTY)
        assert not unknown, f"no such part of a scenario: {unknown}"
        path = self.folder / "scenario.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**old, **values}), encoding="utf-8")

    def job(self, job_id: str, *later: dict[str, str], **columns: str) -> None:
        """Add a job, with ``columns`` of squeue; ``later`` change them, one at each call of squeue that asks for it."""
        state = json.loads((self.folder / "scenario.json").read_text(encoding="utf-8"))
        self.set(
            jobs={**state["jobs"], job_id: columns},
            scripts={**state["scripts"], job_id: [{}, *later]},
        )

    def remove(self, *programs: str) -> None:
        """Have the site lack these commands."""
        for name in programs:
            (self.bin / name).unlink()

    def calls(self, program: str = "") -> list[dict[str, Any]]:
        """Calls so far, oldest first: ``{"program", "argv", "env", "stdin"}``."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        calls = [json.loads(line) for line in lines]
        return [call for call in calls if program in ("", call["program"])]


def path_without_slurm(folder: Path) -> str:
    """A PATH with python, bash and coreutils but none of Slurm's commands, which may be installed here."""
    folder.mkdir(exist_ok=True)
    for name in ("bash", "sh", "env", "cat", "sleep", "date", "mkdir", "rm", "mv", "ln", "hostname", "python3"):
        found = shutil.which(name)
        if found and not (folder / name).exists():
            (folder / name).symlink_to(found)
    return str(folder)
