"""What is damaged, and who then has to read it: for each kind of input, the damage and the calls to judge."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fuzz import check, mutate, world

Calls = list[tuple[str, Callable[[], str]]]
Kind = Callable[[random.Random, Path], tuple[str, Calls]]


def _verbs(*lines: str) -> Calls:
    return [(line, partial(check.verb, line.split())) for line in lines]


def _damage(rng: random.Random, *paths: Path) -> str:
    return "; ".join(mutate.file(rng, path) for path in paths if path.parent.is_dir())


def recipe(rng: random.Random, here: Path) -> tuple[str, Calls]:
    """Recipes: planned, shown, listed, copied, extended."""
    path = rng.choice((here / "mine.yaml", here / "recipes" / "own.yaml", here / "recipes" / "child.yaml"))
    name = "mine.yaml" if path.parent == here else path.stem
    words = (
        f"plan {name} device=cpu ranks=1",
        f"show {name}",
        "recipes",
        f"copy {name} other",
        "plan child device=cpu ranks=1",
    )
    return _damage(rng, path), _verbs(*words)


def words(rng: random.Random, here: Path) -> tuple[str, Calls]:
    """Words of the command line, as nobody should type them."""
    odd = [str(each).replace("@@", "") if str(each) not in mutate.RAW else mutate.RAW[str(each)] for each in mutate.ODD]
    odd = [each for each in odd if "\x00" not in each and len(each) < 100_000]  # execve(2) takes neither
    keys = [
        "lr", "optimizer.lr", "steps", "epochs", "rank", "method.rank", "targets", "gpus", "ranks", "name", "runs",
        "nodes",
        "cluster", "deepspeed", "micro_batch", "init_from", "betas", "held_out", "model.path", "data.path", "step",
        "attempt",
        "cluster.time", "cluster.side.cores", "batch.samples", "tracking.wandb.project", "freeze", "seed", "device",
        "force",
    ]  # fmt: skip
    verbs = ["plan mine.yaml", "show own", "status", "logs box", "why box", "stop box", "clusters site", "recipes",
    "copy own",
             "plan mine.yaml cluster=site", "status box", "report box", "plan runs/box",
             "export box step=7"]  # fmt: skip
    line = rng.choice(verbs).split()
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = rng.choice(
            [*odd, *(rng.choice(("{0}", "[{0}]", "[{0},{0}]", "'{0}")).replace("{0}", rng.choice(odd)),)]
        )
        form = rng.choice(
            ("{k}={v}", "{k}={v}", "{k}={v}", "--{k}={v}", "--{k}", "{v}", "{v}={k}", "-{k}", "{k}.{k}={v}")
        )
        line.append(form.replace("{k}", rng.choice(keys)).replace("{v}", value))
    if rng.random() < 0.1:
        rng.shuffle(line)
    if line[0] in ("run", "submit"):
        line[0] = "plan"
    shown = " ".join(each if len(each) < 200 else f"{each[:40]}…({len(each)})" for each in line)
    return "", [(shown, lambda: check.verb(line))]


def profile(rng: random.Random, here: Path) -> tuple[str, Calls]:
    """Cluster profiles: listed, shown, planned with."""
    lines = ("plan mine.yaml cluster=site", "clusters site", "plan mine.yaml cluster=site nodes=2 cluster.time=1:00:00")
    return _damage(rng, here / "clusters" / "site.yaml"), _verbs(*lines)


def deepspeed(rng: random.Random, here: Path) -> tuple[str, Calls]:
    """DeepSpeed JSONs."""
    lines = ("plan mine.yaml device=cpu ranks=1 deepspeed=ds.json", "plan mine.yaml gpus=0,1 deepspeed=ds.json")
    return _damage(rng, here / "ds.json"), _verbs(*lines)


def model(rng: random.Random, here: Path) -> tuple[str, Calls]:
    """Model folders and GGUF files, as ``plan`` sees them."""
    path = rng.choice([*world.victims(rng, here / "model", 1), here / "model" / "config.json", here / "model.gguf"])
    name = "model.gguf" if path.suffix == ".gguf" else "model"
    return _damage(rng, path), _verbs(f"plan mine.yaml device=cpu ranks=1 model.path=./{name} deepspeed=ds.json")


def rundir(rng: random.Random, here: Path) -> tuple[str, Calls]:
    """Run directories: every verb that reads them, the others' rows in the table included."""
    name = rng.choice(("box", "box", "job"))
    root = here / "runs" / name
    done = _damage(rng, *world.victims(rng, root, rng.choice((1, 1, 1, 3))))
    if rng.random() < 0.2:
        odd = ("checkpoints/step-x", "attempts/foo", "attempts/0003", "attempts/٣", "checkpoints/step-²",
        "attempts/" + "9" * 60,
               "checkpoints/step-" + "1" * 200, "attempts/-1", "checkpoints/step-000009/manifest.json")  # fmt: skip
        path = root / rng.choice(odd)
        done = f"{done}; made {path.name}"
        with contextlib.suppress(OSError):  # what it would lie in may be a file by now
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if rng.random() < 0.5 else path.write_text("[]")
    lines = ["status", f"status {name}", f"why {name}", f"report {name}", f"stop {name}", f"export {name} step=7",
             f"plan runs/{name} device=cpu ranks=1"]  # fmt: skip
    lines += [f"logs {name}", f"logs {name} rank=1 attempt=1"] if name == "box" else [f"plan runs/{name} cluster=site"]
    return done, [("status names every run", lambda: _table(here)), *_verbs(*rng.sample(lines, 5))]


