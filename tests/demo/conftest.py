"""The demo and the benchmarks are folders of scripts: their tests import them as they import each other."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "benchmarks")]
