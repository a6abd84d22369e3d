"""What can be said about a folder of safetensors without torch: whether it is whole, its size, its fingerprint."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TypedDict

from galley.contract.errors import UserError
from galley.contract.files import LARGEST_TEMPLATE, open_regular, read_json, reason
from galley.contract.headers import read_safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WHOLE = 1 << 26
POINTER_SIZE = 1024
TEXTS = {".json": 1 << 29, ".txt": 1 << 29, ".model": 1 << 29, ".tiktoken": 1 << 29, ".jinja": LARGEST_TEMPLATE}
"""Bytes of the largest file of each suffix that transformers is let to read whole."""
BLOCKS, BLOCK = 256, 1 << 16
NAME = 255
"""Bytes of a file's name (NAME_MAX of every Linux file system)."""
POINTER = b"version https://git-lfs.github.com/spec/"
QUANTISED = ("quantization_config", "compression_config")  # as transformers writes it, and compressed-tensors once did


class Header(TypedDict):
    """What a safetensors file says of one tensor, and the file."""

    dtype: str
    shape: list[int]
    path: Path


def check_folder(where: str, folder: Path) -> None:
    """Raise :class:`UserError` unless ``folder`` holds a configuration and every byte of unquantised safetensors."""
    _check_files(where, folder)
    _check_pointers(where, folder)
    _check_config(where, folder)
    _check_index(where, folder)
    files = _files(folder)
    if not files:
        raise _no_weights(where, folder)
    for path in files:
        _check_file(where, path)


def _no_weights(where: str, folder: Path) -> UserError:
    what = f"'{folder}' has no model.safetensors and no index of shards"
    names = sorted(path.name for path in folder.iterdir())
    odd = next((name for name in names if name.endswith(".safetensors")), None)
    pickle = next((name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))), None)
    if odd:
        what, todo = f"{what} but {odd}", "give the folder as save_pretrained of transformers writes it"
    else:
        what += f" but {pickle}, a pickle, which could run code" if pickle else ""
        todo = "give a folder with safetensors"
    return UserError(where, what, todo)


def _check_config(where: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = "is an adapter, not a model" if adapter else "has no config.json"
        raise UserError(where, f"'{folder}' {what}", "give the folder of a complete model")
    config = read_json(folder / "config.json")
    if config is None:
        raise UserError(where, f"'{folder}/config.json' is not a JSON object", "download the model again")
    parts = [config, config.get("text_config") or {}]
    settings = [part[key] for part in parts for key in QUANTISED if isinstance(part, dict) and part.get(key)]
    if settings:
        method = settings[0].get("quant_method") if isinstance(settings[0], dict) else None
        what = f"'{folder}' is already quantised{f' ({method})' if method else ''}"
        raise UserError(where, what, "take the unquantised model (method.kind=qlora quantises it itself)")
    if (folder / "adapter_config.json").is_file():
        what = f"'{folder}' holds an adapter_config.json beside the model, and transformers loads that adapter's base"
        raise UserError(
            where, what, "move adapter_config.json away; merge the adapter first where it is meant to count"
        )


def _check_files(where: str, folder: Path) -> None:
    """Refuse what transformers would wait for or read for ever: pipes, devices, texts without end."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            continue
        if not path.exists():
            raise UserError(where, f"'{path}' is a link to a file that does not exist", "download the model again")
        if not path.is_file():
            raise UserError(where, f"'{path}' is neither a file nor a folder", "download the model again")
        most = TEXTS.get(path.suffix)
        if most and path.stat().st_size > most:
            raise UserError(where, f"'{path}' has more than {most >> 20} MB", "download the model again")


def _check_pointers(where: str, folder: Path) -> None:
    """Refuse the small files that git leaves in the place of large ones."""
    pointers = [path.name for path in sorted(folder.iterdir()) if path.is_file() and _is_pointer(path)]
    if pointers:
        shown = ", ".join([*pointers[:3], "…"] if len(pointers) > 3 else pointers)
        raise UserError(
            where, f"'{folder}' holds git-LFS pointers in the place of files: {shown}", "run git lfs pull there"
        )


def _is_pointer(path: Path) -> bool:
    if path.stat().st_size > POINTER_SIZE:
        return False
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def _check_index(where: str, folder: Path) -> None:
    """Refuse an index whose shards are no names of files in ``folder``."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return
    shards = (read_json(folder / INDEX) or {}).get("weight_map")
    named = list(shards.values()) if isinstance(shards, dict) else [shards]
    wrong = [name for name in named if not _is_name(name)]
    if wrong:
        what = f"'{folder / INDEX}' gives {str(wrong[0])[:80]!r} as the file of a tensor, no file name of that folder"
        raise UserError(where, what, "download the model again")


def _is_name(value: object) -> bool:
    """Whether ``value`` can be the name of a file in a folder."""
    if not isinstance(value, str) or Path(value).name != value or value in ("", ".."):
        return False
    return "\0" not in value and len(value.encode("utf-8", "surrogatepass")) <= NAME


def is_whole(folder: Path) -> bool:
    """Whether the configuration and every file of the weights are there; none is opened but the index."""
    files = _files(folder)
    return bool(files) and all(path.is_file() for path in [folder / "config.json", *files])


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Tensor name to the file that transformers would load it from: the one file before those of the index.

    Empty where there are no safetensors. Raises ``ValueError`` where a file is damaged.
    """
    return {name: header["path"] for name, header in read_headers(Path(folder)).items()}


def read_headers(folder: Path) -> dict[str, Header]:
    """Every tensor of the files that transformers would load, whatever the index says of the file that holds it."""
    return {
        name: Header(dtype=header["dtype"], shape=header["shape"], path=path)
        for path in _files(folder)
        for name, header in read_safetensors(path).items()
    }


def _files(folder: Path) -> list[Path]:
    single = folder / SINGLE
    return [single] if single.is_file() else sorted(set(_indexed(folder).values()))


def _indexed(folder: Path) -> dict[str, Path]:
    shards = (read_json(folder / INDEX) or {}).get("weight_map")
    if not isinstance(shards, dict):
        return {}
    return {name: folder / file for name, file in shards.items() if isinstance(file, str)}


def _check_file(where: str, path: Path) -> None:
    if not path.is_file():
        raise UserError(where, f"'{path}' is missing, though the index lists it", "download the model again")
    try:
        read_safetensors(path)
    except (ValueError, OSError) as error:
        raise UserError(where, f"'{path}' is damaged: {reason(error)}", "download the model again") from None


def count_parameters(folder: Path) -> int:
    """Elements of all stored tensors."""
    headers = [read_safetensors(path) for path in _files(folder)]
    return sum(math.prod(tensor["shape"]) for header in headers for tensor in header.values())


def fingerprint(folder: Path) -> str:
    """Sixteen hex digits over the configuration and the weights; the same wherever the folder lies.

    Files above 64 MB are sampled (size, and 256 blocks of 64 KB spread evenly): a fine-tune changes nearly all
    weights, so that another model is noticed without reading hundreds of gigabytes.
    """
    whole = hashlib.sha256()
    for path in [folder / "config.json", *_files(folder)]:
        whole.update(f"{path.name} {file_fingerprint(path)}\n".encode())
    return whole.hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """SHA-256 over a file, sampled where it is above 64 MB."""
    size = path.stat().st_size
    with open_regular(path) as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sampled = hashlib.sha256(str(size).encode())
        for number in range(BLOCKS):  # the first block at 0, the last one at the end of the file
            file.seek(number * (size - BLOCK) // (BLOCKS - 1))
            sampled.update(file.read(BLOCK))
    return sampled.hexdigest()
