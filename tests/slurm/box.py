"""A real Slurm cluster of three nodes on this machine, for as long as the tests run.

Every node is a set of namespaces with its own name, address and processes (``cluster.sh`` says how). Jobs are real
processes; the GPUs are only counted, and time limits and dead nodes are noticed on Slurm's own 30 second clock.
"""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

CLUSTER = Path(__file__).with_name("cluster.sh")
PARTITIONS = ("main", "high", "low", "spot")
# What a job around the tests, or a developer's shell, would leak into them.
_FOREIGN = re.compile(r"(SLURM|SBATCH|SRUN|SALLOC|SQUEUE|SINFO|SACCT|SCONTROL|SCANCEL)_")


def why_not() -> str | None:
    """Why no cluster can be had on this machine; None where it can."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "the Slurm cluster of the tests needs root on Debian"
    command = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "true"]
    if subprocess.run(command, capture_output=True, check=False, timeout=30).returncode:
        return "the Slurm cluster of the tests needs a machine that allows namespaces"
    return None


def end_abandoned() -> None:
    """Take down clusters of test runs that were killed."""
    for marker in Path("/var/tmp").glob("galley-slurm-*/.slurm-box"):
        pid = marker.parent.name.removeprefix("galley-slurm-")
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            Box(marker.parent, 0).cluster("down", check=False)


def install(package: str) -> None:
    """Install a Debian package; does nothing for a user that may not."""
    if os.geteuid() == 0 and shutil.which("apt-get"):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        command = [
            "apt-get",
            "-o",
            "DPkg::Lock::Timeout=300",
            "install",
            "-y",
            "-qq",
            "--no-install-recommends",
            package,
        ]
        for words in (["apt-get", "update", "-qq"], command):
            subprocess.run(words, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=600)


class Box:
    """The cluster under ``state``."""

    def __init__(self, state: Path, size: int) -> None:
        self.state, self.size = state, size
        kept = {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}
        self.env = {**kept, "SLURM_BOX_STATE": str(state), "PATH": f"{state}/bin:{os.environ['PATH']}"}

    def up(self, **settings: str) -> None:
        """Start it; ``settings`` are cluster.sh's, without their prefix: ``KILL_WAIT="30"``."""
        self.env |= {f"SLURM_BOX_{name}": value for name, value in settings.items()}
        self.cluster("up", str(self.size), timeout=600)

    def cluster(self, *words: str, timeout: float = 60, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``cluster.sh`` with these words: ``kill-node node3``, ``boot-node node3``, ``on node1 ps``, ``status``."""
        done = subprocess.run(
            [str(CLUSTER), *words],
            env=self.env,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert not (check and done.returncode), f"cluster.sh {' '.join(words)}: {done.stdout}{done.stderr}"
        return done

    def run(self, *words: str, timeout: float = 30, cwd: Path | None = None) -> tuple[int, str, str]:
        """(status, stdout, stderr) of a command run outside the nodes with the cluster's Slurm on its PATH."""
        done = subprocess.run(
            words,
            env=self.env,
            timeout=timeout,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        return done.returncode, done.stdout, done.stderr

    def sh(self, *words: str, timeout: float = 30, check: bool = True, cwd: Path | None = None) -> str:
        """What such a command prints."""
        status, out, err = self.run(*words, timeout=timeout, cwd=cwd)
        assert not (check and status), f"{' '.join(words)}: {out}{err}"
        return out

    def job(self, job_id: str) -> dict[str, str]:
        """A job's fields as ``scontrol show job`` names them; {} where Slurm does not know it."""
        first, _, rest = self.sh("scontrol", "show", "job", job_id, check=False).partition("\n")
        fields = {"JobName": first.partition(" JobName=")[2]} if first else {}
        for name, equals, value in (word.partition("=") for word in rest.split()):
            if equals:
                fields.setdefault(name, value)  # a comment at the end may look like a field
        return fields

    def wait(self, job_id: str, *states: str, timeout: float = 60) -> dict[str, str]:
        """The job's fields once it is in one of these states."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            fields = self.job(job_id)
            if fields.get("JobState") in states:
                return fields
            time.sleep(0.1)
        raise AssertionError(f"job {job_id} is not {' or '.join(states)} after {timeout} s:\n{self.story(job_id)}")

    def story(self, job_id: str) -> str:
        """All that Slurm says about a job, and the end of the controller's log."""
        shown = self.sh("scontrol", "show", "job", job_id, check=False)
        queue = self.sh("squeue", "-a", check=False)
        log = (self.state / "log" / "slurmctld.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join([shown, queue, *log.splitlines()[-25:]])

    def begin_now(self, job_id: str, timeout: float = 30) -> None:
        """Let a requeued job begin at once: Slurm itself makes it wait for two minutes."""
        self.wait(job_id, "PENDING", timeout=timeout)
        self.sh("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def fail_node(self, node: str) -> None:
        """Have Slurm hold a node for dead, at once; it comes back by itself a moment later."""
        self.sh("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def reset(self) -> None:
        """No job left; every node on, cabled, undrained and idle; every partition up."""
        status = self.cluster("status", check=False).stdout
        if "slurmctld DOWN" in status:
            self.cluster("start-ctld")
        for line in status.splitlines():
            words = line.split()
            if len(words) > 1 and re.fullmatch(r"node\d+", words[0]):
                self.cluster("boot-node" if words[-1] == "off" else "net-up", words[0])
        for name in PARTITIONS:
            self.sh("scontrol", "update", f"PartitionName={name}", "State=UP", check=False)
        self._come_to_rest()

    def _come_to_rest(self) -> None:
        end = time.monotonic() + 90
        while time.monotonic() < end:
            self._end_jobs()
            states = set(self.sh("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split())
            if states == {"idle"} and not self.sh("squeue", "-h", "-a"):
                return
            if any(state.startswith(("drain", "down")) for state in states):
                nodes = f"NodeName=node[1-{self.size}]"
                self.sh("scontrol", "update", nodes, "State=RESUME", check=False)
            time.sleep(0.1)
        raise AssertionError(f"the cluster does not come to rest: {states}\n{self.sh('squeue', '-a', check=False)}")

    def _end_jobs(self) -> None:
        """Jobs may submit others when they end, so this is done again until none is left."""
        if self.sh("squeue", "-h", "-a", check=False):
            self.sh("scancel", "-u", "root", "-t", "PENDING", check=False)
            self.sh("scancel", "--full", "--signal=KILL", "-u", "root", check=False)
            self.sh("scancel", "-u", "root", check=False)
