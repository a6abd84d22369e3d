"""Free memory of the host and of the control groups, as /proc and /sys show them."""

from __future__ import annotations

from pathlib import Path

import pytest

from galley.ranks.memory import free_bytes

MIB = 1 << 20


def host(root: Path, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text("MemTotal: 4096 kB\nMemAvailable: 2048 kB\n")
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "proc", root / "groups"


@pytest.mark.parametrize(
    ("cgroup", "files", "mib"),
    [
        ("0::/\n", {}, 2.0),
        ("0::/job/step\n", {"job/step/memory.max": "max\n", "job/step/memory.current": "5\n"}, 2.0),
        ("0::/job/step\n", {"job/memory.max": f"{3 * MIB}\n", "job/memory.current": f"{2 * MIB}\n"}, 1.0),
        (
            "0::/job\n",
            {
                "job/memory.max": f"{MIB}\n",
                "job/memory.current": f"{MIB}\n",
                "job/memory.stat": f"anon {MIB // 2}\nfile {MIB // 2}\ninactive_file {MIB // 4}\n",
            },
            0.25,
        ),
        ("0::/job\n", {"job/memory.max": f"{MIB}\n", "job/memory.current": f"{2 * MIB}\n"}, 0.0),
        (
            "5:cpu:/x\n4:memory:/slurm/job\n",
            {"memory/slurm/job/memory.limit_in_bytes": f"{MIB}\n", "memory/slurm/job/memory.usage_in_bytes": "0\n"},
            1.0,
        ),
    ],
)
def test_the_tightest_limit_counts(tmp_path: Path, cgroup: str, files: dict[str, str], mib: float) -> None:
    assert free_bytes(*host(tmp_path, cgroup, files)) == mib * MIB


def test_this_machine_has_some() -> None:
    assert free_bytes() > 100 * MIB
