"""docs/data.md: its files are as it shows them, and each of its commands prepares them."""

import re
import shlex
from pathlib import Path

import pytest

from galley.data.prepared import read_manifest
from galley.prepare.prepare import work
from galley_launch.base.options import read
from galley_launch.plan.compose import compose

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
FILES = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^galley prepare (.*)$", PAGE, re.MULTILINE)


def test_the_page_has_commands() -> None:
    assert [name for name, _ in FILES] == ["chats.jsonl", "alpaca.json", "replies.csv"]
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_prepares(
    command: str, model_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALLEY_CACHE", str(cache))
    for name, text in FILES:
        Path(name).write_text(text, encoding="utf-8")
    recipe, *words = shlex.split(command)
    composed = compose(recipe, read([*words, f"model.path={model_folder}", "device=cpu"]), imagine=True)
    work(composed.spec, composed.run, composed.run.attempt(0))
    facts = read_manifest(composed.run).train
    assert facts.supervised > 0
    assert facts.dropped_overlong == facts.dropped_unsupervised == 0
