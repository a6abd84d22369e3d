"""What runs on each node of a job: the preflight before training, and the watcher of its ranks beside it.

Imports the standard library, `job` and the contract's files, for Python 3.9.
"""
