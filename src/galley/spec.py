"""The contract between the two planes: what one run is, in one file that every rank reads.

The control plane (``galley_launch``) writes a :class:`RunSpec` as ``run.json``; the data plane (``galley``) reads it
and nothing else. This module imports pydantic and the standard library only, so that a login node can use it.

A ``RunSpec`` is complete (no ``auto``, no environment look-up), frozen, holds no secret and knows nothing of a
scheduler. Its two halves differ in how long they live: ``task`` *is* the run and never changes; ``placement`` may
change from one attempt to the next.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA: Literal[1] = 1

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Part(BaseModel):
    """A frozen piece of the contract; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class Model(Part):
    """The pretrained model that training starts from."""

    path: str
    """Hub id, folder with ``config.json`` and safetensors, or a ``.gguf`` file; as the user wrote it."""
    revision: str | None = None
    """Hub branch, tag or commit. Prepare pins it to a commit. Only for hub ids."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of weights and activations in forward and backward; optimizer state is always fp32."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention implementation that transformers uses."""
    chat_template: str | None = None
    """None: the tokenizer's own. Otherwise ``chatml`` or a ``.jinja`` file; tokens that it needs are added, trained."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships. Off: such a model is refused."""


class Data(Part):
    """Conversations to learn from: one JSON object a row, with ``messages: [{role, content}, …]``."""

    path: str
    """A ``.jsonl`` file or a hub data set id; as the user wrote it."""
    revision: str | None = None
    """Hub branch, tag or commit; only for hub ids."""
    split: str = "train"
    """Which split of a hub data set; not used for files."""
    held_out: Fraction = 0.0
    """Share of rows kept out of training to measure the held-out loss, chosen by the seed. 0: none."""
    held_out_path: str | None = None
    """A ``.jsonl`` file to measure the held-out loss on, instead of a share of ``path``."""
    max_length: Positive = 2048
    """Longest sample in tokens; a packed sample holds whole documents up to this length."""
    packing: bool = True
    """Fill each sample with several documents, none of which attends to another."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What to do with a conversation of more than ``max_length`` tokens; either way it is counted and reported."""


class Method(Part):
    """Which weights learn."""

    kind: Literal["full", "lora", "qlora"] = "lora"
    """``full``: all weights. ``lora``: a low-rank adapter. ``qlora``: an adapter on NF4 weights (bitsandbytes)."""
    rank: Positive = 16
    """Rank of the adapter's matrices."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter's output is scaled by ``alpha / rank``."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Modules that get an adapter: every linear layer but the output head, or a list of module name endings."""


class Optimizer(Part):
    """AdamW (Loshchilov and Hutter, 2019); norms and biases are not decayed."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of matrices."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients accumulate over micro-batches."""


class Schedule(Part):
    """Learning rate over the run: linear warm-up, then a curve."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup: Fraction = 0.03
    """Share of the run's steps in which the rate rises from 0 to ``lr``."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last learning rate as a share of ``lr``; not used by ``constant``."""


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
    """``sft``: next-token cross-entropy on assistant tokens, averaged over the global batch's supervised tokens."""
    method: Method = Method()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    batch: Batch
    duration: Duration
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Settles the split, packing, data order, adapter initialisation and dropout."""

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


class Cadence(Part):
    """How often to log, measure and save. May change between attempts without changing the result."""

    log_every: Positive = 1
    """Steps between lines in the log; ``metrics.jsonl`` has every step."""
    eval_every: Positive | None = None
    """Steps between measurements of the held-out loss; one more at the end. None: only at the end."""
    save_every: Positive | None = None
    """Steps between checkpoints; one more at the end. None: only at the end."""
    keep: Positive = 2
    """Checkpoints kept: the newest this many that verify, and the best by held-out loss."""


class Paths(Part):
    """Absolute places on this machine; they may differ on the next."""

    run: str
    """The run directory."""
    model: str
    """``model.path`` as found here: an absolute path, or the hub id."""
    data: str
    """``data.path`` as found here: an absolute path, or the hub id."""
    held_out: str | None = None
    """``data.held_out_path`` as found here."""
    chat_template: str | None = None
    """``model.chat_template`` as found here: a shipped template's name, or an absolute path."""
    cache: str
    """Where prepared data, converted models and pinned tokenizers are shared between runs."""


class Placement(Part):
    """Where and how this attempt runs. Changing it changes speed and memory, not what is learned."""

    device: Literal["cuda", "cpu"]
    nodes: Positive = 1
    ranks_per_node: Positive = 1
    gpus: list[str] | None = None
    """Devices of this node by index or UUID, one for each rank; None on the CPU, and where a scheduler chooses."""
    sequence: Literal[1] = 1
    """Degree of sequence parallelism."""
    tensor: Literal[1] = 1
    """Degree of tensor parallelism."""
    expert: Literal[1] = 1
    """Degree of expert parallelism."""
    micro_batch: Positive = 1
    """Samples that one rank takes through one forward and backward."""
    accumulation: Positive = 1
    """Micro-batches a rank takes before one optimizer step."""
    threads: Positive = 1
    """CPU threads of each rank."""
    activation_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more computation."""
    deepspeed: dict[str, Any]
    """The finished DeepSpeed configuration: no ``auto``, no optimizer, no scheduler."""
    paths: Paths

    @property
    def data_parallel(self) -> int:
        """Ranks that see different samples."""
        return self.nodes * self.ranks_per_node // (self.sequence * self.tensor)

    @property
    def zero_stage(self) -> int:
        """ZeRO stage (0 to 3) of this attempt."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @model_validator(mode="after")
    def _arithmetic(self) -> Self:
        product = self.micro_batch * self.accumulation * self.data_parallel
        train = self.deepspeed.get("train_batch_size")
        if product != train:
            raise ValueError(
                f"micro_batch {self.micro_batch} x accumulation {self.accumulation} x ranks {self.data_parallel} "
                f"= {product}, but deepspeed.train_batch_size is {train}"
            )
        return self


class Origin(Part):
    """Where the run came from; for people, never read by a rank."""

    recipe: str
    """Recipe file or name."""
    overrides: list[str] = []
    """``key=value`` words of the command line."""
    version: str
    """Version of Galley."""
    commit: str | None = None
    """Git commit of a checkout, with ``+dirty`` where it was changed."""


class RunSpec(Part):
    """One run, complete. Written once for each attempt as ``run.json``, read by every rank."""

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """Name of the run and of its directory."""
    task: Task
    placement: Placement
    cadence: Cadence = Cadence()
    origin: Origin

    @model_validator(mode="after")
    def _batch(self) -> Self:
        want, have = self.task.samples_per_step, self.placement.deepspeed.get("train_batch_size")
        if want != have:
            raise ValueError(f"the task wants {want} samples a step, the placement makes {have}")
        return self

    def to_json(self) -> str:
        """The bytes of ``run.json``."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RunSpec:
        """Read a ``run.json``. Raises ``OSError`` or pydantic's ``ValidationError``."""
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
