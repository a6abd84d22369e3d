"""Profiles of clusters: where jobs go, what a node is like, and what must never be written into a job.

Imports `base`, `recipe` (how a schema names its keys) and the contract.
"""
