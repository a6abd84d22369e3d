"""The pages: a script that they walk through is the script that is rendered; a verb that they name exists."""

import re
from pathlib import Path

import pytest

from galley_launch.base.options import read
from galley_launch.plan import compose
from galley_launch.submit import scripts
from galley_launch.verbs import VERBS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_slurm_page_walks_through_the_script_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/ada/.config")
    monkeypatch.setenv("GALLEY_CACHE", "/home/ada/.cache/galley")
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    words = ["cluster=venv", "nodes=4", "cluster.partition=gpu", "cluster.venv=/home/ada/galley", "runs=/home/ada/runs"]
    made = compose.compose("llama3.1-8b-full", read(words, submits=True), imagine=True)
    assert made.cluster is not None
    page = (ROOT / "docs" / "slurm.md").read_text()
    walk = page.partition("<!-- script: begin -->")[2].partition("<!-- script: end -->")[0]
    shown = "".join(re.findall(r"```bash\n(.*?)```", walk, re.DOTALL))
    assert shown == scripts.scripts(made.spec, made.run, made.cluster)["jobs/train.sbatch"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_verbs_that_exist(page: Path) -> None:
    named = set(
        re.findall(
            r"(?:^|[`/ ])galley ([a-z]+)\b", "\n".join(re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL))
        )
    )
    assert named
    assert named <= set(VERBS)


def test_the_map_names_files_that_exist() -> None:
    """Each file that CONTRIBUTING.md names is one, in the folder that it names."""
    named = set(re.findall(r"`([\w/.-]+\.(?:py|j2|sh|c|md))`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert len(named) > 50
    tops = ("launch", "src", "slurm", "tests", "benchmarks", "docs")
    files = [f"/{file.relative_to(ROOT)}" for top in tops for file in (ROOT / top).rglob("*") if file.is_file()]
    assert [name for name in sorted(named) if not any(file.endswith(f"/{name}") for file in files)] == []
