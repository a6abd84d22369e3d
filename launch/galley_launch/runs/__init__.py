"""Runs that exist: find one, say how it is, follow its logs, ask it to stop, say why it failed, remove it.

Imports `base`, `recipe`, `submit`, `job` and the contract.
"""
