"""The same training in a few lines of PyTorch: one process, one document at a time, a fp32 copy of each weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from toy import Document, make_spec, write_data

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec

Samples = list[list[Document]]


def adamw(groups: list[dict[str, Any]], lr: float) -> Any:
    import torch

    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)


def plain_losses(
    root: Path, model_folder: Path, samples: Samples,
    scale: Callable[[str], float] = lambda name: 1.0, make: Callable[..., Any] = adamw, ranks: int = 1, **settings: Any,
) -> list[float]:  # fmt: skip
    """The loss of each step. ``scale``: a share of the learning rate for each name; ``make``: another optimizer;
    ``ranks``: of the run whose noise on embeddings is to be drawn again.
    """
    import torch

    from galley.data import batches
    from galley.data.prepared import read_manifest
    from galley.model import model
    from galley.train.schedule import learning_rate

    run = RunDir(root)
    spec = make_spec(run, model_folder, **{"stage": 1} | settings)
    write_data(run, model_folder, samples, None, packed=False)
    torch.manual_seed(spec.task.seed)
    net: Any = model.load(spec, read_manifest(run), torch.device("cpu"))
    names, low = zip(*model.trained(net).items(), strict=True)
    master = [each.detach().float().clone().requires_grad_() for each in low]
    peak, decay = spec.task.optimizer.lr, spec.task.optimizer.weight_decay
    optimizer = make([{"params": [m], "weight_decay": decay if m.dim() >= 2 else 0.0} for m in master], lr=peak)
    order = batches.order(spec.task, len(samples))
    losses = []
    for step in range(1, order.steps + 1):
        terms: list[Any] = []
        count = 0
        drawn = noise(spec, samples, order.batch(step), step, ranks, net) if spec.task.method.neftune else {}
        for index in order.batch(step):
            for tokens, learnt in samples[index]:
                embedded = net.get_input_embeddings()(torch.tensor([tokens])) + drawn.get(index, 0)
                logits = net(inputs_embeds=embedded).logits[0, -learnt - 1 : -1].float()
                terms.append(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[-learnt:]), reduction="sum"))
                count += learnt
        loss = sum(terms) / count
        losses.append(float(loss))
        for copy, gradient in zip(master, torch.autograd.grad(loss, low), strict=True):
            copy.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(master, 1.0)
        rate = learning_rate(spec.task.schedule, peak, step, order.steps)
        for name, group in zip(names, optimizer.param_groups, strict=True):
            group["lr"] = rate * scale(name)
        optimizer.step()
        for weight, copy in zip(low, master, strict=True):
            weight.data.copy_(copy.data)
    return losses


def noise(spec: RunSpec, samples: Samples, ids: list[int], step: int, ranks: int, net: Any) -> dict[int, Any]:
    """What each sample's embeddings get: each rank draws for its micro-batches in turn, padding and all."""
    import torch

    from galley.data import batches
    from galley.data.seeding import step_seed

    method, micro = spec.task.method, spec.placement.micro_batch
    width, found = net.get_input_embeddings().weight.shape[1], {}
    accumulation = len(ids) // (micro * ranks)
    for rank in range(ranks):
        torch.manual_seed(step_seed(spec.task.seed, step, rank, spec.task.seeding))
        for here in batches.share(ids, lambda index: len(samples[index][0][0]) ** 2, micro, accumulation, rank, ranks):
            longest = max(len(samples[index][0][0]) for index in here)
            drawn = torch.rand(len(here), longest, width) * 2 - 1
            for index, each in zip(here, drawn, strict=True):
                size = len(samples[index][0][0])
                found[index] = each[:size] * method.neftune / (size * width) ** 0.5
    return found
