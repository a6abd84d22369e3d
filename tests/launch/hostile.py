"""Hostile names, the fields that can hold them, and what must arrive of them when a rendered script runs."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from launch.submitting import lay, option, options, profile, submission
from pydantic import BaseModel, ValidationError

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley_launch.base import assets
from galley_launch.base.grammar import is_text
from galley_launch.cluster import profile_words
from galley_launch.cluster.profile import Cluster
from galley_launch.job import begin
from galley_launch.plan import compose
from galley_launch.submit import scripts
from galley_launch.submit import submission as submitting
from launch import shims

HOSTILE = [
    *("a b", "two  spaces", " ", "it's", 'say "x"', "'; touch x; '", '"; touch x; "', "$(touch x)", "`touch x`"),
    *("a;touch x", "a|touch x", "a&touch x", "a&&touch x", "> x", "<(touch x)", "a#b", "# touch x", "%j", "%x%%"),
    *("${x}", "$HOME", "$x", "!!", "!touch", "a\\", "\\", "\\'; touch x; \\'", 'a\\"b', "\\n", "*", "?[a-z]*", "{a,b}"),
    *("~", "~x", "-x", "--wrap=touch x", "--", "-", "=", "x=y", "a=b c", ",", ":", "a,b:c", "a\nb", "a\ntouch x"),
    *("\n#SBATCH --wrap=x", "a\rb", "a\tb", "a\0b", "a\x1b[31mb", "a\x7fb", "a\x85b", "a\u2028b", "a\u2029b"),
    *("\u202ertl\u202c", "عربي", "日本語", "🙂", "e\u0301", "\ufeffa", "\u00a0", "x" * 300, "x" * 5000, "if", "}"),
    *("time", "[[", "{{ 7*7 }}", "{% raw %}", "{#", "a 'b\\' --hold", "a' --hold 'b", "EOF", "()", "(", ")", "<<x"),
    *("\ud800", "\udcff", "null", "None", "/", "//", "."),
]
PARTS = [*"'\"\\`$(){}[];&|<>#%*?!~-=,:. \t\nabx", "touch x", "$(", "\\'", "é", "🙂", "\u2028", "--hold", "\udcff"]
ANY = st.lists(st.sampled_from(PARTS), min_size=1, max_size=12).map("".join)

HOST = {"conda": "base", "host_python": "python3", "modules": ["m"], "variables": {"V": "v"}, "side": {"cores": "1"}}
BASES: dict[str, dict[str, Any]] = {
    "host": HOST,
    "venv": {"venv": "/v", "host_python": "python3"},
    "pyxis": {"container": {"runtime": "pyxis", "image": "/i"}, "variables": {"V": "v"}},
    "apptainer": {"container": {"runtime": "apptainer", "image": "/i"}, "variables": {"V": "v"}},
}
ASKED = ("partition", "account", "qos", "constraint", "reservation")
SECRET = "it's $(touch x) `touch x` \\ \"#\nsecond line 🙂\udcff"


def strings(kind: type[BaseModel]) -> list[tuple[str, str]]:
    """Dotted path and shape (``text``, ``list``, ``values``, ``keys``) of every field that takes free text."""
    schema = kind.model_json_schema()
    return list(_strings(schema, schema.get("$defs", {}), ""))


def _strings(schema: dict[str, Any], known: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    if "$ref" in schema:
        schema = known[schema["$ref"].rpartition("/")[2]]
    for choice in schema.get("anyOf", []):
        yield from _strings(choice, known, path)
    if schema.get("type") == "string" and not {"enum", "const"} & set(schema):
        yield path, "text"
    if schema.get("type") == "array":
        yield from ((found, "list") for found, _ in _strings(schema.get("items", {}), known, path))
    for name, part in schema.get("properties", {}).items():
        yield from _strings(part, known, f"{path}.{name}".strip("."))
    if isinstance(schema.get("additionalProperties"), dict):
        yield from ((path, "values"), (path, "keys"))


def put(tree: dict[str, Any], path: str, shape: str, text: str) -> dict[str, Any]:
    """``tree`` with ``text`` at ``path``."""
    value: Any = {"text": text, "list": [text], "values": {"V": text}, "keys": {text: "1"}}[shape]
    section, _, leaf = path.rpartition(".")
    return tree | {section: tree.get(section, {}) | {leaf: value}} if section else tree | {leaf: value}


def one_line(error: UserError) -> None:
    """A refusal is a line of plain text, as cli.main prints it."""
    text = " ".join(str(error).split())
    assert re.match(r".+: .+; .+", text), text
    assert not re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", text), text


def is_file_name(text: str) -> bool:
    """Whether a file may be called that."""
    return (
        "/" not in text
        and "\0" not in text
        and text not in (".", "..", "")
        and len(text.encode("utf-8", "surrogatepass")) < 200
    )


def accepted(tree: dict[str, Any], path: str, shape: str, text: str, root: Path) -> dict[str, Any]:
    """``tree`` with ``text`` at ``path``, as it is, as a place or in an option; unchanged where all are refused."""
    (root / path).mkdir(exist_ok=True)
    for value in (text, f"{root}/{path}/{text}", f"--comment={text}"):
        changed = put(tree, path, shape, value)
        try:
            Cluster.model_validate(changed)
        except ValidationError as error:
            one_line(profile_words.refused(error, "x.yaml", ()))
        else:
            return changed
    return tree


def hostile_profile(base: str, text: str, root: Path) -> dict[str, Any]:
    """The base's profile with ``text`` in every field that takes it, but for what the script could not run with."""
    tree = BASES[base]
    given = {"container", "conda", "venv"} & set(tree)
    for path, shape in strings(Cluster):
        if path.partition(".")[0] in {"container", "conda", "venv"} - given or path in ("runs", "secrets"):
            continue
        # Those two take variables of the node, which is test_site_nodes' to try.
        of_node = path in ("scratch", "container.mounts") and re.search(r"\$\{?[A-Za-z_]", text)
        if of_node or (path in ("host_python", "setup") and not is_file_name(text)):
            accepted(tree, path, shape, text, root)
            continue
        tree = accepted(tree, path, shape, text, root) if shape != "keys" else tree
    return tree


