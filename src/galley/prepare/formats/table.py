"""The formats that there are, by name, in the order in which they are tried on a file whose format is not named."""

from __future__ import annotations

from typing import Any

from galley.prepare.formats.alpaca import ALPACA
from galley.prepare.formats.base import Format
from galley.prepare.formats.chat import CHAT
from galley.prepare.formats.prompt_completion import PROMPT_COMPLETION
from galley.prepare.formats.sharegpt import SHAREGPT
from galley.prepare.formats.text import TEXT

FORMATS: dict[str, Format[Any]] = {form.name: form for form in (CHAT, SHAREGPT, ALPACA, PROMPT_COMPLETION, TEXT)}
