"""Secrets in any field or variable are refused, with where they belong; none reaches an artefact. Siblings are not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from launch.submitting import RUN, galley, here, profile, submitted
from pydantic import BaseModel
from slurm.conftest import fakes as fakes
from slurm.fakes.scenario import Scenario

from galley.contract import sensitive
from galley.contract.rundir import RunDir
from galley.contract.sensitive import masked_page
from galley.ranks import stage
from galley_launch.cluster.profile import Cluster
from galley_launch.recipe.schema import Recipe

__all__ = ["fakes", "here"]

ROOT = Path(__file__).parents[2]
SENTINEL = "Zq7sentinel4XyW9pL2mNk8R"
PLAIN = "variables: {NCCL_DEBUG: WARN}\n"
FORMS = [
    f"https://ada:{SENTINEL}@hub.example/x",
    f"https://{SENTINEL}@hub.example/x",
    f"postgres://ada:{SENTINEL}@db.example/x",
    f"https://hub.example/x?token={SENTINEL}",
    f"https://hub.example/x?a=b&access_token={SENTINEL}",
    f"https://bucket.s3.amazonaws.com/x?X-Amz-Credential=a&X-Amz-Signature={SENTINEL}",
    f"https://account.blob.core.windows.net/x?sv=2024&sig={SENTINEL}",
    f"hf_{SENTINEL}",
    f"ghp_{SENTINEL}",
    f"github_pat_{SENTINEL}",
    f"glpat-{SENTINEL}",
    f"sk-ant-{SENTINEL}",
    f"xoxb-{SENTINEL}",
    f"npm_{SENTINEL}{SENTINEL}",
    f"Authorization: Bearer {SENTINEL}",
    f"Authorization: Basic {SENTINEL}",
    f"Bearer {SENTINEL}",
    f"X-Api-Key: {SENTINEL}",
    f"AccountName=a;AccountKey={SENTINEL}",
    f"eyJhbGciOi{SENTINEL}.eyJzdWIi{SENTINEL}.{SENTINEL}",
]
NAMES = [
    "GH_PAT", "HF_TOKEN", "MY_TOKENS", "DB_PASSWORD", "DB_PWD", "PGPASS", "SMTP_PASS", "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID", "AZURE_STORAGE_KEY", "AUTH", "GIT_AUTH", "SESSION_COOKIE", "OPENAI_APIKEY", "SSH_KEY",
    "MY_JWT", "my_api_key", "REGISTRY_CREDENTIALS",
]  # fmt: skip
HARMLESS_NAMES = [
    "TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "http_proxy", "KEYBOARD", "PASSES", "LD_PRELOAD", "PATH", "SSH_AUTH_SOCK",
    "PWD", "SSL_CERT_FILE", "AWS_SHARED_CREDENTIALS_FILE", "GOOGLE_APPLICATION_CREDENTIALS", "MONKEY", "COMPASS_DIR",
]  # fmt: skip
HARMLESS = [
    "org/model", "/data/my token file.jsonl", "https://hub.example/x?revision=main&page=2", "ssh://git@github.com/a/b",
    "docker://org/x:1", "nvcr.io#nvidia/pytorch:25.01-py3", "file:/home/ada/mlruns", "abfss://data@account.dfs.core/x",
    "0123456789abcdef0123456789abcdef01234567", "ada@example.org", "model.layers.0.*", "key=value", "sk-learn",
    "basic tests",
    "{{ bos_token }}{% for m in messages %}", "step 8: tokens: 4,194,304", "hf_cache", "a?b=c", "ghp_short",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMS)
def test_a_secret_is_known_by_its_form(text: str) -> None:
    assert sensitive.secret_in(text)
    assert sensitive.secret_in(f"GET {text} failed, said the server")
    assert SENTINEL not in sensitive.masked(f"before {text} after", "(hidden)")


@pytest.mark.parametrize("name", NAMES)
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert sensitive.is_secret_name(name)


@pytest.mark.parametrize("name", HARMLESS_NAMES)
def test_harmless_names(name: str) -> None:
    assert not sensitive.is_secret_name(name)


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_values(text: str) -> None:
    assert sensitive.secret_in(text) is None
    assert sensitive.assigned_in(text) is None
    assert sensitive.masked(text, "(hidden)") == text


def artefacts(root: Path, outside: Path) -> list[Path]:
    """Every file that holds the sentinel, but for those of the user's own and the private file of secrets."""
    own = {root / "my.yaml", *(root / "config").rglob("*.yaml"), outside}
    files = [path for path in root.rglob("*") if path.is_file() and path not in own]
    assert files
    return [path for path in files if SENTINEL.encode() in path.read_bytes() and "secrets" not in path.parts]


