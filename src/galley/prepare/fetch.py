"""Where the model and the data come from: a folder, a file, or a hub, whose branch or tag is pinned to a commit.

Only this module speaks to a hub, and only prepare calls it. Credentials are huggingface_hub's own business
(``hf auth login`` or ``HF_TOKEN``); ``HF_HUB_OFFLINE=1`` makes do with what its cache holds.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from galley.contract.errors import UserError
from galley.contract.rundir import read_json
from galley.contract.spec import RunSpec
from galley.prepare.configs import check_config
from galley.storage.weights import check_folder, fingerprint

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
CODE = ["*.py"]
UNWANTED = ["*/*", "consolidated*", "*.onnx.json"]
LOGIN = "`hf auth login` or set HF_TOKEN"
# Of httpx, of requests, and Python's own.
_OF_NETWORKS = {"TransportError", "RequestException", "ConnectionError", "TimeoutError", "gaierror"}
COMMIT = re.compile(r"[0-9a-f]{40}")

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Fetched:
    """A model on this machine's disk."""

    folder: Path
    """Configuration, safetensors, tokenizer."""
    revision: str | None
    """Commit, for a hub model."""
    fingerprint: str
    """Of configuration and weights; see :func:`galley.storage.weights.fingerprint`."""
    quantised_share: float | None = None
    """Share of the weights that the method quantises; None where it quantises nothing."""


def fetch_model(spec: RunSpec, cache: Path, commit: str | None = None) -> Fetched:
    """Bring the model here: a folder as it is, a ``.gguf`` converted once, a hub id downloaded at one commit.

    ``commit`` is what an earlier attempt was pinned to. Raises :class:`UserError` for every way in which the user's
    model can be missing, out of reach, incomplete or unknown to transformers.
    """
    path, revision = Path(spec.placement.paths.model), None
    if not path.is_absolute():
        folder, revision = _download(spec, commit)
    elif path.suffix == ".gguf":
        from galley.prepare.convert import convert_gguf

        folder = convert_gguf(path, cache)
    elif path.is_dir():
        folder = path
    else:
        what = f"'{path}' {'is a file' if path.exists() else 'does not exist'}"
        raise UserError("model.path", what, "give a model's folder, a .gguf file or a hub id")
    check_folder("model.path", folder)
    check_architecture(folder, spec.task.model.trust_remote_code)
    check_config(folder, spec.task.model.trust_remote_code)
    return Fetched(folder, revision, fingerprint(folder), _check_weights(spec, folder))


def _check_weights(spec: RunSpec, folder: Path) -> float | None:
    """The share of the weights that the method quantises. Raises ``UserError`` for what they lack."""
    from galley.model.loading import check_loading
    from galley.model.quantised import check_quantisation
    from galley.prepare.positions import check_positions

    report = check_loading(folder, spec.task.model.trust_remote_code)
    if report is None:
        return None
    check_positions(report.model, spec.task.data.max_length)
    return check_quantisation(spec.task.method.kind, report.model)


def _download(spec: RunSpec, commit: str | None) -> tuple[Path, str]:
    name, model = spec.placement.paths.model, spec.task.model
    wanted = WANTED + (CODE if model.trust_remote_code else [])
    revision = commit or model.revision

    def download() -> str:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED))

    with telling(f"model: fetching {name}{f' at {revision}' if revision else ''}"):
        folder = Path(ask_hub("model.path", name, revision, download))
    return folder, folder.name


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Say ``what`` now, and every minute that it is still going on: bars are for terminals, and this goes to a log."""
    over, began = threading.Event(), time.monotonic()

    def repeat() -> None:
        while not over.wait(60):
            print(f"{what}, {(time.monotonic() - began) / 60:.0f} min", flush=True)

    print(what, flush=True)
    teller = threading.Thread(target=repeat, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()


def ask_hub(where: str, name: str, revision: str | None, question: Callable[[], Answer]) -> Answer:
    """Put a question to the hub; what can go wrong becomes one :class:`UserError`."""
    from huggingface_hub import errors

    at = f" at '{revision}'" if revision else ""
    try:
        return question()
    except errors.GatedRepoError:
        raise _gated(where, name) from None
    except errors.RevisionNotFoundError:
        raise UserError(where, f"'{name}' has no revision '{revision}'", "give a branch, tag or commit of it") from None
    except errors.RepositoryNotFoundError:
        raise _missing(where, name) from None
    except errors.HFValidationError:
        raise UserError(where, f"'{name}' is not a file or folder here, nor a hub id", "check the name") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError) as error:
        raise _unreachable(where, f"'{name}'{at}") from error
    except errors.HfHubHTTPError as error:
        what = f"the hub refuses '{name}'{at}: {str(error).splitlines()[0]}"
        raise UserError(where, what, f"check your access, then {LOGIN}") from None
    except Exception as error:
        if not _is_of_the_network(error):
            raise
        raise _unreachable(where, f"'{name}'{at}") from error


def _unreachable(where: str, what: str) -> UserError:
    todo = f"fetch it once where there is a network, or give a {'file' if where.startswith('data') else 'folder'}"
    return UserError(where, f"the hub cannot be reached and {what} is not complete in its cache here", todo)


def _is_of_the_network(error: Exception) -> bool:
    """Whether ``error`` is a connection's: by name, for huggingface_hub has changed the library that it speaks with."""
    return not _OF_NETWORKS.isdisjoint(base.__name__ for base in type(error).__mro__)


