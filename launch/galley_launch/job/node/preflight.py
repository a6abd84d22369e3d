"""Is this node fit to train? ``python3 -m galley_launch.job.node.preflight ATTEMPT_DIR``, one task on each node.

Ends in time even where a disk, a driver or a name server hangs: each group of checks has a thread of its own, a thread
that does not come back is not waited for, and the process leaves by ``os._exit``. Exit status 0: fit; 1: not.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from galley.contract.rundir import Attempt, read_json, write_atomic
from galley_launch.job.names import known_as
from galley_launch.job.node.checks import (
    CHECKS,
    Node,
    Outcome,
    clock,
    devices,
    disk,
    limits,
    memory,
    name,
    outcome,
)
from galley_launch.job.node.exchange import exchange

Group = Sequence[tuple[str, Callable[[], Outcome]]]
"""Checks that run one after the other, by name."""


def _work(outcomes: dict[str, Outcome], group: Group) -> None:
    """Run a group's checks, each one's result into ``outcomes``."""
    for title, check in group:
        began = time.monotonic()
        try:
            result = check()
        except Exception as error:  # of any kind: what a broken node raises cannot be foreseen
            result = outcome(False, f"{type(error).__name__}: {error}")
        result["detail"] = " ".join(result["detail"].split())
        # result's own name comes second: the exchange calls itself "port" where that is what fails.
        outcomes[title] = {"name": title, **result, "seconds": round(time.monotonic() - began, 3)}


def _run(groups: Sequence[Group], node: Node, share: float) -> list[Outcome]:
    """Every group at once. A check that does not end in time has failed; what would have followed it is left out."""
    outcomes: dict[str, Outcome] = {}
    # Daemons: the interpreter does not wait for them, and a thread that is stuck in a system call cannot be ended.
    threads = [threading.Thread(target=_work, args=(outcomes, group), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(node.left(share))
    seconds = round(time.monotonic() - node.began, 3)
    silent = {"ok": False, "detail": f"no answer in {seconds:.0f} s", "seconds": seconds}
    for group in groups:
        late = [title for title, _ in group if title not in outcomes]
        outcomes.update({title: {"name": title, **silent} for title in late[:1]})
    return [outcomes[title] for group in groups for title, _ in group if title in outcomes]


def _checks(node: Node) -> list[Outcome]:
    exchanged: Outcome = {}

    def run_exchange() -> Outcome:
        exchanged.update(exchange(node))
        return dict(exchanged)

    single = {"devices": devices, "memory": memory, "disk": disk, "name": name, "limits": limits}
    groups: list[Group] = [[(title, partial(check, node))] for title, check in single.items()]
    # The clock comes after the exchange, in one thread: it compares this node's time with what the exchange measured.
    together: Group = [("exchange", run_exchange), ("clock", lambda: clock(node, exchanged))]
    return _run([*groups, together], node, CHECKS)


def _save(node: Node, checks: list[Outcome]) -> Outcome:
    """Write the node's report, ``preflight/NODE.json``: itself run as a check, as the shared disk may hang."""
    seconds, ok = round(time.monotonic() - node.began, 3), all(check["ok"] for check in checks)
    report = {"node": node.name, "number": node.number, "ok": ok, "seconds": seconds, "checks": checks}
    # Not its parents: where the shared disk is not mounted, nothing is made in its place.
    node.attempt.preflight.mkdir(exist_ok=True)
    write_atomic(node.attempt.preflight / f"{node.name}.json", json.dumps(report))
    return outcome(True, "")


def _failures(report: dict[str, Any] | None) -> str:
    """Why a node is not fit by its own report. The exchange is left out: either of its two ends may be at fault."""
    if report is None:
        return "left no report"
    failed = [check for check in report["checks"] if not check["ok"] and check["name"] != "exchange"]
    return "; ".join(f"{check['name']}: {check['detail']}" for check in failed)


def _exchanged(report: dict[str, Any] | None) -> Outcome:
    exchanges = [check for check in (report or {"checks": []})["checks"] if check["name"] == "exchange"]
    return exchanges[0] if exchanges else {"ok": False, "detail": "it did not reach the head"}


def bad_nodes(attempt: Attempt, expected: Sequence[str]) -> dict[str, str]:
    """Which nodes are not fit to train, and why. ``expected``: names in the order of ``SLURM_NODEID``.

    Those are nodes that failed a check, left no report, or did not reach the head. The head is at fault instead where
    two or more of the others are fit and none of them reached it, or where it could not count who did.
    """
    reports: dict[str, dict[str, Any] | None] = dict.fromkeys(expected)
    for path in sorted(attempt.preflight.glob("*.json")):
        reports[known_as(path.stem, expected)] = read_json(path)
    bad = {node: why for node in expected if (why := _failures(reports[node]))}
    exchanges = {node: _exchanged(reports[node]) for node in expected}
    head, others = expected[0], [node for node in expected[1:] if node not in bad]
    count = exchanges[head].get("missing")
    if count is None:
        return bad if head in bad else {**bad, head: f"exchange: {exchanges[head]['detail']}"}
    missing = [expected[number] for number in count]
    # Where the head names who is missing, only those count: the sums of the others are wrong because of them.
    lost = [node for node in others if node in missing or not (missing or exchanges[node]["ok"])]
    if len(lost) > 1 and lost == others:
        return {head: "exchange: no other node reaches it", **bad}
    return {**bad, **{node: f"exchange: {exchanges[node]['detail']}" for node in lost}}


def _node(arguments: argparse.Namespace) -> Node:
    def number(variable: str, default: int = 0) -> int:
        return int(os.environ.get(variable) or default)

    return Node(
        attempt=Attempt(Path(arguments.attempt)),
        name=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        number=number("SLURM_NODEID"),
        nodes=number("GALLEY_NODES", 1),
        head=os.environ.get("GALLEY_HEAD") or "localhost",
        port=number("GALLEY_PORT"),
        gpus=number("GALLEY_GPUS"),
        scratch=os.environ.get("GALLEY_SCRATCH", ""),
        memory_mb=number("GALLEY_MEMORY_MB"),
        began=time.monotonic(),
        limit=float(os.environ.get("GALLEY_PREFLIGHT_S") or 60),
        loopback=arguments.loopback,
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="galley_launch.job.node.preflight", description="Is this node fit to train?")
    parser.add_argument("attempt", help="attempts/0001 of a run")
    parser.add_argument("--loopback", action="store_true", help="the head may have a loopback address")
    node = _node(parser.parse_args())
    checks = _checks(node)
    checks += _run([[("report", partial(_save, node, list(checks)))]], node, 1.0)
    for check in checks:
        if not check["ok"]:
            print(f"galley: preflight: {node.name}: {check['name']}: {check['detail']}", flush=True)
    return 0 if all(check["ok"] for check in checks) else 1


if __name__ == "__main__":
    os._exit(main())  # not sys.exit, whose clean-up may wait for a thread that hangs in a system call
