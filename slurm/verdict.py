"""What a job decides by itself; see galley_launch/job/verdict.py. A file, for a Python without our packages."""

import sys

if sys.version_info < (3, 9):  # noqa: UP036 - a node's own Python may be older than ours
    old = sys.version.split()[0]
    todo = "name another: cluster.host_python=/usr/bin/python3.11"
    sys.exit("galley: host_python: " + sys.executable + " is " + old + ", older than 3.9; " + todo)

from galley_launch.job.verdict import main

sys.exit(main(sys.argv[1:]))
