"""``galley.train``: the loop of one rank, its schedule, measurements and records.

Imports everything but `prepare` and `export`.
"""
