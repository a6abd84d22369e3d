"""Carry out a plan on this box: hold the run, start each stage, watch it, report how it ended.

Imports `base`, `plan`, `submit`, `job` and the contract.
"""
