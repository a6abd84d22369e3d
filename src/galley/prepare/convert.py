"""Model folders that Galley makes from the user's: GGUF turned into safetensors, and embeddings with more rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from galley.contract.errors import UserError
from galley.contract.files import reason
from galley.contract.headers import read_gguf
from galley.storage.cache import digest, entry
from galley.storage.weights import file_fingerprint

GGUF_VERSION = 1
ROWS_VERSION = 1
MULTIPLE = 64
MODELS, GGUF, ROWS = "models", "gguf-", "rows-"


def is_made(folder: Path) -> bool:
    """Whether Galley made ``folder`` in a cache: named after what it was made from, and never written to again."""
    return folder.parent.name == MODELS and folder.name.startswith((GGUF, ROWS))


def convert_gguf(path: Path, cache: Path) -> Path:
    """A bfloat16 safetensors folder, tokenizer and chat template included, made once for each content of ``path``.

    Quantised blocks are dequantised: what was lost in quantising stays lost. Needs memory for the whole model.
    """
    if not path.is_file():
        raise UserError("model.path", f"'{path}' does not exist", "give a .gguf file, a folder or a hub id")
    try:
        read_gguf(path)
    except (OSError, ValueError) as error:
        raise UserError(
            "model.path", f"'{path}' is not a complete GGUF file: {reason(error)}", "download it again"
        ) from None
    key = digest(["gguf", GGUF_VERSION, file_fingerprint(path)])
    notice = f"model: converting {path.name} to bfloat16 safetensors (once)"
    return entry(cache, MODELS, f"{GGUF}{key}", lambda folder: _convert(path, folder), notice)


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from galley.model.loading import refuse_missing

    logging.set_verbosity_error()  # it warns of computing with packed weights, which nobody does here
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        how: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.bfloat16, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(path.parent, **how)
    except UserError:
        raise
    except Exception as error:  # of a damaged file, anything
        first = (str(error).splitlines() or [""])[0]
        what = f"transformers cannot read '{path.name}': {type(error).__name__}: {first}"
        raise UserError("model.path", what, "give the safetensors of that model instead") from error
    refuse_missing(str(path), info)
    # from_pretrained leaves the marks of a GGUF-quantised model, and save_pretrained refuses those.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def grow_embedding(source: Path, fingerprint: str, tokens: list[str], rows: int, cache: Path, trust: bool) -> Path:
    """A copy of the model in ``source`` whose embedding has at least ``rows`` rows, made once.

    New rows are the mean of the old ones (Hewitt 2021, "Initializing new word embeddings"), so that they neither
    dominate the softmax nor depend on chance; the count is rounded up to a multiple of 64 for the matrix units.
    """
    key = digest(["rows", ROWS_VERSION, fingerprint, tokens, rows])
    notice = f"model: adding {', '.join(tokens)} to the embedding (once)"
    return entry(cache, MODELS, f"{ROWS}{key}", lambda folder: _grow(source, folder, rows, trust), notice)


def _grow(source: Path, folder: Path, rows: int, trust: bool) -> None:
    import torch
    from transformers import AutoConfig

    from galley.model.generation import FILE, carry_over, save_model
    from galley.model.towers import auto_class

    config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
    model: Any = auto_class(config).from_pretrained(source, dtype="auto", trust_remote_code=trust)
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, pad_to_multiple_of=MULTIPLE, mean_resizing=False)
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    parameters = [weight for module in modules if module is not None for weight in module.parameters()]
    with torch.no_grad():
        for parameter in {id(weight): weight for weight in parameters}.values():  # tied weights are one
            # [rows, hidden]: a mean over millions of bf16 numbers needs a wider type to be a mean.
            parameter[before:] = parameter[:before].double().mean(dim=0).to(parameter.dtype)
    save_model(model, folder)
    if (source / FILE).exists():
        carry_over(source, folder)