def text_fields(annotation: Any, path: str) -> Iterator[str]:
    """``path={}`` of every setting below ``annotation``, a type of pydantic's, that takes a text."""
    kind, inner = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        yield from text_fields(inner[0], path)
    elif kind in (Union, UnionType):
        for part in inner:
            yield from text_fields(part, path)
    elif kind is list:
        yield from (f'{field[:-2]}["{{}}"]' for field in text_fields(inner[0], path))
    elif kind is dict:
        yield f"{path}.PLAIN={{}}"
    elif annotation is str:
        yield f"{path}={{}}"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from text_fields(field.annotation, f"{path}.{name}" if path else name)


FIELDS = [
    *text_fields(Recipe, ""), *text_fields(Cluster, "cluster"), "name={}", "runs={}", "init_from={}", "deepspeed={}",
]  # fmt: skip
"""Every setting of a recipe and a profile that takes a text, and the words that become names and paths."""


@pytest.mark.parametrize("verb", ["plan", "submit"])
@pytest.mark.parametrize("field", FIELDS)
def test_no_field_takes_a_secret_into_an_artefact(
    here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str], field: str, verb: str
) -> None:
    profile("x", PLAIN)
    extra = ["tracking.mlflow.experiment=e"] if "mlflow.uri" in field else []
    extra += ["tracking.wandb.project=p"] if field.startswith(("tracking.wandb.e", "tracking.wandb.g")) else []
    for text in (FORMS[0], FORMS[3], FORMS[7]):
        status, out, err = galley(capsys, verb, "my.yaml", "cluster=x", *extra, field.format(text))
        assert (status, err.count("\n")) == (2, 1), f"{field} {text}: {out}{err}"
        assert not artefacts(here, here / "none"), field
        assert SENTINEL not in out
        assert submitted(fakes) == []


SOURCES = [*(ROOT / "launch").rglob("*.py"), *(ROOT / "slurm").glob("*.*")]
VARIABLES = sorted(
    {name for path in SOURCES for name in re.findall(r"[\"'$({]((?:[A-Z][A-Z0-9]*_)+[A-Z0-9]+)\b", path.read_text())}
    - {"SLURM_CONF"}  # where Slurm's own commands find their controller
    | {"MODULEPATH", "PYTHONPATH", "PATH", "http_proxy", "https_proxy", "ALL_PROXY", "PIP_INDEX_URL", "LD_PRELOAD"}
)  # fmt: skip
"""What has the form of an environment variable's name in the control plane and the job's scripts, and usual ones."""


@pytest.mark.parametrize("name", VARIABLES)
def test_no_variable_takes_a_secret_into_an_artefact(
    here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    profile("x", PLAIN)
    before = os.environ.get(name, "")
    monkeypatch.setenv(name, f"{before}:{FORMS[0]}" if name.endswith("PATH") and before else FORMS[0])
    status, out, err = galley(capsys, "submit", "my.yaml", "cluster=x")
    assert status in (0, 2), err
    assert SENTINEL not in out + err
    assert not artefacts(here, here / "none")
    assert SENTINEL not in json.dumps(fakes.calls())


DEEPSPEED: dict[str, Any] = {
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "{}", "nvme_path": "{}"}},
    "optimizer": {"type": "{}", "params": {"lr": "{}", "name": "{}"}},
    "scheduler": {"type": "{}", "params": {"warmup_type": "{}"}},
    "wandb": {"enabled": True, "team": "{}", "project": "{}", "group": "{}", "api_key": "{}"},
    "tensorboard": {"output_path": "{}", "job_name": "{}"}, "csv_monitor": {"output_path": "{}"},
    "flops_profiler": {"output_file": "{}"}, "comms_logger": {"prof_ops": ["{}"]},
    "checkpoint": {"tag_validation": "{}"},
    "communication_data_type": "{}", "monitor_config": {"comet": {"api_key": "{}"}}, "elasticity": {"x": "{}"},
    "data_types": {"grad_accum_dtype": "{}"}, "aio": {"x": "{}"}, "hybrid_engine": {"x": "{}"}, "my": {"own": "{}"},
    "compression_training": {"x": "{}"}, "nebula": {"persistent_storage_path": "{}"},
}  # fmt: skip


