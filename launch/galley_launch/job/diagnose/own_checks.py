"""Failures that Galley itself noticed in a job: nodes that are unfit before training, ranks that hang during it."""

from __future__ import annotations

import time
from typing import Any

from galley_launch.job.diagnose.advice import DISK_ROOM, REACH_HEAD, UNFIT, WAITED
from galley_launch.job.diagnose.findings import SHOWN, Case, Failure, all_matches, cut, everywhere, retry, shown
from galley_launch.job.diagnose.log_sources import stack
from galley_launch.job.diagnose.patterns import HANGS


def preflight(case: Case) -> Failure | None:
    """A node failed its checks before training began."""
    failed = [report for report in case.evidence.preflight if report.get("ok") is False]
    if not failed:
        return None
    own_faults = [report for report in failed if any(check["name"] != "exchange" for check in _checks(report))]
    # An exchange between two nodes fails on both: it counts only where no node failed a check of its own, and blames
    # nobody where half of the nodes or more report it (of two nodes, either may be the broken one).
    blamed = own_faults or (failed if 2 * len(failed) < max(3, len(case.evidence.preflight)) else [])
    names = tuple(sorted({str(report.get("node")) for report in blamed}))
    unfit = [(report, check) for report in own_faults or failed for check in _checks(report)]
    lines = [
        f"preflight/{report.get('node')}.json: {check['name']}: {check.get('detail', '')}" for report, check in unfit
    ]
    # Several nodes that fail only for their disk share that disk: it is full, and no node is broken.
    disk = bool(unfit) and all(check["name"] == "disk" for _, check in unfit) and len(own_faults) > 1
    kind = "disk" if disk else "node"
    advice = DISK_ROOM if disk else UNFIT if own_faults else REACH_HEAD
    who = names[0] if len(names) == 1 else ""
    return everywhere(
        Failure(kind, who, tuple(map(cut, lines[:SHOWN])), advice, retry(kind, case.evidence), names), case
    )


def _checks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks that failed; a report may be torn or damaged."""
    checks = report.get("checks")
    records = [check for check in checks if isinstance(check, dict)] if isinstance(checks, list) else []
    return [check for check in records if not check.get("ok") and "name" in check]


def hang(case: Case) -> Failure | None:
    """A node's watcher saw a hang: by its record, or by its line in the node's log where the shared disk hung too."""
    record, matches = case.evidence.hang or {}, all_matches(HANGS, case)
    if not record and not matches:
        return None
    node, rank = record.get("node") or (matches[0].node if matches else "somewhere"), record.get("rank")
    who = f"rank {rank} on {node}" if rank is not None else str(node)
    silence = f"silent for {record.get('silent_s')} s in {_place(record)}"
    lines = [f"hang-{node}.json: {who}: {silence}"] if record else list(shown(matches[0].source, [matches[0].line]))
    lines += [line for source in case.sources if source.name == f"rank-{rank}" for line in shown(source, stack(source))]
    lines += [_beat(beat) for beat in sorted(case.evidence.heartbeats, key=_beat_time)]
    return Failure("hang", cut(who), tuple(map(cut, lines[:SHOWN])), WAITED, True, ())


def _beat_time(beat: dict[str, Any]) -> float:
    # Seconds since the epoch. A number that time.localtime refuses (1e11 is the year 5138) counts as none.
    at = beat.get("time")
    return float(at) if isinstance(at, (int, float)) and 0 <= at < 1e11 else 0.0


def _beat(beat: dict[str, Any]) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(_beat_time(beat)))
    return f"heartbeats/rank-{beat.get('rank')}.json: in {_place(beat)} since {at}, on {beat.get('host')}"


def _place(beat: dict[str, Any]) -> str:
    phase, step = beat.get("phase"), beat.get("step")
    if phase == "step":
        return f"step {step}"
    return f"phase {phase}" if step is None else f"phase {phase}, step {step}"
