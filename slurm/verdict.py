"""What a job decides by itself; see galley_launch/job/verdict.py. A file, for a Python without our packages."""

import sys

if sys.version_info < (3, 9):  # noqa: UP036 - a node's own Python may be older than ours
    old = sys.version.split()[0]
    sys.exit("galley: host_python: " + old + " is older than 3.9; name another in the cluster's profile")

from galley_launch.job.verdict import main

sys.exit(main(sys.argv[1:]))
