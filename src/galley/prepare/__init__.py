"""``galley.prepare``: everything that ranks need, on this machine's disk, before any of them starts.

Imports the contract, `storage`, `data`, `model`, `track`, and of `ranks` the stage and operators.
"""
