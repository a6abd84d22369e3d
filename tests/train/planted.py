"""Runs without training: a checkpoint and probes as an engine would leave them, and exports with planted faults.

The engine's part is played by the same model with other kernels (eager attention, one thread): what differs between
the two is rounding, as it is between an engine and plain transformers.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import toy
from safetensors.torch import load_file, save_file

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.prepared import Manifest, open_split, read_manifest
from galley.export import export
from galley.export.checks import Check
from galley.model import model
from galley.objective import sft
from galley_launch.recipe import model_facts as facts
from recipes import twins

SAMPLES = [[document] for document in toy.make_documents(6, shortest=16, longest=48)]
NORM, SMALL = 2e-2, 5e-4
"""What an adapter adds to a weight, as a share of its size: at a usual learning rate, and after a few steps."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A run to be exported."""

    architecture: str
    """A recipe's model on the hub, of which a twin is made, or a name in ``EXTRA``."""
    method: str = "lora"
    dtype: str = "bfloat16"
    size: float = NORM
    task: dict[str, Any] = field(default_factory=dict)
    """Settings of the method beside its kind and rank."""
    stage: int = 2
    added: tuple[int, ...] = ()
    """Ids of added tokens."""

    def __str__(self) -> str:
        return "-".join([self.architecture.rpartition("/")[2], self.method, self.dtype, *map(str, self.task)])


EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 (biases)": ("qwen2", {"tie_word_embeddings": False}),
    "deepseek_v3 (fp32 buffers)": ("deepseek_v3", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "n_shared_experts": 1,
    }),
    "gpt2 (transposed)": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 128}),
}  # fmt: skip
"""Architectures of no recipe that have what theirs lack."""
ARCHITECTURES = {
    "llama": "HuggingFaceTB/SmolLM2-135M-Instruct", "llama (untied)": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3": "Qwen/Qwen3-0.6B", "qwen3_moe": "Qwen/Qwen3-30B-A3B-Instruct-2507", "gemma3_text": "google/gemma-3-1b-it",
    "mistral": "mistralai/Mistral-7B-Instruct-v0.3", "phi3": "microsoft/Phi-4-mini-instruct",
    "olmo2": "allenai/OLMo-2-0425-1B-Instruct", "olmo3": "allenai/Olmo-3-7B-Instruct",
    "smollm3": "HuggingFaceTB/SmolLM3-3B", "qwen2": "qwen2 (biases)", "deepseek_v3": "deepseek_v3 (fp32 buffers)",
    "gpt2": "gpt2 (transposed)",
}  # fmt: skip
"""What sweeps are over: the recipes' families, and a few more; with a model of each."""
SIZES: dict[str, Any] = {
    "vocab_size": toy.VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


def make_model(folder: Path, architecture: str) -> Path:
    """Save a two-layer model of the architecture, weights in bf16 as real ones are (but for what is kept in fp32)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"vocab_size": toy.VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    if architecture in EXTRA:
        kind, more = EXTRA[architecture]
        settings = (SIZES if kind != "gpt2" else ids) | more
    else:
        kind, settings = facts.table()[architecture]["model_type"], twins.settings(architecture) | ids
    torch.manual_seed(1)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if name.endswith(("bias", "norm.weight")) and tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))  # biases are 0 and norms 1 in a fresh model
            elif tensor.dim() >= 2 and isinstance(tensor, torch.nn.Parameter):
                tensor.mul_(3.0)  # so that likelihoods are not all alike
    keep = made._get_dtype_plan(torch.bfloat16)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if tensor.is_floating_point() and not any(part in name for part in keep) and "inv_freq" not in name:
            tensor.data = tensor.data.to(torch.bfloat16)
    made.save_pretrained(folder)
    return folder


def make_run(root: Path, folder: Path, case: Case) -> tuple[RunSpec, RunDir, Manifest]:
    """A run of ``case`` whose checkpoint and probes are made up."""
    run = RunDir(root)
    method = {"kind": case.method, "rank": 4, "alpha": 8} | case.task
    spec = toy.make_spec(run, folder, stage=case.stage, dtype=case.dtype, task={"method": method})
    data = _as_text(folder)
    toy.write_data(run, data, SAMPLES, None, packed=False)
    toy.write_tokenizer(run.data / "tokenizer")
    manifest = read_manifest(run)
    if case.added:
        named = {"added_tokens": [f"w{i}" for i in case.added], "added_token_ids": list(case.added)}
        manifest = manifest.model_copy(update={"model": manifest.model.model_copy(update=named)})
        run.data_manifest.write_text(manifest.model_dump_json(by_alias=True))
    write_checkpoint(spec, run, manifest, case)
    return spec, run, manifest


def _as_text(folder: Path) -> Path:
    """``toy`` reads a few fields from config.json by their usual names."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    usual = {"hidden_size": config.get("n_embd"), "num_hidden_layers": config.get("n_layer")}
    path.write_text(json.dumps({key: value for key, value in usual.items() if value} | config))
    return folder


def write_checkpoint(spec: RunSpec, run: RunDir, manifest: Manifest, case: Case) -> None:
    """What training would have left: weights that have moved, and the logits of the engine's model."""
    dtype, device = model.DTYPES[case.dtype], torch.device("cpu")
    if spec.task.method.init == "pissa":
        model.begin_adapter(spec, manifest, run.adapter_init)
    torch.manual_seed(2)
    if case.method in model.QUANTISED:
        engine = model.load_quantised(str(run_model(spec)), spec.task.model, case.method, device)
    else:
        engine = model.load_plain(str(run_model(spec)), spec.task.model, dtype)
    if case.method != "full":
        engine = model.begun_adapter(engine, spec, manifest, run)
    parameters = model.trained(engine)
    weights = {name: moved(name, each.detach().float(), case.size) for name, each in parameters.items()}
    for name, each in parameters.items():
        narrow = case.stage > 0 or ".modules_to_save." in name or case.method == "full"
        each.data = weights[name].to(dtype if narrow else torch.float32)
    checkpoint = run.checkpoint(6)
    checkpoint.root.mkdir(parents=True)
    layout = [(name, 0, value.numel(), number, 0) for number, (name, value) in enumerate(weights.items())]
    flats = {f"weight.{number}": value.reshape(-1) for number, value in enumerate(weights.values())}
    files = {"rank-00000.safetensors": flats, "probes.safetensors": probes(engine, run, device)}
    for name, tensors in files.items():
        save_file(tensors, checkpoint.root / name, metadata={"fragments": json.dumps(layout)})
    sizes = {name: (checkpoint.root / name).stat().st_size for name in files}
    facts = {"files": sizes, "step": 6, "world": 1, "zero_stage": case.stage, "state": {"step": 6}}
    checkpoint.manifest.write_text(json.dumps(facts))


def run_model(spec: RunSpec) -> Path:
    return Path(spec.placement.paths.model)


def moved(name: str, value: torch.Tensor, size: float) -> torch.Tensor:
    """A weight after training: a little elsewhere, and an adapter's B no longer zero."""
    noise = torch.randn_like(value)
    if ".lora_B." in name or ".lora_embedding_B." in name:
        return noise * size / 4
    scale = value.std() if value.numel() > 1 and float(value.std()) > 0 else torch.tensor(1.0)
    return value + size * scale * noise


def probes(engine: Any, run: RunDir, device: torch.device) -> Tensors:
    """The engine's logits: other kernels than an export is checked with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    getattr(engine, "get_base_model", lambda: engine)().set_attn_implementation("eager")
    batch = sft.probe_batch(open_split(run), device)
    logits = sft.probe_outputs(engine, batch)
    torch.set_num_threads(before)
    return {"tokens": batch.tokens, "targets": batch.targets, "logits": logits}


Fault = Callable[["Scene", Path], bool]
"""Damages an export's folder; False where there is nothing of the kind to damage."""


@dataclass
class Scene:
    """What a fault needs beside the folder that it damages."""

    base: Path
    other: Path
    """The same part of another run's export."""
    scaled: Path | None = None
    """The same part of the same run's export, but for an adapter scaled by 10 % more."""


class Exported:
    """A healthy export of a case, from which damaged copies are made and checked."""

    def __init__(self, root: Path, case: Case, alpha: float = 1.0) -> None:
        """``alpha``: factor by which the export, not the training, scales the adapter."""
        base = root / "base"
        if not base.exists():
            make_model(base, case.architecture)
        self.root, self.case = root, case
        self.spec, self.run, _ = make_run(root / "run", base, case)
        exporter = export.Exporter(
            self._rescaled(alpha), self.run, read_manifest(self.run), self.run.checkpoint(6), root / "export"
        )
        self.words: dict[str, tuple[Any, ...]] = {}
        """What the two checks were called with."""
        for name in ("check_model", "check_adapter"):
            setattr(exporter, name, self._kept(name, getattr(exporter, name)))
        self.exporter = exporter
        exporter.build()
        assert not exporter.failures, exporter.failures
        self.checks = dict(exporter.checks)

    def _rescaled(self, factor: float) -> RunSpec:
        method = self.spec.task.method.model_copy(update={"alpha": factor * self.spec.task.method.alpha})
        return self.spec.model_copy(update={"task": self.spec.task.model_copy(update={"method": method})})

    def _kept(self, name: str, check: Callable[..., None]) -> Callable[..., None]:
        def call(*words: Any) -> None:
            self.words[name] = words
            check(*words)

        return call

    def damaged(self, part: str, fault: Fault, scene: Scene) -> Check | str | None:
        """The check of a copy with the fault; why it does not even load; None where it cannot have that fault."""
        folder = self.root / "damaged" / part
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.exporter.out / part, folder)
        if not fault(scene, folder):
            return None
        self.exporter.checks.clear()
        words = self.words[f"check_{part}"][1:]
        if part == "adapter":
            quantised, trained = self.case.method in model.QUANTISED, self.exporter.trained
            words = (trained.quantised() if quantised else trained.base(), *words[1:])
        try:
            getattr(self.exporter, f"check_{part}")(folder, *words)
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return self.exporter.checks[part]


