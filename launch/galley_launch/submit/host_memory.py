"""What a node's own memory must hold for training, as far as that is known before it starts."""

from __future__ import annotations

from galley.contract.spec import RunSpec
from galley_launch.cluster.profile import Cluster, megabytes
from galley_launch.recipe import model_facts

# An optimizer on the CPU: weights, first and second moments in fp32 (DeepSpeedCPUAdam); gradients come on top.
_OFFLOADED_BYTES = 12


def megabytes_of_node(spec: RunSpec, cluster: Cluster) -> int:
    """MiB: what the profile asks for, or at least what an offloaded optimizer takes; 0: not known."""
    place = spec.placement
    if cluster.memory_per_rank:
        return megabytes(cluster.memory_per_rank) * place.ranks_per_node
    offload = place.deepspeed.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device") != "cpu" or spec.task.method.kind != "full":
        return 0
    return (model_facts.of_model(place.paths.model).parameters or 0) * _OFFLOADED_BYTES // place.nodes >> 20
