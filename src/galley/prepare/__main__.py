"""``python -m galley.prepare RUN/run.json`` prepares a run here."""

import sys

from galley.prepare.prepare import main

sys.exit(main(sys.argv[1:]))
