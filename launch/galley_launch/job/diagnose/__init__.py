"""What failed first in an attempt, on which node, and whether another attempt may succeed.

Imports the standard library, `job` and the contract's files, for Python 3.9.
"""
