"""What an exported adapter calls its base model: something that loads, here and as long as possible elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from galley.contract.rundir import RunDir, write_atomic
from galley.contract.spec import RunSpec
from galley.data.prepared import Manifest
from galley.storage.cache import fsync_tree


@dataclass(frozen=True)
class Base:
    """The model that an adapter is for."""

    name: str
    """A hub id, or the absolute path of a folder: what ``from_pretrained`` takes."""
    revision: str | None
    """The commit of a hub model."""
    note: str
    """What to know of it, for people; empty for a hub's."""

    @property
    def hub_id(self) -> str | None:
        """The name on a hub, where it has one."""
        return None if Path(self.name).is_absolute() else self.name


def name_base(spec: RunSpec, manifest: Manifest, run: RunDir) -> Base:
    """The base of the run's adapter. A converted GGUF gets names in the run's own ``base/``, which outlive a cache."""
    model = Path(spec.placement.paths.model)
    if not model.is_absolute():
        return Base(str(model), manifest.model.revision, "")
    if model.suffix != ".gguf":
        return Base(str(model), None, f"The base model is the folder `{model}` on the machine that trained this.")
    converted = Path(manifest.model.path)
    what = f"The base model is `{model}`, converted to safetensors in bfloat16"
    if _linked(converted, run.base):
        return Base(str(run.base.absolute()), None, f"{what}: `{run.base.absolute()}`. Copy that folder, too.")
    return Base(str(converted), None, f"{what}: `{converted}`, in a cache. Copy it before the cache is cleared.")


def _linked(source: Path, target: Path) -> bool:
    """Give the files of ``source`` second names in ``target``. False where that cannot be: nothing is copied."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir()
        for path in source.iterdir():
            os.link(path, beside / path.name)
        fsync_tree(beside)
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        return False
    return True


def write_name(base: Base, adapter: Path) -> None:
    """Put the base's name and revision into an exported adapter's configuration."""
    path = adapter / "adapter_config.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts |= {"base_model_name_or_path": base.name, "revision": base.revision}
    write_atomic(path, json.dumps(facts, indent=2, sort_keys=True) + "\n")
