"""A small all-reduce between the nodes of a job over TCP, on a port that each job has for itself.

Each node but the head connects and sends one JSON line with a number; the head answers each of them with the sum.
Connections of other programs, and lines that are not of this job, are dropped. The head names a node that never
connects; the others are not blamed for it.
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
    """What shows that a message is from this job's nodes: the attempt's secret, which only its user can read."""
    with contextlib.suppress(FileNotFoundError):
        return node.attempt.secret.read_text(encoding="ascii")
    # Without that file (a preflight that is run by hand): this keeps other jobs out, though not a malicious user.
    return hashlib.sha256(f"{node.attempt.root} {os.environ.get('SLURM_JOB_ID', '')}".encode()).hexdigest()


def _send(connection: socket.socket, node: Node, body: dict[str, Any]) -> None:
    connection.sendall(json.dumps({"token": token(node), **body, "pad": _PAD}).encode() + b"\n")


def _receive(connection: socket.socket, node: Node, seconds: float) -> dict[str, Any]:
    """One message. Raises OSError, ValueError or RecursionError (JSON's) where it is not one of this job's."""
    connection.settimeout(seconds)  # for each read; the threads of peers that send for ever are left behind
    with connection.makefile("rb") as lines:
        message = json.loads(lines.readline(_LONGEST))
    if not isinstance(message, dict) or message.get("token") != token(node):
        raise ValueError("another program answers there")
    return message


class _Peer(NamedTuple):
    connection: socket.socket
    name: str
    number: int
    ahead: float
    """Seconds that its clock is ahead of the head's."""


def _greet(node: Node, connection: socket.socket, peers: dict[int, _Peer]) -> None:
    """Read one connection's message into ``peers``, by node number; close it where it is not of this job's."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        message = _receive(connection, node, 10)
        peer = _Peer(connection, str(message["name"]), int(message["number"]), float(message["time"]) - time.time())
        if 0 < int(message["node"]) < node.nodes:
            peers[int(message["node"])] = peer  # a node that connects again replaces its earlier connection
            return
    connection.close()


def _listen(node: Node) -> socket.socket:
    # IPv6 with IPv4 mapped into it, where the host has both: the head's name may resolve to either on other nodes.
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", node.port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", node.port), backlog=1024)


def _gather(node: Node, listener: socket.socket) -> dict[int, _Peer]:
    """The other nodes that connect before the head's share of the time is over, by node number."""
    peers: dict[int, _Peer] = {}
    listener.settimeout(0.1)
    while len(peers) < node.nodes - 1 and not node.is_over(GATHER):
        try:
            connection, _ = listener.accept()
        except OSError:
            time.sleep(0.01)
            continue
        # A thread for each connection: one that sends nothing (a port scanner) must not keep the nodes waiting.
        threading.Thread(target=_greet, args=(node, connection, peers), daemon=True).start()
    return dict(peers)  # a copy: a late thread may still write into the other one


def _answer(node: Node, peer: _Peer, body: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        _send(peer.connection, node, body)
        # Wait until the peer has closed: it has then read the whole answer, and as the side that closes first it is the
        # one that keeps TIME_WAIT (RFC 9293, section 3.6), so that the head's port is free again.
        peer.connection.recv(1)


def _lead(node: Node) -> Outcome:
    """The head's side: add what the others send, and send the sum to all."""
    try:
        listener = _listen(node)
    except OSError as error:
        return outcome(False, f"port {node.port} cannot be used: {os.strerror(error.errno or 0)}", name="port")
    with listener:
        peers = _gather(node, listener)
    missing = [number for number in range(1, node.nodes) if number not in peers]
    # Of three clocks or more, the median shows which one is wrong, be it the head's; of two, the head's is trusted.
    median = statistics.median([0.0, *(peer.ahead for peer in peers.values())]) if len(peers) > 1 else 0.0
    shared = {"sum": 1 + sum(peer.number for peer in peers.values()), "missing": missing}
    answers = [(peer, {**shared, "ahead": peer.ahead - median}) for peer in peers.values()]
    threads = [threading.Thread(target=_answer, args=(node, *answer), daemon=True) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(node.left(JOIN))
    listed = {str(number): {"name": peer.name, "ahead": peer.ahead} for number, peer in sorted(peers.items())}
    lost = f"; missing: node {', '.join(map(str, missing))} of the job, counted from 0" if missing else ""
    detail = f"{len(peers)} of {node.nodes - 1} other nodes came{lost}"
    return outcome(not missing, detail, missing=missing, peers=listed, ahead=0.0 - median)


def _ask(node: Node) -> Outcome:
    """Send this node's number to the head, and compare the sum that comes back."""
    with socket.create_connection((node.head, node.port), timeout=min(5.0, node.left(JOIN))) as connection:
        body = {"node": node.number, "name": node.name, "number": node.number + 1, "time": time.time()}
        _send(connection, node, body)
        answer = _receive(connection, node, node.left(JOIN))
    missing = answer["missing"]
    # Node n contributes n + 1, so that the head (node 0) counts too: 1 + 2 + … + nodes, less those that are missing.
    expected = node.nodes * (node.nodes + 1) // 2 - sum(number + 1 for number in missing)
    return outcome(answer["sum"] == expected, f"the sum of all is {answer['sum']} of {expected}", ahead=answer["ahead"])


def _join(node: Node) -> Outcome:
    """The side of every other node. That others are missing is not this node's fault."""
    why = ""
    while not node.is_over(JOIN):
        try:
            return _ask(node)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            # Mostly "connection refused": nodes do not start at the same moment, and the head may not listen yet.
            why = " ".join(str(error).split())
            time.sleep(min(0.2, node.left(JOIN)))
    return outcome(False, f"no answer from the head, {node.head} port {node.port}: {why}")


def exchange(node: Node) -> Outcome:
    """Exchange numbers with the other nodes. The outcome also has ``ahead``: seconds by which this clock is ahead.

    The head's outcome also has ``missing``, the numbers of nodes that never connected, and ``peers``. Where the head
    cannot listen on the port, the outcome has ``name`` port instead.
    """
    return _lead(node) if node.number == 0 else _join(node)
