"""``python liger_compare.py MODEL``: how far loss and gradients with Liger's kernels are from those without, relative.

Without a GPU, Triton's interpreter runs the kernels (``TRITON_INTERPRET=1``), with two things that it lacks.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from transformers import AutoModelForCausalLM
from triton.language.extra import libdevice
from triton.runtime import interpreter

from galley.model import kernels

_convert = interpreter._implicit_cvt


def _converted(value: Any) -> Any:
    """A compiled kernel gets numbers in fp32; the interpreter leaves them Python's."""
    if not isinstance(value, float):
        return _convert(value)
    return tl.tensor(interpreter.TensorHandle(numpy.array([value], dtype=numpy.float32), tl.float32), tl.float32)


@triton.jit
def _rsqrt(value):  # type: ignore[no-untyped-def]
    return 1.0 / tl.sqrt(value)


def main(folder: str) -> None:
    if not torch.cuda.is_available():
        interpreter._implicit_cvt, libdevice.rsqrt = _converted, _rsqrt
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.randint(2, 100, (2, 24), device=device)
    found = []
    for liger in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        if liger:
            kernels.use_liger(model)
            assert "Liger" in repr(model.model.layers[0].mlp.forward)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(each.grad for each in model.parameters())])
    print(max(float((one - two).norm() / one.norm()) for one, two in zip(*found, strict=True)))


if __name__ == "__main__":
    main(sys.argv[1])
