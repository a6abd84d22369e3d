"""Imported before the libraries: silences what they log at import that no user can act on.

bitsandbytes warns of a kernel package that Galley does not use, each time that it is imported on a CPU.
"""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
