"""``python -m galley_launch`` is ``galley``."""

import sys

from galley_launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
