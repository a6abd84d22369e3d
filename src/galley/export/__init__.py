"""``galley.export``: from a checkpoint to what the rest of the world can load, compared with what was trained.

Imports the contract, `storage`, `data`, `model`, `objective`, `checkpoint`, `ranks`, and what it repeats of `prepare`.
"""
