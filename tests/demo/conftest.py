"""The demo is a folder of scripts: its tests import them as the demo does, from its own folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
