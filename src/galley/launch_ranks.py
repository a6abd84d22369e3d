"""``python -m galley.launch_ranks``: torchrun, with its options, whose ranks meet in a private file.

torchrun's own rendezvous listens on every network interface, asks nobody who they are, and unpickles what it is sent:
whoever reaches that port runs code as the user. Here the store is a file that only its owner can open (torch's
``FileStore``: appended under flock(2), nothing in it is unpickled), and the launcher listens nowhere.

``--rdzv-backend file`` takes ``--rdzv-endpoint DIRECTORY``, which all nodes see and whose file system has locks that
hold between nodes; without it, one node uses a new directory of its own. ``--rdzv-conf rank=N`` numbers the node.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

from torch._C._distributed_c10d import FileStore, PrefixStore
from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)

from galley.contract import stages
from galley.contract.errors import UserError
from galley.contract.rundir import Attempt
from galley.ranks.store import LAUNCHER, STORE, create, meet_nodes, private

BACKEND = "file"
_PATIENCE_S = 300.0
_OWN = "own"
"""Stands for a directory of this node's own: without any endpoint torchrun warns of options that nobody gave."""


class FileRendezvous(RendezvousHandler):
    """The nodes of one job, whose number is known, meet once; none joins or leaves later."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self.run_id, self.nodes = parameters.run_id, parameters.max_nodes
        self.rank = int(parameters.get("rank", 0))
        self.shared = "" if parameters.endpoint == _OWN else parameters.endpoint
        self.own: Path | None = None
        if self.nodes > 1 and not self.shared:
            raise ValueError("several nodes need --rdzv-endpoint DIRECTORY, which they all see")

    def get_backend(self) -> str:
        """The name that ``--rdzv-backend`` has."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """True, so that a rank that used ``env://`` would try to connect to port 0, which fails, and never listen."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Open the file, once all nodes are there.

        Raises ``RendezvousTimeoutError``, naming the nodes that did not come, and ``UserError`` where the file
        system's locks do not hold between nodes.
        """
        if not self.shared:
            self.own = Path(tempfile.mkdtemp(prefix="galley-ranks-"))
        folder = private(self.own or Path(self.shared))
        if self.nodes > 1:
            self._meet(folder)
        path = folder / "store"
        create(path)
        os.environ[STORE] = str(path)  # ranks inherit it
        store = PrefixStore("agents", FileStore(str(path), -1))
        return RendezvousInfo(store, self.rank, self.nodes, RendezvousStoreInfo("127.0.0.1", 0))

    def _meet(self, folder: Path) -> None:
        try:
            missing, locks = meet_nodes(folder, self.rank, self.nodes, _PATIENCE_S)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            missing, locks = [], False
        if missing:
            names = ", ".join(map(str, missing))
            what = f"node {names} of the job (counted from 0) did not come to {folder} within {_PATIENCE_S:.0f} s"
            raise RendezvousTimeoutError(what)
        if not locks:
            what = "file locks do not hold between nodes, and ranks need them to find each other"
            todo = "set variables: {GALLEY_MEETING: a directory with such locks, e.g. your home} in the profile"
            raise UserError(str(folder), what, f"{todo} (Lustre: mount with flock; BeeGFS: tuneUseGlobalFileLocks)")

    def is_closed(self) -> bool:
        """Never: nobody joins later."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """Nobody joins later."""
        return 0

    def get_run_id(self) -> str:
        """``--rdzv-id``."""
        return self.run_id

    def shutdown(self) -> bool:
        """Remove the directory that was made for this node alone."""
        if self.own:
            shutil.rmtree(self.own, ignore_errors=True)
        return True


def main(argv: list[str]) -> int:
    """Run torchrun's command line, with ``--rdzv-backend file`` among its choices. Returns the exit status."""
    rendezvous_handler_registry.register(BACKEND, FileRendezvous)
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"  # as many ranks on each node: no exchange to number them
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        torchrun.main(argv if "--rdzv-endpoint" in argv else ["--rdzv-endpoint", _OWN, *argv])
    except UserError as error:
        print(f"galley: {error}", file=sys.stderr, flush=True)
        if folder := os.environ.get("GALLEY_ATTEMPT_DIR"):
            from galley.ranks.stage import record_error  # The spec's schemas, a tenth of the start, are for this alone.

            record_error(Attempt(Path(folder)), stages.TRAIN.name, 2, str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