def planned(tree: dict[str, Any]) -> tuple[compose.Composed, dict[str, str]]:
    """The run of ``my.yaml`` on a profile, and its files; without what containers cannot mount."""
    mounted = {"cache", "scratch"}
    try:
        made, todo = submission("my.yaml", f"cluster={profile('x', yaml.safe_dump(tree, allow_unicode=True))}")
    except UserError as error:
        one_line(error)
        rest = {key: value for key, value in tree.items() if key not in mounted}
        if "container" in rest:
            rest["container"] = {key: value for key, value in rest["container"].items() if key != "mounts"}
        made, todo = submission("my.yaml", f"cluster={profile('x', yaml.safe_dump(rest, allow_unicode=True))}")
    return made, todo.files


def executed(made: compose.Composed, script: str, root: Path) -> shims.Seen:
    """Run the script with what begin leaves, and the profile's set-up file."""
    assert made.cluster is not None
    run = RunDir(made.run.root.absolute())
    facts = begin._open(run.attempt(1), None, {"GALLEY_HEAD": "n1", "GALLEY_PREPARE": "1"})
    if made.cluster.setup:
        shims.write(Path(made.cluster.setup), "SET_UP=done; export SET_UP\n")
    return shims.run(script, root / "box", facts, scripts.host_python(made.cluster))


def check_directives(script: str, cluster: Cluster, run: RunDir, plain: str) -> None:
    """Every line asks for one thing; for the same things as always and what was given, with those values."""
    found = options(script)
    assert [len(words) for words in found] == [1] * len(found)
    where = [name for name in ASKED if getattr(cluster, name)]
    names = [words[0].partition("=")[0] for words in found]
    always = [words[0].partition("=")[0] for words in options(plain)]
    further = [each.partition("=")[0] for each in cluster.directives]
    assert sorted(names) == sorted([*always, *(f"--{name}" for name in where), *further])
    assert [option(script, name) for name in where] == [[getattr(cluster, name)] for name in where]
    assert [words[0] for words in found if words[0] in cluster.directives] == list(cluster.directives)
    assert option(script, "output") == [str(run.jobs / "logs").replace("%", "%%") + "/train-%j.out"]


