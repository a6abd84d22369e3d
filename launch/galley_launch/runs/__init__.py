"""Runs that exist: find one, tell its state, follow its logs, ask it to stop, explain why it failed, remove it.

Imports `base`, `recipe`, `submit`, `job` and the contract.
"""