def _gated(where: str, name: str) -> UserError:
    what = f"'{name}' is gated and this account has no access"
    return UserError(where, what, f"ask for access on its page, then {LOGIN}")


def _missing(where: str, name: str) -> UserError:
    what = f"'{name}' is not a file or folder here, and the hub has nothing of that name for this account"
    return UserError(where, what, f"check the name; if it is private, {LOGIN}")


def check_architecture(folder: Path, trust: bool) -> None:
    """Raise :class:`UserError` unless transformers knows the architecture as a causal language model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    writers = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    config = read_json(folder / "config.json") or {}
    named, ships_code = config.get("model_type"), bool(config.get("auto_map"))
    kind = named if isinstance(named, str) else None
    if ships_code and (trust or kind in writers):
        return
    if ships_code:
        what = f"'{folder}' (type {kind}) needs Python code from its repository"
        raise UserError("model.path", what, "read that code, then set model.trust_remote_code=true")
    if kind not in CONFIG_MAPPING_NAMES:
        raise UserError("model.path", f"transformers does not know the model type {kind!r}", "update transformers")
    if kind not in writers:
        raise UserError("model.path", f"a {kind} model is not a causal language model", "give one that writes text")


def pin_data(name: str, revision: str | None) -> str | None:
    """The commit of a hub data set; None where only an offline cache is at hand."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE or (revision and COMMIT.fullmatch(revision)):
        return revision
    sha = ask_hub("data.path", name, revision, lambda: HfApi().dataset_info(name, revision=revision).sha)
    return sha or revision


@functools.lru_cache(maxsize=2)  # asked for its columns first, then for its rows
def load_data(name: str, revision: str | None, split: str, subset: str | None = None) -> Any:
    """A hub data set at a commit, as ``datasets`` loads it.

    Raises :class:`UserError` for one that is missing, empty or broken.
    """
    import datasets

    def load() -> Any:
        return datasets.load_dataset(name, subset, revision=revision, split=split)

    try:
        with telling(f"data: fetching {name}{f' at {revision}' if revision else ''}"):
            return ask_hub("data.path", name, revision, load)
    except UserError:
        raise
    except Exception as error:  # datasets passes on whatever its readers raise
        raise _unloadable(name, split, error) from error


def _unloadable(name: str, split: str, error: Exception) -> UserError:
    """Why a data set cannot be loaded, in one line."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    if isinstance(error, DatasetNotFoundError):
        return _gated("data.path", name) if "gated" in str(error) else _missing("data.path", name)
    if _is_of_the_network(error):
        return _unreachable("data.path", f"'{name}'")
    if isinstance(error, EmptyDatasetError | DataFilesNotFoundError):
        what = f"'{name}' on the hub has no data files that can be read"
        return UserError("data.path", what, "give another data set, or a .jsonl file")
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    if isinstance(error, StopIteration) or "corresponds to no data" in lines[0]:
        what = f"'{name}' on the hub holds no rows in its split '{split}'"
        return UserError("data.path", what, "give another data set, or another data.split")
    subsets = re.search(r"(?:available configs|Available): \[(.*?)\]", str(error))
    if type(error) is ValueError and subsets:
        unknown = "" if "is missing" in lines[0] else ", and this is none of them"
        what = f"'{name}' on the hub has several configurations{unknown}"
        return UserError("data.subset", what, f"use one of {subsets[1][:200]}")
    if type(error) is ValueError and "split" in lines[0]:
        return UserError("data.split", lines[0][:300], "use another data.split")
    what = f"'{name}' on the hub cannot be read: {lines[0][:200]}"
    return UserError("data.path", what, "load it with the datasets library to see more, or give a .jsonl file")
