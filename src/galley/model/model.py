"""The model that is trained: loaded or built sharded, quantised, with its adapter, ready for the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.integrations import HfDeepSpeedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import Model, RunSpec
from galley.data.prepared import Manifest
from galley.model import kernels, neftune, pissa, zero3_load
from galley.model.adapter import attach_adapter, experts_without, freeze, left_out, missed
from galley.model.attention import BY_DOCUMENT
from galley.model.loading import refuse_missing
from galley.model.towers import auto_class, freeze_unused
from galley.storage.weights import weight_files

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def implementation(model: Model) -> str:
    """What transformers calls the model's attention."""
    return "sdpa" if model.attention == "varlen" else model.attention


QUANTISED = ("qlora", "lora_int8")
"""Kinds of method whose base is quantised."""


def quantisation(model: Model, kind: str) -> BitsAndBytesConfig:
    """``lora_int8``: LLM.int8 (Dettmers et al., 2022). ``qlora``: NF4 with double quantisation (ditto, 2023).

    NF4's packed weights are stored in the compute dtype, without which ZeRO-3 cannot shard them beside the adapter.
    """
    if kind == "lora_int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = DTYPES[model.dtype]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def load_plain(folder: str, model: Model, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Load ``folder`` with plain transformers: also what an export is checked with."""
    return _whole(
        folder,
        dtype=dtype,
        attn_implementation=implementation(model),
        trust_remote_code=model.trust_remote_code,
        device_map={"": device},
    )


def _whole(folder: str, **how: Any) -> Any:
    """What ``from_pretrained`` gives. Raises ``UserError`` where it made up weights that the files lack."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=how["trust_remote_code"])
    # transformers initialises what the files lack, and only logs it.
    loaded, info = auto_class(config).from_pretrained(folder, output_loading_info=True, **how)
    refuse_missing(folder, info)
    return loaded


def load_quantised(folder: str, model: Model, kind: str, device: torch.device) -> Any:
    """Load ``folder`` with its linear layers as the ``kind`` of method quantises them.

    On a CPU, bitsandbytes repacks weights in place (and not without loss) the first time that a layer runs in
    evaluation mode: measuring would change what is trained, and break what ZeRO-3 has sharded. That is turned off.
    """
    loaded = _whole(
        folder,
        dtype=DTYPES[model.dtype],
        attn_implementation=implementation(model),
        trust_remote_code=model.trust_remote_code,
        quantization_config=quantisation(model, kind),
        device_map={"": str(device)},
    )
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return loaded


def _load_sharded(folder: str, spec: RunSpec) -> Any:
    model, dtype = spec.task.model, DTYPES[spec.task.model.dtype]
    how = {"dtype": dtype, "attn_implementation": implementation(model), "trust_remote_code": model.trust_remote_code}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)

    def build() -> Any:
        return auto_class(config).from_config(config, **how)

    if stored_as_named(folder, model):
        return zero3_load.load(folder, build, spec.placement.deepspeed)
    # transformers converts such weights as it loads (experts, mostly), on rank 0, which needs them all in memory.
    # from_pretrained asks a weak reference whether ZeRO-3 is on (transformers.integrations.deepspeed), so that the
    # object must live exactly as long as the call.
    with_zero3 = HfDeepSpeedConfig(spec.placement.deepspeed)
    loaded = _whole(folder, **how)
    del with_zero3
    zero3_load.restore_buffers(loaded, folder, build)
    return loaded


def parameter_names(folder: str, model: Model) -> dict[str, str]:
    """Every parameter's name, tied duplicates included, to the one name under which training knows it."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        empty = auto_class(config).from_config(config, trust_remote_code=model.trust_remote_code)
    empty.tie_weights()
    # Tied parameters are one tensor: named_parameters() gives it once, under the first of its names.
    first: dict[int, str] = {}
    named = empty.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def stored_as_named(folder: str, model: Model) -> bool:
    """Whether the files of ``folder`` hold every parameter under the model's own name."""
    files = weight_files(folder)
    return set(parameter_names(folder, model).values()) <= set(files)


def _with_adapter(model: Any, spec: RunSpec, manifest: Manifest) -> Any:
    if manifest.model.added_token_ids and spec.placement.zero_stage == 3:
        what = f"peft cannot train added tokens {manifest.model.added_tokens} beside an adapter under ZeRO-3"
        raise UserError("deepspeed", what, "use deepspeed=zero2, or method.kind=full")
    torch.manual_seed(spec.task.seed)
    lines = left_out(model, spec.task.method)
    wrapped = begun_adapter(model, spec, manifest, RunDir(Path(spec.placement.paths.run)))
    for line in lines + missed(model, spec.task.method):
        print(line)
    if experts := experts_without(wrapped):
        print(f"no adapter on the experts' {', '.join(experts)}: method.targets=all-linear+experts gives them one")
    return wrapped


