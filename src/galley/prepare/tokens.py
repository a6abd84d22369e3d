"""The tokenizer and the chat template that a run uses from prepare to export."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galley.contract.errors import UserError
from galley.contract.files import LARGEST_TEMPLATE, read_text, reason
from galley.contract.spec import RunSpec
from galley.prepare.formats.chat import CHAT
from galley.prepare.formats.table import FORMATS
from galley.prepare.formats.template import Template, study
from galley.storage.cache import digest

SHIPPED = Path(__file__).parent / "templates"
CONTROL = re.compile(r"<\|[A-Za-z0-9_./-]+\|>")


@dataclass(frozen=True)
class Tokens:
    """A tokenizer with its final template."""

    tokenizer: Any
    """A fast transformers tokenizer; ``chat_template`` is set."""
    template: Template
    template_hash: str
    """SHA-256 of the template's text."""
    fingerprint: str
    """Over everything that decides which ids a text becomes."""
    added: list[str]
    """Tokens that the template needs and the tokenizer lacked."""

    @property
    def added_ids(self) -> list[int]:
        """Ids of ``added``."""
        return [int(self.tokenizer.convert_tokens_to_ids(token)) for token in self.added]


def load_tokens(spec: RunSpec, folder: Path) -> Tokens:
    """Load the tokenizer in ``folder``, give it the template that the task asks for and the tokens that this needs.

    Raises :class:`UserError` where there is no tokenizer, no fast one, no template, or a template that fails.
    """
    tokenizer = _load(folder, spec.task.model.trust_remote_code)
    if not FORMATS.get(spec.task.data.format, CHAT).templated:
        return _without_template(tokenizer)
    text, added = choose_template(tokenizer, spec)
    template = study(tokenizer, text)
    if spec.task.model.chat_template and template.end_of_turn and "eos_token" not in text:
        tokenizer.eos_token = template.end_of_turn  # so that generation stops where an answer ends
    tokenizer.chat_template = text
    if template.end_of_turn is None and not template.marked:
        print("warning: the chat template ends no answer with a special token: the model cannot learn to stop")
    if not template.end_is_marked:
        what = f"the chat template's {{% generation %}} marks leave out {template.end_of_turn}, which ends an answer"
        print(f"warning: {what}: the model cannot learn to stop; put the token inside the marks")
    return _tokens(tokenizer, template, text, added)


def _without_template(tokenizer: Any) -> Tokens:
    """For plain text, which no template goes around; the tokenizer keeps its own, if it has one."""
    return _tokens(tokenizer, Template(text="", variables={}), "", [])


def _tokens(tokenizer: Any, template: Template, text: str, added: list[str]) -> Tokens:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return Tokens(
        tokenizer=tokenizer,
        template=template,
        template_hash=hashlib.sha256(text.encode()).hexdigest(),
        fingerprint=digest([backend.to_str(), sorted(map(repr, tokenizer.special_tokens_map.items()))]),
        added=added,
    )


def _load(folder: Path, trust: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:  # of damaged files, anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        what = f"'{folder}' has no tokenizer that loads ({reason[0][:200]})"
        raise UserError("model.path", what, "put the tokenizer's files beside the weights") from error
    if not getattr(tokenizer, "is_fast", False):
        what = f"{type(tokenizer).__name__} is not a fast tokenizer, which tells where in the text a token stands"
        raise UserError("model.path", what, "add its tokenizer.json")
    return tokenizer


def choose_template(tokenizer: Any, spec: RunSpec) -> tuple[str, list[str]]:
    """The template's text, and the control tokens (``<|…|>``) in it that had to be added to ``tokenizer``."""
    wanted, given = spec.placement.paths.chat_template, spec.task.model.chat_template
    if wanted is None:
        return _own_template(tokenizer, spec.task.model.path), []
    shipped = SHIPPED / f"{wanted}.jinja"
    path = shipped if shipped.is_file() else Path(wanted)
    try:
        text = read_text(path, LARGEST_TEMPLATE)
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.jinja")))
        what = f"'{given}' cannot be read ({reason(error)})"
        raise UserError("model.chat_template", what, f"give {names} or a .jinja file") from None
    known = tokenizer.get_vocab()
    missing = [token for token in dict.fromkeys(CONTROL.findall(text)) if token not in known]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    return text, missing


def _own_template(tokenizer: Any, name: str) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        what = f"'{name}' brings none, as base models do"
        raise UserError("model.chat_template", what, "use model.chat_template=chatml") from None
