"""A phrase for each kind of failure, and what to do about it: whole sentences, which name Galley's own settings."""

from __future__ import annotations

WORDS = {
    "gpu_oom": "a GPU ran out of memory",
    "host_oom": "a host ran out of memory",
    "nccl": "the network between GPUs (NCCL) failed",
    "gloo": "the network between ranks (gloo) failed",
    "port": "the ranks could not find one another",
    "disk": "a disk is full",
    "hub": "the hub did not return what was requested",
    "node": "a node is broken",
    "hang": "the ranks hung",
    "configuration": "a setting or the environment is wrong",
    "code": "the code raised an error",
    "killed": "it was killed from outside",
    "unverified": "the export could not be verified",
}
"""A phrase for every kind of failure, as ``galley why`` prints it."""

UNVERIFIED = (
    "Read the README in export.unverified/: what differs, and how to use it anyhow. The checkpoint is kept, so that "
    "galley export makes and checks it again; if it does well on data that you know, please report the difference."
)
REPLACE = "Have this node looked at; Galley avoids it from now on (excluded.json), elsewhere set gpus=… without it."
DRIVER = "The node's NVIDIA driver or its GPUs are not usable: have it checked, or use a torch built for its driver."
LESS_MEMORY = (
    "Halve micro_batch= (the global batch stays the same), keep activation_checkpointing=true, shorten "
    "data.max_length=, or shard more: deepspeed=zero3 or deepspeed=zero3_offload_cpu."
)
HOST_MEMORY = (
    "Ask for more host memory (cluster.memory_per_rank=…, or cluster.whole_nodes=true), or need less: no offload to "
    "the CPU (deepspeed=zero3), fewer ranks on a node."
)
SHM = "Give /dev/shm more room: the container's tmpfs, or cluster.memory_per_rank=… where it counts as memory."
DISK_ROOM = "Make room there or raise the quota (cadence.keep= keeps fewer checkpoints), then start the run again."
# Ranks meet in a file (galley.launch_ranks): what keeps a node from it is its start or its disk, not the network.
MEETING = (
    "Look at the log of the node that is missing: did it start there? Then check that all nodes see the same files in "
    "the run's directory (or in GALLEY_MEETING, where that is set)."
)
REACH_HEAD = "Check that every node resolves the head node's name and reaches its port (firewall, cluster.interface=…)."
OTHER_PORT = "Galley takes another port when it tries again; on one box, end whatever holds the port (ss -ltnp)."
ACCESS = "Check the name, ask for access on its page, and give a token: `hf auth login` or HF_TOKEN."
OFFLINE = "Fetch it once where there is a network (galley run … on the login node prepares), or give a folder."
LATER = "The hub or the way to it was down: try again later, or fetch it once and give a folder."
INSTALL = (
    "Install what is missing where the run trains: pip install '.[train]' in a checkout of Galley, into an environment "
    "that on a cluster every compute node sees."
)
EXPORT = "Remove --export from cluster.srun, and unset what the site sets for srun (SRUN_EXPORT_ENV) in cluster.setup."
MODULES = (
    "Correct cluster.modules, cluster.setup or cluster.conda in the cluster's profile; try them on a compute node."
)
HOST_PYTHON = (
    "Name a Python of the nodes that is 3.9 or newer: cluster.host_python=/usr/bin/python3.11; with no container, "
    "leave host_python out, and the environment's own is used."
)
CONTAINER = (
    "Correct cluster.container.image: it must be readable on the compute nodes, and the runtime installed there."
)
REQUEST = "Slurm refuses what the job asks for: correct the cluster's profile (nodes, GPUs, cores, memory)."
LINKS = (
    "Look at the first rank's log, then at the fabric (ibstat, ethtool); NCCL_DEBUG: INFO among cluster.variables says "
    "more, cluster.interface=… names the network to use."
)
LATE_RANK = "A rank came late to a collective or not at all: look for the rank whose log stops first, and at its node."
LOCKED = "Locked memory is limited: have `ulimit -l unlimited` set for jobs (LimitMEMLOCK=infinity for slurmd)."
KILLED = "The user, the cluster or the kernel ended it; the same command goes on from the last checkpoint."
PEERS = "It follows another rank's end: look for the log that stops first, and at that rank's node."
SIGTERM = "Somebody or a service of this machine ended it; the same command goes on from the last checkpoint."
SIGKILL = "Check whether the kernel ran out of memory (dmesg, or the job's MaxRSS): then ask for more host memory."
KERNEL = "A GPU kernel went wrong: CUDA_LAUNCH_BLOCKING=1 shows which; if it never comes back, suspect that GPU."
READ_LOG = "Read the lines around it in the log; the same command goes on from the last checkpoint once it is fixed."
WAITED = (
    "See where that rank stood, and its node's file systems and GPUs; was it only slow, raise cluster.patience of that "
    "phase. It goes on from the last checkpoint."
)
UNFIT = "Have that node looked at; Galley avoids it from now on (excluded.json)."
EVERYWHERE = "Every node says so: the job's request or its environment is wrong (the cluster's profile), not a node."
SCRATCH = "Have that node's local disk cleared, or set cluster.scratch=… to a directory with room on every node."
