"""The arithmetic of the recipes' headers: what a run needs of each GPU and of the disk, from the shapes of its model.

GB are 10^9 bytes. Weights, gradients and optimizer state are exact; activations are an estimate.
"""

from typing import Any

from galley_launch.recipe.schema import Recipe

GB = 1e9
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight in NF4: four bits, a scale in eight bits for 64 of them, one in fp32 for 256 scales."""
CUDA = 1.0
"""GB that CUDA, NCCL, buckets and fragmentation take: a guess."""
PIECE = 128
"""Tokens whose logits are in fp32 at a time (``galley.objective.sft``)."""
Shapes = dict[str, Any]


def _per_layer(shapes: Shapes) -> dict[str, tuple[int, int, int]]:
    """Inputs, outputs and number of each matrix of a layer, by the name that most families give it."""
    hidden, inner, experts = shapes["hidden_size"], shapes["intermediate"], shapes.get("experts", 1)
    queries, keys = shapes["heads"] * shapes["head_dim"], shapes["kv_heads"] * shapes["head_dim"]
    found = {
        "q_proj": (hidden, queries, 1),
        "k_proj": (hidden, keys, 1),
        "v_proj": (hidden, keys, 1),
        "o_proj": (queries, hidden, 1),
        "gate_proj": (hidden, inner, experts),
        "up_proj": (hidden, inner, experts),
        "down_proj": (inner, hidden, experts),
    }
    if shapes["model_type"] == "phi3":
        keep = {name: found[name] for name in ("o_proj", "down_proj")}
        return {**keep, "qkv_proj": (hidden, queries + 2 * keys, 1), "gate_up_proj": (hidden, 2 * inner, 1)}
    return {**found, "router": (hidden, experts, 1)} if experts > 1 else found


def _vectors(shapes: Shapes) -> int:
    """Norms and biases of a layer."""
    hidden, head = shapes["hidden_size"], shapes["head_dim"]
    queries, keys = shapes["heads"] * head, shapes["kv_heads"] * head
    more = {
        "qwen2": queries + 2 * keys,  # biases
        "qwen3": 2 * head,
        "qwen3_moe": 2 * head,
        "gemma3_text": 2 * head + 2 * hidden,
        "olmo2": queries + keys,
        "olmo3": queries + keys,
    }
    return 2 * hidden + more.get(shapes["model_type"], 0)


def linear(shapes: Shapes) -> int:
    """Weights in linear layers, the output head apart."""
    return int(shapes["layers"]) * sum(rows * columns * times for rows, columns, times in _per_layer(shapes).values())


def parameters(shapes: Shapes) -> int:
    """All weights."""
    ends = shapes["vocab"] * shapes["hidden_size"] * (1 if shapes["tied"] else 2)
    return int(linear(shapes) + ends + shapes["layers"] * _vectors(shapes) + shapes["hidden_size"])


def adapter(shapes: Shapes, recipe: Recipe) -> int:
    """Weights of the recipe's adapter; 0 without one."""
    if recipe.method.kind == "full":
        return 0
    chosen, targets = _per_layer(shapes), recipe.method.targets
    sizes = [
        rows + columns for name, (rows, columns, _) in chosen.items() if isinstance(targets, str) or name in targets
    ]
    assert "experts" not in shapes or isinstance(targets, list), "what peft does to experts is not counted here"
    return int(shapes["layers"]) * recipe.method.rank * sum(sizes)


def _base(shapes: Shapes, recipe: Recipe) -> float:
    rest = parameters(shapes) - linear(shapes)
    return linear(shapes) * NF4 + rest * 2 if recipe.method.kind == "qlora" else parameters(shapes) * 2


def memory(shapes: Shapes, recipe: Recipe, stage: int, ranks: int, offload: bool = False) -> dict[str, float]:
    """GB on each GPU under ZeRO ``stage`` 2 or 3, part by part.

    What learns has two bytes of weight, four of gradient and twelve of AdamW. ``offload``: all that is with the CPU.
    """
    added, kept = adapter(shapes, recipe), 1 if stage == 3 else ranks  # kept: how often the weights are there
    found = {"weights": _base(shapes, recipe) * kept / ranks}
    if added:
        found["adapter"] = (2 * kept + 16) / ranks * added
    else:
        found["gradients and AdamW"] = 16 / ranks * parameters(shapes)
    if offload:
        found = {}
    if stage == 3:  # stage3_max_live_parameters of the preset
        found["gathered layers"] = 2.0 * min(1e9, parameters(shapes))
    tokens = recipe.micro_batch * recipe.data.max_length
    hidden, inner = shapes["hidden_size"], shapes["intermediate"] * shapes.get("experts_per_token", 1)
    queries = (shapes["heads"] + 2 * shapes["kv_heads"]) * shapes["head_dim"]
    layer = 2.0 * tokens * (12 * hidden + 3 * queries + 6 * inner)
    found["activations"] = 2.0 * tokens * hidden * shapes["layers"] + layer
    if not recipe.activation_checkpointing:
        found["activations"] = layer * shapes["layers"]
    # In bf16 once, and their gradient; a piece of them at a time in fp32.
    found["logits"] = (4.0 * tokens + 8.0 * PIECE) * shapes["vocab"]
    return {name: size / GB for name, size in found.items()} | {"CUDA and buffers": CUDA}


def disk(shapes: Shapes, recipe: Recipe) -> float:
    """GB: the download, the export, and checkpoints (the newest ones, the best, and one that is being written)."""
    learns = adapter(shapes, recipe) or parameters(shapes)
    return (4 * parameters(shapes) + 12 * learns * (recipe.cadence.keep + 2)) / GB