def check_calls(seen: shims.Seen, cluster: Cluster, run: RunDir) -> None:
    """Nothing ran but what should, with the words that it should have."""
    expected = {"host", "srun", *(["module"] if cluster.modules else []), *(["conda"] if cluster.conda else [])}
    assert (seen.left, seen.status, seen.err, run.attempt(1).log("job").read_text()) == ([], 0, "", "")
    assert set(seen.calls) == expected
    if cluster.conda:
        assert sorted(seen.calls["conda"]) == [["activate", cluster.conda], ["shell.bash", "hook"]]
    assert seen.calls.get("module", []) == [["load", module] for module in cluster.modules]
    begins = ["-E", "-s", f"{run.code}/verdict.py"]
    attempt = str(run.attempt(1).root)
    assert [*begins, "begin", str(run.root), "train"] in seen.calls["host"]
    assert [*begins, "end", str(run.root), attempt, "0", "train"] in seen.calls["host"]
    assert all(call[:3] == begins for call in seen.calls["host"])
    assert sorted(call[-1] for call in seen.calls["srun"]) == ["preflight", "prepare", "train"]
    logs = str(run.attempt(1).logs).replace("%", "%%")
    for call in seen.calls["srun"]:
        assert call[-3:-1] == ["bash", f"{run.code}/node.sh"]
        assert f"--output={logs}/{call[-1]}-%N.log" in call
        assert call[9 : 9 + len(cluster.srun)] == cluster.srun
        check_container(call[9 + len(cluster.srun) : -3], cluster, run)


def check_container(words: list[str], cluster: Cluster, run: RunDir) -> None:
    """What stands between srun's own options and the command: the container's words, and no more."""
    container = cluster.container
    if container is None:
        assert words == []
        return
    if container.runtime == "pyxis":
        assert [word.partition("=")[0][-6:] for word in words] == ["-image", "mounts", "er-env"]
        image, mounts = (word.partition("=")[2] for word in words[:2])
    else:
        assert words[:4] == ["apptainer", "exec", "--nv", "--bind"]
        mounts, image = words[4:]
    assert image == container.image
    places = [run.root, cluster.cache or os.environ["GALLEY_CACHE"], Path(os.environ["HOME"]) / ".cache/huggingface"]
    places += [Path.cwd() / "model", Path.cwd() / "chats.jsonl", *([cluster.scratch] if cluster.scratch else [])]
    own = [each if ":" in each else f"{each}:{each}" for each in container.mounts]
    assert mounts.split(",") == list(dict.fromkeys([*(f"{each}:{each}" for each in places), *own]))


def check_environment(found: dict[str, str], cluster: Cluster, run: RunDir) -> None:
    """What a step has in its environment."""
    wanted: dict[str, str | None] = {**cluster.variables, "GALLEY_RUN": str(run.root)}
    wanted |= {"GALLEY_ATTEMPT_DIR": str(run.attempt(1).root), "GALLEY_SCRATCH": cluster.scratch}
    wanted |= {"GALLEY_PYTHON": f"{cluster.venv}/bin/python" if cluster.venv else None}
    wanted |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), cluster.interface or None)
    wanted |= {"SET_UP": "done" if cluster.setup else None}
    for name, value in wanted.items():
        assert value is None or found[name] == value, name
    if cluster.cache:
        assert found["TORCH_EXTENSIONS_DIR"].startswith(f"{cluster.cache}/operators/")


