"""``torchrun -m galley.train RUN/run.json`` starts one rank here."""

import sys

import galley.ranks.quiet  # noqa: F401  # isort: skip
from galley.ranks import heartbeat  # isort: skip

heartbeat.begin()  # before the libraries: from a cold shared disk their import takes minutes

from galley.train.train import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
