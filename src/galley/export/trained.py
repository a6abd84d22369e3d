"""What was trained, as a checkpoint and its base hold it: what an export is built from and compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from galley.checkpoint.checkpoint import Reader
from galley.contract.rundir import Checkpoint, RunDir, read_json
from galley.contract.spec import RunSpec
from galley.data.prepared import Manifest
from galley.export import lowrank, weightcheck
from galley.model import model
from galley.storage.weights import weight_files


@dataclass
class Trained:
    """The weights of one checkpoint, and the base below them, which is loaded afresh each time it is asked for."""

    spec: RunSpec
    run: RunDir
    manifest: Manifest
    checkpoint: Checkpoint

    def __post_init__(self) -> None:
        self.reader = Reader(self.checkpoint)
        self.device = _device(self.spec, self.manifest)
        self.dtype = model.DTYPES[self.spec.task.model.dtype]
        self.folder = self.manifest.model.path
        self.stage = int((read_json(self.checkpoint.manifest) or {})["zero_stage"])

    def quantised(self) -> Any:
        """The quantised base."""
        task = self.spec.task
        return model.load_quantised(self.folder, task.model, task.method.kind, torch.device(self.device))

    def base(self) -> Any:
        """What the adapter is merged into: the base, dequantised where it was quantised."""
        if self.spec.task.method.kind in model.QUANTISED:
            return self.quantised().dequantize(dtype=self.dtype)
        return model.load_plain(self.folder, self.spec.task.model, self.dtype, self.device)

    def as_trained(self, name: str) -> torch.Tensor:
        """A trained parameter, flattened, in the precision that the forward pass used.

        Under ZeRO-0 peft's own layers compute in fp32; modules that are trained in full go through autocast.
        """
        rounded = self.stage > 0 or ".modules_to_save." in name
        return self.reader.whole(name).to(self.dtype if rounded else torch.float32)

    def attach(self, base: Any) -> Any:
        """The adapter with the checkpoint's weights, in the precision that the forward pass used."""
        wrapped = model.begun_adapter(base, self.spec, self.manifest, self.run)
        for name, parameter in model.trained(wrapped).items():
            parameter.data = self.as_trained(name).view(parameter.shape).to(parameter.device)
        return wrapped

    def base_tensors(self) -> tuple[lowrank.Tensors, list[str]]:
        """Reads the base's tensors by name, one at a time where files have them so; and the names of its buffers."""
        task = self.spec.task
        if task.method.kind in model.QUANTISED or not model.stored_as_named(self.folder, task.model):
            base = self.base()
            held = dict(base.named_parameters()) | dict(base.named_buffers())
            return lambda name: held[name].data, [name for name, _ in base.named_buffers()]
        return weightcheck.tensors_of(self.folder), list(weight_files(self.folder))


def _device(spec: RunSpec, manifest: Manifest) -> str:
    """A GPU where two copies of the unquantised model fit (the base, and the merged model that is compared with it),
    else the CPU.
    """
    if spec.placement.device == "cpu" or not torch.cuda.is_available():  # a job of its own may have no GPU
        return "cpu"
    width = 4 if spec.task.model.dtype == "float32" else 2
    free, _ = torch.cuda.mem_get_info(0)  # bytes, as width is bytes a weight; a tenth for activations of the probes
    return "cuda:0" if 2.2 * width * manifest.model.parameters < free else "cpu"