def _table(here: Path) -> str:
    """The table has a row for the sound run, whatever became of the others."""
    import io

    from galley_launch import cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        _, wrong = check.guarded(lambda: cli.main(["status"]), (SystemExit,))
    named = any(line.split()[:2] == ["good", "failed"] for line in out.getvalue().splitlines())
    return wrong or ("" if named else f"the sound run is not in the table: {out.getvalue()!r}")


CONTROL: dict[str, Kind] = {
    "recipe": recipe, "words": words, "profile": profile, "deepspeed": deepspeed, "model": model, "rundir": rundir,
}  # fmt: skip
"""Kinds that the control plane reads."""


def prepared_model(rng: random.Random, here: Path) -> tuple[str, Calls]:
    """Model folders, as prepare reads them before it loads one."""
    from galley.prepare.tokens import _load
    from galley.storage.weights import check_folder, count_parameters, fingerprint, is_whole, weight_files

    folder = here / "model"
    done = _damage(rng, *world.victims(rng, folder, rng.choice((1, 1, 2))))

    def read() -> None:
        check_folder("model.path", folder)
        assert is_whole(folder)
        assert weight_files(folder)
        count_parameters(folder)
        fingerprint(folder)

    def tokens() -> None:
        check_folder("model.path", folder)
        _load(folder, False)

    def known() -> None:
        from galley.model.loading import check_loading
        from galley.prepare.configs import check_config
        from galley.prepare.fetch import check_architecture

        check_folder("model.path", folder)
        check_architecture(folder, trust=False)
        check_config(folder, trust=False)
        check_loading(folder, trust=False)

    calls: Calls = [("weights", lambda: check.reader(read)), ("architecture", lambda: check.reader(known))]
    if "token" in done or "chat_template" in done:
        calls.append(
            ("tokenizer", lambda: check.reader(lambda: (check_folder("model.path", folder), _load(folder, False))))
        )
    return done, calls


def gguf(rng: random.Random, here: Path) -> tuple[str, Calls]:
    """GGUF files, as prepare converts them."""
    from galley.prepare.convert import convert_gguf

    path = here / "model.gguf"
    return _damage(rng, path), [("convert", lambda: check.reader(lambda: convert_gguf(path, here / "cache")))]