def weights_of(folder: Path) -> Tensors:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def write_weights(folder: Path, tensors: Tensors) -> None:
    (path,) = folder.glob("*.safetensors")
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def _edit(change: Callable[[Scene, Tensors, Tensors], Tensors | None]) -> Fault:
    """A fault that changes tensors: it gets the export's and the base's, and returns those that are not the same."""

    def fault(scene: Scene, folder: Path) -> bool:
        tensors = weights_of(folder)
        changed = change(scene, tensors, weights_of(scene.base))
        if not changed or all(name in tensors and torch.equal(tensors[name], each) for name, each in changed.items()):
            return False
        write_weights(folder, tensors | changed)
        return True

    return fault


def _matrices(tensors: Tensors, layer: str = "1") -> list[str]:
    return [name for name, each in tensors.items() if each.dim() == 2 and f".{layer}." in name]


def _stale(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    return {name: base[name].to(tensors[name].dtype) for name in tensors if ".1." in name and name in base}


def _unadapted(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    return {name: base[name].to(each.dtype) for name, each in tensors.items() if name in base}


def _another_run(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    return weights_of(scene.other)


def _transposed(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    square = [name for name in _matrices(tensors) if tensors[name].shape[0] == tensors[name].shape[1]]
    return {name: tensors[name].T for name in square[:1]}


def _swapped(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    first = next(iter(_matrices(tensors)), None)
    other = first and first.replace(".1.", ".0.")
    return {first: tensors[other], other: tensors[first]} if first and other in tensors else {}


def _pair(tensors: Tensors, one: str, two: str) -> Tensors:
    names = [name for name in tensors if f".1.{one}" in name]
    pairs = {name: name.replace(one.rpartition(".")[2], two.rpartition(".")[2]) for name in names}
    changed: Tensors = {}
    for a, b in pairs.items():
        if b in tensors and tensors[a].shape == tensors[b].shape:
            changed |= {a: tensors[b], b: tensors[a]}
    return changed


def _exchanged(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    """q and k of one layer, or where these have unlike shapes k and v, or gate and up."""
    for one, two in (("self_attn.q_proj", "k_proj"), ("self_attn.k_proj", "v_proj"), ("mlp.gate_proj", "up_proj")):
        found = {name: each for name, each in _pair(tensors, one, two).items() if each.dim() == 2}
        if found:
            return found
    return {}


def _scaled(share: float, tensors: Tensors, base: Tensors) -> Tensors:
    found = {}
    for name, each in tensors.items():
        if name in base and each.is_floating_point():
            before = base[name].float()
            found[name] = (before + share * (each.float() - before)).to(each.dtype)
    return found


def _rescaled(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    return weights_of(scene.scaled) if scene.scaled else _scaled(1.1, tensors, base)


def _one_rescaled(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    moved = [name for name in _matrices(tensors) if not torch.equal(tensors[name], base[name].to(tensors[name]))]
    return {name: _rescaled(scene, tensors, base)[name] for name in moved[:1]}


def _bias_dropped(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    return {name: torch.zeros_like(each) for name, each in tensors.items() if ".1." in name and name.endswith("bias")}


def _norms_swapped(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    norms = [name for name in tensors if ".1." in name and name.endswith("norm.weight") and "_norm.weight" not in name]
    norms = [name for name in norms if len(tensors[name]) == 64]
    return {norms[0]: tensors[norms[1]], norms[1]: tensors[norms[0]]} if len(norms) > 1 else {}


def _wrong_cast(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    """Through a narrower type: eight bits for bf16 and fp16, bf16 for fp32."""
    found = {}
    for name in _matrices(tensors):
        dtype = tensors[name].dtype
        through = torch.bfloat16 if dtype == torch.float32 else torch.float8_e5m2
        found[name] = tensors[name].to(through).to(dtype)
    return found


def _one_weight(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    name = _matrices(tensors)[0]
    value = tensors[name].clone()
    value[3, 5] = -2 * value[3, 5] - 0.01
    return {name: value}


def _rows_missing(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    name = next(each for each in tensors if each.endswith(("embed_tokens.weight", "wte.weight")))
    rows = torch.where((tensors[name] != base[name].to(tensors[name].dtype)).any(1))[0]
    if not 0 < len(rows) < 10:
        return {}
    return {name: base[name].to(tensors[name].dtype)}


def _experts_swapped(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    one = [name for name in tensors if ".1." in name and ".experts.0." in name]
    pairs = {name: name.replace(".experts.0.", ".experts.1.") for name in one}
    return {a: tensors[b] for a, b in pairs.items()} | {b: tensors[a] for a, b in pairs.items()}


def _untied(scene: Scene, folder: Path) -> bool:
    tensors = weights_of(folder)
    tied = "lm_head.weight" not in tensors
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    if name not in tensors:
        return False
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tie_word_embeddings": not tied}))
    if tied:
        write_weights(folder, tensors | {"lm_head.weight": tensors[name].flip(0)})
    else:
        write_weights(folder, {key: each for key, each in tensors.items() if key != name})
    return True


def _configured(scene: Scene, folder: Path) -> bool:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = "layer_norm_epsilon" if "layer_norm_epsilon" in config else "rms_norm_eps"
    if key not in config:
        return False
    path.write_text(json.dumps(config | {key: 1e-2}))
    return True


MODEL_FAULTS: dict[str, Fault] = {
    "the adapter is missing": _edit(_unadapted),
    "the adapter of another run": _edit(_another_run),
    "a matrix is transposed": _edit(_transposed),
    "two layers' matrices are swapped": _edit(_swapped),
    "q and k (k and v, gate and up) are swapped": _edit(_exchanged),
    "one layer is stale": _edit(_stale),
    "the scale is off by 10 %": _edit(_rescaled),
    "the scale is off by 10 %, of one matrix": _edit(_one_rescaled),
    "a bias is dropped": _edit(_bias_dropped),
    "two norms are swapped": _edit(_norms_swapped),
    "a wrong cast": _edit(_wrong_cast),
    "one weight is wrong": _edit(_one_weight),
    "rows of added tokens are missing": _edit(_rows_missing),
    "two experts are swapped": _edit(_experts_swapped),
    "the head is (un)tied": _untied,
    "a setting of the model": _configured,
}
"""What can go wrong with a model's folder."""


def _in_configuration(**change: Callable[[Any], Any]) -> Fault:
    def fault(scene: Scene, folder: Path) -> bool:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        new = config | {key: alter(config[key]) for key, alter in change.items()}
        path.write_text(json.dumps(new))
        return bool(new != config)

    return fault


def _factors_swapped(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    for one, two in (("q_proj", "k_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj")):
        names = [name for name in tensors if ".1." in name and f".{one}.lora_A" in name]
        pairs = [(name, name.replace(one, two)) for name in names if name.replace(one, two) in tensors]
        if pairs:
            return {a: tensors[b] for a, b in pairs} | {b: tensors[a] for a, b in pairs}
    return {}


def _layer_zero(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    return {name: torch.zeros_like(each) for name, each in tensors.items() if ".1." in name and ".lora_B" in name}


def _without(part: str) -> Fault:
    def fault(scene: Scene, folder: Path) -> bool:
        tensors = weights_of(folder)
        left = {
            name: each for name, each in tensors.items() if part not in name or (".1." not in name and ".0." in name)
        }
        if len(left) == len(tensors):
            return False
        write_weights(folder, left)
        return True

    return fault


def _factor_transposed(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    name = next(each for each in tensors if ".1." in each and ".lora_A" in each)
    return {name: tensors[name].T.reshape(tensors[name].shape)}


def _factors_cast(scene: Scene, tensors: Tensors, base: Tensors) -> Tensors:
    through = {torch.float32: torch.bfloat16}
    return {n: e.to(through.get(e.dtype, torch.float8_e5m2)).to(e.dtype) for n, e in tensors.items() if "lora_A" in n}


ADAPTER_FAULTS: dict[str, Fault] = {
    "of another run": _edit(_another_run),
    "alpha is off by 10 %": _in_configuration(lora_alpha=lambda alpha: 1.1 * alpha),
    "scaled as rslora": _in_configuration(use_rslora=lambda given: not given),
    "one layer adds nothing": _edit(_layer_zero),
    "A of one layer is missing": _without(".lora_A"),
    "the magnitude is missing": _without(".lora_magnitude_vector"),
    "added tokens are missing": _without("trainable_tokens_delta"),
    "q and k (k and v, gate and up) are swapped": _edit(_factors_swapped),
    "A of one layer is transposed": _edit(_factor_transposed),
    "a wrong cast": _edit(_factors_cast),
}
"""What can go wrong with an adapter's folder."""


FAULTS = {"model": MODEL_FAULTS, "adapter": ADAPTER_FAULTS}


@dataclass(frozen=True)
class Planted:
    """One fault in one part of an export, and what the check made of it."""

    part: str
    fault: str
    caught: bool
    tensors: float
    """The largest difference of a tensor; infinite where names, dtypes or settings differ, or nothing loads."""
    logits: float
    """The difference of the logits over what is taken for rounding; above 1 they alone would show the fault."""


def sweep(root: Path, case: Case) -> tuple[dict[str, Check], list[Planted]]:
    """A healthy export of the case, and every fault that it can have, one at a time."""
    healthy = Exported(root / "healthy", case)
    other = Exported(root / "other", replace(case, size=1.2 * case.size))
    scaled = Exported(root / "scaled", case, alpha=1.1) if case.method != "full" else None
    found = []
    for part in healthy.checks:
        theirs = (each.exporter.out / part for each in (other, scaled) if each)
        scene = Scene(root / "healthy" / "base", *theirs)
        for name, fault in FAULTS[part].items():
            check = healthy.damaged(part, fault, scene)
            if isinstance(check, str):
                found.append(Planted(part, name, True, math.inf, math.inf))
            elif check:
                tensors = check.largest if check.largest > 0 or check.verified else math.inf
                found.append(Planted(part, name, not check.verified, tensors, check.difference / check.tolerance))
    return healthy.checks, found