def check_profile(text: str, base: str, root: Path) -> None:
    """A profile that says ``text`` wherever it may."""
    root.mkdir()
    if not is_text(text):  # No profile, a file in UTF-8, can hold it; it is refused everywhere all the same.
        assert hostile_profile(base, text, root) == BASES[base]
        return
    tree = hostile_profile(base, text, root)
    _, plain = planned(BASES[base])
    made, files = planned(tree)
    assert made.cluster is not None
    run = RunDir(made.run.root.absolute())
    check_directives(files["jobs/train.sbatch"], made.cluster, run, plain["jobs/train.sbatch"])
    seen = executed(made, files["jobs/train.sbatch"], root)
    check_calls(seen, made.cluster, run)
    check_environment(seen.environment, made.cluster, run)


def check_folder(text: str, base: str, root: Path, patch: pytest.MonkeyPatch) -> RunDir | None:
    """A working directory, with the run, the model, the data and the secrets in it, that is called ``text``.

    Returns the run; None: it was refused.
    """
    folder = root / text
    lay(folder)
    patch.chdir(folder)
    patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    profile("x", yaml.safe_dump(BASES[base] | {"secrets": ["MY_TOKEN"]}))
    try:
        made, todo = submission("my.yaml", "cluster=x")
    except UserError as error:
        one_line(error)
        return None
    assert made.cluster is not None
    run = RunDir(made.run.root.absolute())
    submitting.keep_secrets(run, made.cluster.secrets)
    script = todo.files["jobs/train.sbatch"]
    seen = executed(made, script, root)
    check_directives(script, made.cluster, run, script)
    check_calls(seen, made.cluster, run)
    assert seen.environment["GALLEY_RUN"] == f"{folder}/runs/my"
    assert os.fsencode(seen.environment["MY_TOKEN"]) == os.fsencode(SECRET)
    assert json.loads(todo.files["run.json"])["placement"]["paths"]["data"] == f"{folder}/chats.jsonl"
    return run


def check_node(run: RunDir, root: Path) -> None:
    """node.sh in the run's own folder: each stage calls Python with whole words, and cleans up."""
    scratch, python, operators = run.root / "scratch", run.root / "python", run.root / "operators"
    call = shims.CALL.format(log=shlex.quote(str(root / "node")), label="python")
    shims.write(python, call.replace("touch", "true"))
    for place in (root / "node", root / "empty", scratch, operators / "cpu_adam", run.attempt(1).stop.parent):
        place.mkdir(parents=True, exist_ok=True)
    (operators / "cpu_adam" / "x.so").touch()
    names = ("RUN", "PYTHON", "SCRATCH", "ATTEMPT_DIR")
    values = (run.root, python, scratch, run.attempt(1).root)
    env = {f"GALLEY_{name}": str(value) for name, value in zip(names, values, strict=True)}
    env |= {f"GALLEY_{name}": "1" for name in ("NODES", "RANKS", "THREADS", "PORT", "RENDEZVOUS", "HEAD", "PATIENCE")}
    env |= {"TORCH_EXTENSIONS_DIR": str(operators), "PATH": "/usr/bin:/bin", "SLURMD_NODENAME": "n1"}
    for stage in ("prepare", "preflight", "export", "train"):
        command = ["bash", str(assets.folder("slurm") / "node.sh"), stage]
        done = subprocess.run(command, env=env, cwd=root / "empty", capture_output=True, check=False, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert sorted(scratch.iterdir()) == sorted((root / "empty").iterdir()) == []
    calls = [os.fsdecode(path.read_bytes()).split("\0")[:-1] for path in (root / "node").iterdir()]
    plain = [["-m", f"galley.{stage}", f"{run.root}/run.json"] for stage in ("prepare", "export")]
    assert [call for call in sorted(calls) if len(call) == 3] == sorted(
        [*plain, ["-m", "galley_launch.job.node.preflight", str(run.attempt(1).root)]]
    )
    train, watch = sorted((call for call in calls if len(call) > 3), key=len, reverse=True)
    assert train[-3:] == ["-m", "galley.train", f"{run.root}/run.json"]
    assert watch[watch.index("--attempt") + 1] == str(run.attempt(1).root)
    assert len(calls) == 5