@pytest.mark.parametrize("block", DEEPSPEED)
def test_no_deepspeed_block_takes_a_secret_into_an_artefact(
    here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str], block: str
) -> None:
    profile("x", PLAIN)
    for text in (FORMS[0], FORMS[3], FORMS[7]):
        body = json.dumps({block: DEEPSPEED[block]}).replace("{}", text)
        for name, content in (("value", body), ("key", json.dumps({block: {text: 1}}))):
            (here / "ds.json").write_text(content)
            status, out, err = galley(capsys, "submit", "my.yaml", "cluster=x", "deepspeed=ds.json", f"name={name}")
            assert status in (0, 2), err
            (here / "ds.json").unlink()
            assert SENTINEL not in out, text
            assert not artefacts(here, here / "none"), text
            assert SENTINEL not in json.dumps(fakes.calls())


@pytest.mark.parametrize("field", ["tracking.wandb.project={}", "cluster.variables.PLAIN={}"])
@pytest.mark.parametrize("text", FORMS)
def test_every_form_is_refused_and_not_repeated(
    here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str], field: str, text: str
) -> None:
    profile("x", PLAIN)
    status, out, err = galley(capsys, "plan", "my.yaml", "cluster=x", field.format(json.dumps(text)))
    assert (status, out) == (2, "")
    assert "remove it" in err, err
    assert SENTINEL not in err


@pytest.mark.parametrize("name", ["HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"])
def test_variables_that_jobs_take_over(
    here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, FORMS[0])
    profile("x", PLAIN)
    status, out, err = galley(capsys, "submit", "my.yaml", "cluster=x")
    assert (status, err.count("\n")) == (2, 1)
    assert SENTINEL not in out + err
    if name == "HF_ENDPOINT":
        assert err.startswith("galley: environment: HF_ENDPOINT: holds a URL with a password")
        assert "list HF_ENDPOINT under secrets" in err
    assert not artefacts(here, here / "none")


def test_an_endpoint_with_a_password_goes_through_the_secrets(
    here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", FORMS[0])
    profile("x", "secrets: [HF_ENDPOINT]\n")
    assert galley(capsys, "submit", "my.yaml", "cluster=x")[0] == 0
    (kept,) = (here / "config" / "galley" / "secrets").iterdir()
    assert FORMS[0] in kept.read_text()
    assert "HF_ENDPOINT" not in (RUN.jobs / "train.sbatch").read_text()
    assert not artefacts(here, kept)
    assert SENTINEL not in json.dumps(fakes.calls())


@pytest.mark.parametrize("name", NAMES)
def test_a_profiles_variable_is_refused_by_its_name(
    here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    profile("x", f"variables: {{{name}: {SENTINEL}}}\n")
    status, out, err = galley(capsys, "plan", "my.yaml", "cluster=x")
    assert (status, out) == (2, "")
    assert f"variables.{name} looks like a secret; list its name under secrets instead" in err
    assert SENTINEL not in err


def test_a_profiles_directive_with_a_secret_by_name(
    here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    profile("x", f"directives: ['--comment=api_key={SENTINEL}']\n")
    status, _, err = galley(capsys, "plan", "my.yaml", "cluster=x")
    assert status == 2
    assert "directives.0: holds what looks like a secret (api_key)" in err
    assert SENTINEL not in err


@pytest.mark.parametrize("text", FORMS)
def test_reports_and_records_hide_every_form(text: str, tmp_path: Path) -> None:
    shown = masked_page(f"<p>401 for {text} again</p>", {}, "(hidden)")
    assert SENTINEL not in shown
    assert "(hidden)" in shown
    attempt: Any = RunDir(tmp_path).attempt(1)
    stage.record_error(attempt, "prepare", 1, f"HTTPError: 401 for {text}")
    assert SENTINEL not in attempt.error("prepare").read_text()
