"""What a job's own checks found: nodes unfit before training, ranks that stood still during it."""

from __future__ import annotations

import time
from typing import Any

from galley_launch.job.diagnose.advice import FIND, ROOM, UNFIT, WAITED
from galley_launch.job.diagnose.findings import SHOWN, Case, Failure, cut, everywhere, hear, retry, shown
from galley_launch.job.diagnose.patterns import HANGS
from galley_launch.job.diagnose.voices import stack


def preflight(case: Case) -> Failure | None:
    """A node was found unfit before training began."""
    failed = [report for report in case.evidence.preflight if report.get("ok") is False]
    if not failed:
        return None
    own = [report for report in failed if any(check["name"] != "exchange" for check in _checks(report))]
    # An exchange has two sides: it blames only where nothing else does, and not both of two.
    guilty = own or (failed if 2 * len(failed) < max(3, len(case.evidence.preflight)) else [])
    names = tuple(sorted({str(report.get("node")) for report in guilty}))
    said = [(report, check) for report in own or failed for check in _checks(report)]
    lines = [f"preflight/{report.get('node')}.json: {c['name']}: {c.get('detail', '')}" for report, c in said]
    kind = "disk" if said and all(check["name"] == "disk" for _, check in said) and len(own) > 1 else "node"
    advice = ROOM if kind == "disk" else UNFIT if own else FIND
    who = names[0] if len(names) == 1 else ""
    told = tuple(map(cut, lines[:SHOWN]))
    return everywhere(Failure(kind, who, told, advice, retry(kind, case.evidence), names), case)


def _checks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks that failed."""
    checks = report.get("checks")
    found = [check for check in checks if isinstance(check, dict)] if isinstance(checks, list) else []
    return [check for check in found if not check.get("ok") and "name" in check]


def hang(case: Case) -> Failure | None:
    """A node's watcher called it a hang, in its record or, where the shared disk hung too, in the node's log."""
    seen, said = case.evidence.hang or {}, hear(HANGS, case)
    if not seen and not said:
        return None
    node, rank = seen.get("node") or (said[0].node if said else "somewhere"), seen.get("rank")
    who = f"rank {rank} on {node}" if rank is not None else str(node)
    told = f"silent for {seen.get('silent_s')} s in {_place(seen)}"
    lines = [f"hang-{node}.json: {who}: {told}"] if seen else list(shown(said[0].voice, [said[0].line]))
    lines += [line for each in case.voices if each.name == f"rank-{rank}" for line in shown(each, stack(each))]
    lines += [_beat(beat) for beat in sorted(case.evidence.heartbeats, key=_beat_time)]
    return Failure("hang", cut(who), tuple(map(cut, lines[:SHOWN])), WAITED, True, ())


def _beat_time(beat: dict[str, Any]) -> float:
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
