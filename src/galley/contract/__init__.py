"""What the two planes agree on: what a run is, what its files are called, how they are read and printed.

Imports pydantic (`spec`, `task`, `pace` only) and the standard library; the rest is also for a bare Python 3.9.
"""
