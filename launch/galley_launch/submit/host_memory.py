"""What a node's own memory must hold for training, as far as that is known before it starts."""

from __future__ import annotations

from galley.contract.spec import RunSpec
from galley_launch.cluster.profile import Cluster, megabytes
from galley_launch.recipe import model_facts

# Bytes per parameter of an optimizer on the CPU: weights, first and second moments, each in fp32 (DeepSpeedCPUAdam).
# Gradients come on top, so that this is a lower bound.
_OFFLOADED_BYTES = 12


def megabytes_of_node(spec: RunSpec, cluster: Cluster) -> int:
    """MiB: what the profile asks for, or at least what an offloaded optimizer takes; 0: not known."""
    placement = spec.placement
    if cluster.memory_per_rank:
        return megabytes(cluster.memory_per_rank) * placement.ranks_per_node
    offload = placement.deepspeed.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device") != "cpu" or spec.task.method.kind != "full":
        return 0
    # ZeRO splits the optimizer's state evenly among all ranks, and so among nodes; >> 20: bytes to MiB.
    return (model_facts.of_model(placement.paths.model).parameters or 0) * _OFFLOADED_BYTES // placement.nodes >> 20
