"""``python -m galley.export RUN/run.json`` starts the export here."""

import sys

import galley.ranks.quiet  # noqa: F401  # isort: skip
from galley.export.export import main

sys.exit(main(sys.argv[1:]))
