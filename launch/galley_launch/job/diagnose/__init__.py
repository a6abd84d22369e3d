"""What failed first in an attempt, whose fault it was, and whether trying again can cure it.

Imports the standard library, `job` and the contract's files, for Python 3.9.
"""
