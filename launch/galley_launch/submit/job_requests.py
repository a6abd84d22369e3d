"""A submission as values: its files, and its jobs with their options of ``sbatch``.

The same values become the commands that ``galley plan`` prints and the calls that ``galley submit`` makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from galley_launch.plan.plan import Plan, Stage

PREVIOUS = "PREVIOUS"
"""Placeholder in printed commands for the number of the job before, which only its submission brings."""


@dataclass(frozen=True)
class JobRequest:
    """A job to submit."""

    stage: str
    script: Path
    """Its job script, once the files of the submission are written."""
    options: tuple[str, ...] = ()
    """Of sbatch, besides those in the script."""
    follows: bool = False
    """Whether it waits until the job that was submitted before it has ended, however it ended."""

    def options_after(self, previous: str) -> list[str]:
        """All options of sbatch. ``previous``: the number of the job that was submitted before."""
        # afterany: however the job before ended (sbatch(1), --dependency); this one sees from the run what is left.
        dependency = [f"--dependency=afterany:{previous}"] if self.follows else []
        return [*dependency, *self.options]

    def command(self) -> Stage:
        """As ``galley plan`` prints it."""
        return Stage(self.stage, ("sbatch", "--parsable", *self.options_after(PREVIOUS), str(self.script)), {})


@dataclass(frozen=True)
class Submission:
    """Files to write, by path in the run directory, then jobs to submit in order."""

    files: dict[str, str]
    jobs: tuple[JobRequest, ...]

    def script(self, job: JobRequest) -> str:
        """The text of a job's script."""
        return self.files[f"jobs/{job.stage}.sbatch"]

    def plan(self) -> Plan:
        """As ``galley plan`` shows it."""
        return Plan(self.files, tuple(job.command() for job in self.jobs))
