"""What runs on each node of a job: is it fit to train, and do its ranks still move?

Imports the standard library, `job` and the contract's files, for Python 3.9.
"""
