"""A user's DeepSpeed JSON compared with a recipe: one error with all that is wrong, or the finished configuration.

``take=deepspeed`` puts the JSON's values into the recipe where the two differ, ``take=recipe`` the other way; without
either, a difference is refused.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from galley.contract.errors import UserError
from galley_launch.base.devices import Devices
from galley_launch.base.options import split
from galley_launch.base.problems import Difference, Findings, Problem, refusal, short, words_of
from galley_launch.deepspeed import batch, blocks, complete, keys, table
from galley_launch.recipe import deepspeed_rules
from galley_launch.recipe.model_facts import Facts
from galley_launch.recipe.schema import Recipe, build, override

Config = dict[str, Any]
TAKE = ("deepspeed", "recipe")


@dataclass(frozen=True)
class Source:
    """A configuration, what messages call it, and whether it or the recipe wins where the two differ."""

    config: Config
    label: str
    take: str = ""
    typed: Collection[str] = field(default=())
    """Dotted keys of the recipe that the command line sets: they win over ``take=deepspeed``."""


@dataclass(frozen=True)
class Settled:
    """The configuration that ranks get, and the recipe that agrees with it."""

    recipe: Recipe
    config: Config
    notes: tuple[str, ...]


def settle(source: Source, recipe: Recipe, where: Devices, facts: Facts) -> Settled:
    """The finished configuration for ``recipe`` on all ranks of all nodes.

    Raises ``UserError`` with everything that is wrong: keys and values that DeepSpeed refuses or ignores,
    contradictions with the recipe, combinations that are known to be wrong, batches that do not split.
    """
    if source.take not in ("", *TAKE):
        raise UserError(
            "take", f"{source.take!r} is neither deepspeed nor recipe", f"write take={' or take='.join(TAKE)}"
        )
    # 1. Keys under today's names with typed values. 2. What becomes of every top-level key. 3. What is compared with
    # the recipe is compared. 4. Combinations are judged for the recipe that is left, since `take` may have changed it.
    # Nothing is raised before the end, so that one message has everything.
    read = keys.read_keys(source.config)
    # With `take` the user has decided about the file, so a removed feature that is off anyway is only noted.
    notes = [*read.notes, *(f"{path} is left out: it is off" for path in read.off if source.take)]
    problems = [*read.problems, *(read.off.values() if not source.take else ())]
    of_keys = Findings()
    config = table.sort_out(read.config, of_keys)
    findings = _compare(config, recipe, where)
    if source.take == "deepspeed":
        recipe, findings, taken = _take(source, config, recipe, findings, where)
        notes += taken
    elif source.take == "recipe":
        notes += [f"the recipe's: {difference.line()}" for difference in findings.differences]
        findings.differences.clear()
    problems += of_keys.problems + findings.problems
    problems += _combinations(read.problems, config, recipe, where, bool(findings.differences))
    if problems or findings.differences:
        raise refusal(
            source.label, problems, findings.differences, _next_obstacle(config, recipe, findings.differences, where)
        )
    done = complete.complete(config, source.label, recipe, where, facts)
    return Settled(recipe, done, _labelled(source.label, notes + of_keys.notes + findings.notes))


def _labelled(label: str, notes: list[str]) -> tuple[str, ...]:
    """``notes`` without repetitions, with the file's name in front."""
    return tuple(f"deepspeed {short(label)}: {note}" for note in dict.fromkeys(notes))


def _stage(config: Config) -> int:
    return int(batch.at(config, "zero_optimization.stage") or 0)


def _compare(config: Config, recipe: Recipe, where: Devices) -> Findings:
    """All that both the JSON and the recipe have."""
    findings, ranks = Findings(), where.nodes * where.ranks
    batch.batch(config, recipe, ranks, findings)
    batch.clipping(config, recipe, findings)
    batch.precision(config, recipe, _stage(config), findings)
    blocks.optimizer(config, recipe, findings)
    blocks.scheduler(config, recipe, findings)
    return findings


def _with(recipe: Recipe, words: list[str]) -> Recipe:
    """``recipe`` with ``words`` (``key=value``) applied, and checked again as if they had been typed."""
    return build(override(recipe.model_dump(exclude_none=True), [split(word) for word in words]), "the DeepSpeed JSON")


def _take(
    source: Source, config: Config, recipe: Recipe, findings: Findings, where: Devices
) -> tuple[Recipe, Findings, list[str]]:
    """The recipe with the JSON's values, the findings that are left, and notes on what was taken."""
    words = [word for word in words_of(findings.differences) if not _is_typed(word, source.typed)]
    if not words and not findings.differences:
        return recipe, findings, []
    recipe = _with(recipe, words)
    # Compared again, because one value can settle another: a taken micro-batch may make the accumulation agree.
    notes = [f"taken over the recipe's: {' '.join(words)}"] if words else []
    left = _compare(config, recipe, where)
    for difference in list(left.differences):
        if difference.minor or (difference.words and all(_is_typed(word, source.typed) for word in difference.words)):
            notes.append(f"not taken: {difference.line()}")
            left.differences.remove(difference)
    return recipe, left, notes


def _is_typed(word: str, typed: Collection[str]) -> bool:
    """Whether the command line sets the key of ``word``, or one that excludes it (steps, epochs and tokens do)."""
    key = word.partition("=")[0]
    section = key.rpartition(".")[0]
    return key in typed or (section in ("batch", "duration") and any(name.startswith(section) for name in typed))


def _combinations(
    unread: list[Problem], config: Config, recipe: Recipe, where: Devices, differs: bool
) -> list[Problem]:
    """What the rules refuse, and a batch that does not split.

    ``unread``: problems of reading the file. With one about the stage nothing is judged, for most rules depend on it.
    """
    if any(problem.what.startswith("zero_optimization.stage ") for problem in unread):
        return []
    problems = deepspeed_rules.broken(deepspeed_rules.Case(recipe, where.kind, _without_autos(config)))
    problems += complete.broken(config, where)
    try:
        batch.accumulation(recipe, where.nodes * where.ranks)
    except UserError as error:
        if not differs:  # Otherwise the JSON's batch, once it is taken, may split.
            problems.append(Problem(error.what, error.todo, error.where))
    return problems


def _without_autos(config: Any) -> Any:
    """``config`` without ``"auto"``: a rule must not take the word for a value that was set."""
    if not isinstance(config, dict):
        return config
    return {key: _without_autos(value) for key, value in config.items() if value != "auto"}


def _next_obstacle(config: Config, recipe: Recipe, differences: list[Difference], where: Devices) -> str:
    """The first new problem that ``take=deepspeed`` would lead to, as ``what: what to do``; empty: none."""
    words = words_of(differences)
    if not words:
        return ""
    try:
        taken = _with(recipe, words)
        # Problems that are there already are reported by themselves: only what taking the values adds is an obstacle.
        before = {problem.what for problem in _combinations([], config, recipe, where, False)}
        after = [problem for problem in _combinations([], config, taken, where, False) if problem.what not in before]
    except UserError as error:
        return f"{error.what}; {error.todo}"
    return f"{after[0].what}: {after[0].todo}" if after else ""
