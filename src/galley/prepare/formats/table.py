"""The formats that there are, by name."""

from __future__ import annotations

from typing import Any

from galley.prepare.formats.base import Format
from galley.prepare.formats.chat import CHAT
from galley.prepare.formats.text import TEXT

FORMATS: dict[str, Format[Any]] = {form.name: form for form in (CHAT, TEXT)}