def begun_adapter(base: Any, spec: RunSpec, manifest: Manifest, run: RunDir) -> Any:
    """``base`` with the adapter as it was before the first step of ``run``."""
    wrapped = attach_adapter(base, spec.task.method, manifest)
    if spec.task.method.init == "pissa":
        pissa.apply(wrapped, run.adapter_init, DTYPES[spec.task.model.dtype])
    return wrapped


def begin_adapter(spec: RunSpec, manifest: Manifest, path: Path) -> None:
    """Write the beginning of a PiSSA adapter to ``path``."""
    base = load_plain(manifest.model.path, spec.task.model, DTYPES[spec.task.model.dtype])
    print("pissa: decomposing the model's weights (once)", flush=True)
    pissa.make(attach_adapter(base, spec.task.method, manifest), spec.task.seed, path)


def _set_precision(model: Any, spec: RunSpec) -> None:
    """Hold what is trained in fp32 where DeepSpeed keeps no fp32 copy of its own (ZeRO-0 computes under autocast)."""
    keeps_master = spec.placement.zero_stage > 0  # ZeRO-1 to 3 step fp32 copies, and round them into these weights
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[spec.task.model.dtype] if keeps_master else torch.float32)


def load(spec: RunSpec, manifest: Manifest, device: torch.device) -> Any:
    """The model of ``spec`` with what its method trains marked ``requires_grad``.

    Under ZeRO-3 it comes back sharded, except for quantised weights: the engine shards those when it is made.
    """
    try:
        return _load(spec, manifest, device)
    except ValueError as error:
        if "attention implementation" not in str(error):
            raise
        what = f"{manifest.model.source!r} does not support {spec.task.model.attention!r}"
        raise UserError("model.attention", what, "use model.attention=eager") from error


def _attends_by_document(spec: RunSpec, manifest: Manifest) -> bool:
    """Whether attention is computed document by document: on a CPU, where that is quicker than a dense mask, and on a
    GPU where torch's kernel was asked for (``varlen``). Raises ``UserError`` where that would compute something else.
    """
    asked = spec.task.model.attention == "varlen"
    if asked and manifest.packed and not manifest.model.attends_by_document:
        what = f"varlen is not what {manifest.model.source!r} computes, as a tiny copy of it shows"
        raise UserError("model.attention", what, "use model.attention=sdpa")
    sdpa_on_cpu = spec.task.model.attention == "sdpa" and spec.placement.device == "cpu"
    return manifest.packed and manifest.model.attends_by_document and (asked or sdpa_on_cpu)


def _load(spec: RunSpec, manifest: Manifest, device: torch.device) -> Any:
    task, placement, folder = spec.task, spec.placement, manifest.model.path
    if task.method.kind in QUANTISED:
        model = load_quantised(folder, task.model, task.method.kind, device)
    elif placement.zero_stage == 3:
        model = _load_sharded(folder, spec)
    else:
        model = load_plain(folder, task.model, DTYPES[task.model.dtype], str(device))
    # The order matters: kernels replace plain layers, an adapter wraps what is there by then, and only what is trained
    # at the end is known to need fp32. Compilation takes the layers as they then are.
    if _attends_by_document(spec, manifest):
        model.set_attn_implementation(BY_DOCUMENT)
    if placement.liger:
        kernels.use_liger(model)
    if placement.activation_checkpointing:
        _checkpoint_activations(model)
    if frozen := freeze_unused(model):
        print(f"not trained, for text does not pass through them: {frozen}")
    if task.method.kind != "full":
        model = _with_adapter(model, spec, manifest)
    freeze(model, task.method.freeze)
    if not (task.method.kind == "full" and placement.zero_stage == 3):  # sharded already, in the dtype of the config
        _set_precision(model, spec)
    setattr(model, neftune.ALPHA, task.method.neftune)
    if placement.compile:
        compile_layers(model)
    model.train()
    return model


def _checkpoint_activations(model: Any) -> None:
    if not model.supports_gradient_checkpointing:
        what = f"transformers has no activation checkpointing for a {model.config.model_type} model"
        raise UserError("activation_checkpointing", what, "use activation_checkpointing=false")
    # The re-entrant kind needs an input that requires a gradient, which frozen embeddings under an adapter do not give.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def compile_layers(model: Any) -> None:
    """Compile each repeated block by itself: one compilation serves them all, and hooks between stay as they are."""
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.compile(dynamic=True)  # one variant, so that a resumed run takes the same


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """Name to parameter, of everything that is trained, in the model's own order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
