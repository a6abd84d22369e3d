"""The small all-reduce between the nodes of a job, over a port that nobody else takes.

Each node but the head connects and sends one JSON line with a number; the head answers everybody with the sum.
Strangers and garbage are dropped. A node that never comes is named by the head, and the others are not blamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import statistics
import threading
import time
from typing import Any, NamedTuple

from galley_launch.job.node.checks import GATHER, JOIN, Node, Outcome, outcome

# Each message is longer than a jumbo frame: a switch that drops those lets small ones pass.
_PAD, _LONGEST = "." * 60000, 1 << 17


def token(node: Node) -> str:
    """Tells this job's nodes from whoever else connects: the attempt's secret, which only its user can read."""
    with contextlib.suppress(FileNotFoundError):
        return node.attempt.secret.read_text(encoding="ascii")
    return hashlib.sha256(f"{node.attempt.root} {os.environ.get('SLURM_JOB_ID', '')}".encode()).hexdigest()


def _send(connection: socket.socket, node: Node, body: dict[str, Any]) -> None:
    connection.sendall(json.dumps({"token": token(node), **body, "pad": _PAD}).encode() + b"\n")


def _receive(connection: socket.socket, node: Node, seconds: float) -> dict[str, Any]:
    """One line. Raises OSError, ValueError or RecursionError (JSON's) where it is not one of this job's."""
    connection.settimeout(seconds)
    with connection.makefile("rb") as lines:
        said = json.loads(lines.readline(_LONGEST))
    if not isinstance(said, dict) or said.get("token") != token(node):
        raise ValueError("another program answers there")
    return said


class _Peer(NamedTuple):
    connection: socket.socket
    name: str
    number: int
    ahead: float
    """Seconds that its clock is ahead of the head's."""


def _greet(node: Node, connection: socket.socket, came: dict[int, _Peer]) -> None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        said = _receive(connection, node, 10)
        peer = _Peer(connection, str(said["name"]), int(said["number"]), float(said["time"]) - time.time())
        if 0 < int(said["node"]) < node.nodes:
            came[int(said["node"])] = peer
            return
    connection.close()


def _listen(node: Node) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", node.port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", node.port), backlog=1024)


def _gather(node: Node, listener: socket.socket) -> dict[int, _Peer]:
    came: dict[int, _Peer] = {}
    listener.settimeout(0.1)
    while len(came) < node.nodes - 1 and not node.is_over(GATHER):
        try:
            connection, _ = listener.accept()
        except OSError:
            time.sleep(0.01)
            continue
        threading.Thread(target=_greet, args=(node, connection, came), daemon=True).start()
    return dict(came)


def _answer(node: Node, peer: _Peer, body: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        _send(peer.connection, node, body)
        peer.connection.recv(1)  # it closes first: so no TIME_WAIT is left on torchrun's port


def _lead(node: Node) -> Outcome:
    """The head's side: add what the others send, and send the sum to all."""
    try:
        listener = _listen(node)
    except OSError as error:
        return outcome(False, f"port {node.port} cannot be used: {os.strerror(error.errno or 0)}", name="port")
    with listener:
        came = _gather(node, listener)
    missing = [number for number in range(1, node.nodes) if number not in came]
    # With three clocks, the one that is wrong can be told; with two, the head's counts.
    middle = statistics.median([0.0, *(peer.ahead for peer in came.values())]) if len(came) > 1 else 0.0
    shared = {"sum": 1 + sum(peer.number for peer in came.values()), "missing": missing}
    bodies = [(peer, {**shared, "ahead": peer.ahead - middle}) for peer in came.values()]
    threads = [threading.Thread(target=_answer, args=(node, *each), daemon=True) for each in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(node.left(JOIN))
    peers = {str(number): {"name": peer.name, "ahead": peer.ahead} for number, peer in sorted(came.items())}
    lost = f"; missing: node {', '.join(map(str, missing))} of the job, counted from 0" if missing else ""
    detail = f"{len(came)} of {node.nodes - 1} other nodes came{lost}"
    return outcome(not missing, detail, missing=missing, peers=peers, ahead=0.0 - middle)


def _ask(node: Node) -> Outcome:
    with socket.create_connection((node.head, node.port), timeout=min(5.0, node.left(JOIN))) as connection:
        body = {"node": node.number, "name": node.name, "number": node.number + 1, "time": time.time()}
        _send(connection, node, body)
        said = _receive(connection, node, node.left(JOIN))
    missing = said["missing"]
    expected = node.nodes * (node.nodes + 1) // 2 - sum(number + 1 for number in missing)
    return outcome(said["sum"] == expected, f"the sum of all is {said['sum']} of {expected}", ahead=said["ahead"])


def _join(node: Node) -> Outcome:
    """The side of every other node. That others are missing is not this node's fault."""
    why = ""
    while not node.is_over(JOIN):
        try:
            return _ask(node)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            why = " ".join(str(error).split())
            time.sleep(min(0.2, node.left(JOIN)))
    return outcome(False, f"no answer from the head, {node.head} port {node.port}: {why}")


def exchange(node: Node) -> Outcome:
    """Exchange numbers. Also returns ``ahead``: seconds that this clock is ahead of the others'.

    The head's also has ``missing``, the node numbers that never came, and ``peers``. Where the head cannot have the
    port, the outcome has ``name`` port.
    """
    return _lead(node) if node.number == 0 else _join(node)
