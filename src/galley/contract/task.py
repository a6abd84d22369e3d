"""What to train: the half of the contract that *is* the run. Part of the contract; pydantic and the standard library.

A field whose default changes nothing keeps older ``run.json`` files loading.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from galley.contract.part import Fraction, Part, Positive
from galley.contract.task_data import Data


class Model(Part):
    """The pretrained model that training starts from."""

    path: str
    """Hub id, folder with ``config.json`` and safetensors, or a ``.gguf`` file; as the user wrote it."""
    revision: str | None = None
    """Hub branch, tag or commit. Prepare pins it to a commit. Only for hub ids."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of weights and activations in forward and backward; optimizer state is always fp32.

    ``float16`` is for GPUs without bfloat16: losses are scaled, and a step whose gradients overflow is skipped.
    """
    attention: Literal["sdpa", "varlen", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention implementation that transformers uses. ``varlen``: sdpa, and packed documents by torch's kernel for
    sequences of any length, on a GPU without the flash-attn package."""
    chat_template: str | None = None
    """None: the tokenizer's own. Otherwise ``chatml`` or a ``.jinja`` file; tokens that it needs are added, trained."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships. Off: such a model is refused."""


class Method(Part):
    """Which parameters are trained, and how."""

    kind: Literal["full", "lora", "qlora", "lora_int8"] = "lora"
    """``full``: all weights. ``lora``: a low-rank adapter. ``qlora``: an adapter on NF4 weights (bitsandbytes).
    ``lora_int8``: an adapter on LLM.int8 weights (bitsandbytes)."""
    rank: Positive = 16
    """Rank of the adapter's matrices."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter's output is scaled by ``alpha / rank``."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear", "all-linear+experts"] | list[str] = "all-linear"
    """Modules that get an adapter: every linear layer but the output head (and a mixture's experts, where peft knows
    the family); the same and experts of any family; or a list of name endings."""
    init: Literal["zero", "pissa"] = "zero"
    """How the adapter begins: ``zero`` (it adds nothing), or ``pissa``: as the principal part of the weights, which the
    base then lacks (Meng et al., 2024)."""
    rslora: bool = False
    """Scale the adapter's output by ``alpha / sqrt(rank)`` instead (Kalajdzievski, 2023)."""
    dora: bool = False
    """Train the magnitude of each adapted weight separately from its direction (Liu et al., 2024)."""
    full_modules: list[str] = Field(default_factory=list)
    """Modules trained in full beside the adapter, by the endings of their names, such as ``lm_head``."""
    neftune: Annotated[float, Field(ge=0)] = 0.0
    """Noise on embeddings in training: each within alpha / sqrt(tokens of its document x hidden size); 0: none."""
    freeze: list[str] = Field(default_factory=list)
    """With ``full``: weights that are not trained, as patterns over their names, such as ``model.embed_tokens.*``."""


class Optimizer(Part):
    """How weights follow their gradients; norms and biases are not decayed."""

    name: Literal["adamw", "lion", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """``adamw`` (Loshchilov and Hutter, 2019); ``lion`` (Chen et al., 2023): half the state, wants a third of the rate;
    ``adamw_8bit`` (Dettmers et al., 2022, bitsandbytes): a quarter of the state; ``paged_…``: in memory that a GPU
    shares with its host."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of matrices."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer's rate is this factor times that of the one above it, embeddings below the lowest; 1: all alike."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients accumulate over micro-batches."""

    @field_validator("name", mode="before")
    @classmethod
    def _whole_matrices(cls, name: Any) -> Any:
        if name in ("adafactor", "muon"):
            raise ValueError(f"{name} steps whole matrices, and ZeRO keeps flat slices of them; use adamw or lion")
        return name


class Schedule(Part):
    """Learning rate over the run: linear warm-up, then a curve."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up. ``wsd``: stays at ``lr``, then falls in a line (warm-up, stable, decay)."""
    warmup: Fraction = 0.03
    """Share of the run's steps in which the rate rises from 0 to ``lr``."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last learning rate as a share of ``lr``; not used by ``constant``."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the run's steps, at its end, in which ``wsd`` falls to ``min_lr_ratio``; not used by the others."""


def _exactly_one(part: BaseModel, names: tuple[str, ...]) -> None:
    given = [name for name in names if getattr(part, name) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(names)}, not {' and '.join(given) or 'none'}")


class Batch(Part):
    """The global batch of one optimizer step, whatever the number of ranks. Exactly one of the two."""

    samples: Positive | None = None
    """Samples (packed: sequences of up to ``max_length`` tokens; else: conversations) a step."""
    tokens: Positive | None = None
    """Tokens a step; a multiple of ``data.max_length``, which it is divided by to give samples."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        _exactly_one(self, ("samples", "tokens"))
        return self


class Duration(Part):
    """How long to train. Exactly one of epochs, steps and tokens."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training split; the last step takes what is left. (Extended later, the run goes on with the next
    whole step: of the first epoch's last, short batch, what was missing stays missing.)"""
    steps: Positive | None = None
    """Optimizer steps."""
    tokens: Positive | None = None
    """Tokens of ``max_length``-long samples, rounded up to whole steps."""
    patience: Positive | None = None
    """Stop early after this many evaluations in a row without a better held-out loss."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        _exactly_one(self, ("epochs", "steps", "tokens"))
        return self


class Task(Part):
    """What to train. Fixed for the run's life: it *is* the run."""

    model: Model
    data: Data
    objective: Literal["sft"] = "sft"
    """``sft``: next-token cross-entropy on assistant tokens (plain text: on all), averaged over the global batch's
    supervised tokens."""
    method: Method = Method()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    batch: Batch
    duration: Duration
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Settles the split, packing, data order, adapter initialisation and dropout."""
    seeding: Annotated[int, Field(ge=1, le=2)] = 1
    """How data order and dropout follow from the seed. 2: by arithmetic that no library changes. 1: as runs that were
    begun before there was a choice, which keep it; it rests on details of numpy and Python."""

    @model_validator(mode="after")
    def _tokens_divide(self) -> Self:
        tokens, length = self.batch.tokens, self.data.max_length
        if tokens is not None and tokens % length:
            near = max(1, round(tokens / length)) * length
            raise ValueError(f"batch.tokens {tokens} is not a multiple of data.max_length {length}; try {near}")
        return self

    @property
    def samples_per_step(self) -> int:
        """Samples in the global batch of one step."""
        return self.batch.samples or (self.batch.tokens or 0) // self.data.max_length
