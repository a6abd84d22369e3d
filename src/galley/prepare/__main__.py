"""``python -m galley.prepare RUN/run.json`` prepares a run here."""

import sys

import galley.ranks.quiet  # noqa: F401  # isort: skip
from galley.prepare.prepare import main

sys.exit(main(sys.argv[1:]))
