"""Is this node fit to train? ``python3 -m galley_launch.job.node.preflight ATTEMPT_DIR``, one task on each node.

Ends in time even where a disk, a driver or a name server hangs: each check has a thread of its own, nobody waits for
a thread that does not come back, and the process leaves by ``os._exit``. Exit status 0: fit; 1: not.
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
"""Checks that follow each other, by name."""


def _work(found: dict[str, Outcome], group: Group) -> None:
    for title, check in group:
        begun = time.monotonic()
        try:
            result = check()
        except Exception as error:  # whatever a broken node comes up with
            result = outcome(False, f"{type(error).__name__}: {error}")
        result["detail"] = " ".join(result["detail"].split())
        found[title] = {"name": title, **result, "seconds": round(time.monotonic() - begun, 3)}


def _run(groups: Sequence[Group], node: Node, share: float) -> list[Outcome]:
    """Every group at once. A check that does not end in time has failed; what would have followed it is left out."""
    found: dict[str, Outcome] = {}
    threads = [threading.Thread(target=_work, args=(found, group), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(node.left(share))
    seconds = round(time.monotonic() - node.began, 3)
    silent = {"ok": False, "detail": f"no answer in {seconds:.0f} s", "seconds": seconds}
    for group in groups:
        late = [title for title, _ in group if title not in found]
        found.update({title: {"name": title, **silent} for title in late[:1]})
    return [found[title] for group in groups for title, _ in group if title in found]


def _checks(node: Node) -> list[Outcome]:
    met: Outcome = {}

    def meet() -> Outcome:
        met.update(exchange(node))
        return dict(met)

    single = {"devices": devices, "memory": memory, "disk": disk, "name": name, "limits": limits}
    groups: list[Group] = [[(title, partial(check, node))] for title, check in single.items()]
    return _run([*groups, [("exchange", meet), ("clock", lambda: clock(node, met))]], node, CHECKS)


def _save(node: Node, checks: list[Outcome]) -> Outcome:
    seconds, ok = round(time.monotonic() - node.began, 3), all(check["ok"] for check in checks)
    report = {"node": node.name, "number": node.number, "ok": ok, "seconds": seconds, "checks": checks}
    # Not its parents: where the shared disk is not mounted, nothing is made in its place.
    node.attempt.preflight.mkdir(exist_ok=True)
    write_atomic(node.attempt.preflight / f"{node.name}.json", json.dumps(report))
    return outcome(True, "")


def _failures(report: dict[str, Any] | None) -> str:
    """Why a node is not fit by its own account, but for the exchange: that has two sides."""
    if report is None:
        return "left no report"
    failed = [check for check in report["checks"] if not check["ok"] and check["name"] != "exchange"]
    return "; ".join(f"{check['name']}: {check['detail']}" for check in failed)


def _exchanged(report: dict[str, Any] | None) -> Outcome:
    found = [check for check in (report or {"checks": []})["checks"] if check["name"] == "exchange"]
    return found[0] if found else {"ok": False, "detail": "it did not reach the head"}


def bad_nodes(attempt: Attempt, expected: Sequence[str]) -> dict[str, str]:
    """Which nodes are not fit to train, and why. ``expected``: names in the order of ``SLURM_NODEID``.

    Those that failed, left no report, or did not reach the head. Where several others are left and none of them
    reached it, or where it has no count of them, the head is at fault instead.
    """
    reports: dict[str, dict[str, Any] | None] = dict.fromkeys(expected)
    for path in sorted(attempt.preflight.glob("*.json")):
        reports[known_as(path.stem, expected)] = read_json(path)
    bad = {each: why for each in expected if (why := _failures(reports[each]))}
    exchanges = {each: _exchanged(reports[each]) for each in expected}
    head, others = expected[0], [each for each in expected[1:] if each not in bad]
    count = exchanges[head].get("missing")
    if count is None:
        return bad if head in bad else {**bad, head: f"exchange: {exchanges[head]['detail']}"}
    missing = [expected[number] for number in count]
    lost = [each for each in others if each in missing or not (missing or exchanges[each]["ok"])]
    if len(lost) > 1 and lost == others:
        return {head: "exchange: no other node reaches it", **bad}
    return {**bad, **{each: f"exchange: {exchanges[each]['detail']}" for each in lost}}


def _node(arguments: argparse.Namespace) -> Node:
    def number(variable: str, otherwise: int = 0) -> int:
        return int(os.environ.get(variable) or otherwise)

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
    os._exit(main())  # a thread may hang in a system call