def rows(rng: random.Random, here: Path) -> tuple[str, Calls]:
    """Rows, rendered and tokenised."""
    from galley.prepare.formats.chat import CHAT
    from galley.prepare.formats.rendering import render_conversation, tokenize
    from galley.prepare.formats.rows import read_file
    from galley.prepare.formats.template import study
    from galley.prepare.formats.text import TEXT
    from galley.prepare.sources import _file
    from galley.prepare.tokens import _load

    path = here / "rows.jsonl"
    done = _damage(rng, path)
    if done.endswith("huge"):  # a real one is read, however long that takes
        return done, []

    def read() -> None:
        _file("data", path)
        tokenizer = _load(here / "model", False)
        template = study(tokenizer, world.TEMPLATE)
        tokenize(tokenizer, [render_conversation(template, row) for _, row in read_file(path, CHAT)])
        list(read_file(path, TEXT))

    return done, [("rows", lambda: check.reader(read))]


def template(rng: random.Random, here: Path) -> tuple[str, Calls]:
    """Chat templates."""
    from galley.prepare.formats.chat import CHAT
    from galley.prepare.formats.rendering import render_conversation
    from galley.prepare.formats.rows import read_file
    from galley.prepare.formats.template import study
    from galley.prepare.tokens import _load

    path = here / "template.jinja"
    done = _damage(rng, path)
    if path.is_file():
        odd = ("{{ 1/0 }}", "{{ 9**9**9 }}", "{{ 'x' * 10**10 }}", "{% for i in range(10**12) %}{% endfor %}",
        "{{ x.y.z }}",
               "{{ ''.__class__ }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
               "{{ messages | map('upper') | list }}",
               "{% include 'x' %}", "{{ raise_exception('no') }}", "{{ '%s' % messages }}",
               "{{ range(10**9) | list }}")  # fmt: skip
        extra = rng.choice(odd) if rng.random() < 0.4 else ""
        path.write_bytes(path.read_bytes()[:100_000] + extra.encode()) if path.stat().st_size < 1 << 20 else None
        done += extra

    def read() -> None:
        from galley.contract.errors import UserError

        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError("t", "t", "t") from None
        found = study(_load(here / "model", False), text)
        [render_conversation(found, row) for _, row in read_file(here / "rows.jsonl", CHAT)]

    return done, [("template", lambda: check.reader(read))] if path.is_file() and path.stat().st_size < 1 << 20 else []


def resumed(rng: random.Random, here: Path) -> tuple[str, Calls]:
    """Run directories, as a stage reads them."""
    from galley.checkpoint.checkpoint import best_checkpoint
    from galley.contract.metrics import drop_after
    from galley.contract.rundir import RunDir
    from galley.prepare.prepare import model_folder, ready
    from galley.ranks.stage import run_stage

    root = here / "runs" / "box"
    done = _damage(rng, *world.victims(rng, root, rng.choice((1, 2))))
    run = RunDir(root)

    def stage() -> None:
        status = run_stage("probe", lambda spec, found, attempt: (model_folder(spec, found), None)[1], [str(run.spec)])
        assert status in (0, 2), f"exit status {status}"

    def read() -> None:
        ready(run, "k")
        best_checkpoint(run)
        run.checkpoints()
        drop_after(run.metrics, 4)

    return done, [("stage", lambda: check.reader(stage)), ("records", lambda: check.reader(read))]


def load() -> None:
    """Import what the data plane needs, once and outside of the limits: torch alone maps gigabytes."""
    import gguf  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import galley.model.loading
    import galley.prepare.prepare  # noqa: F401

    torch.zeros(64, 64) @ torch.zeros(64, 64)  # its threads


DATA: dict[str, Kind] = {
    "prepared_model": prepared_model, "gguf": gguf, "rows": rows, "template": template, "resumed": resumed,
}  # fmt: skip
"""Kinds that the data plane reads; they import torch."""
