"""What a job decides by itself; see galley_launch/job/verdict.py. A file, for a Python that knows no packages of ours."""

import sys

if sys.version_info < (3, 9):
    sys.exit("galley: host_python: %s is older than 3.9; name another in the cluster's profile" % sys.version.split()[0])

from galley_launch.job.verdict import main

sys.exit(main(sys.argv[1:]))
