"""A user's DeepSpeed JSON: read as DeepSpeed reads it, every key and value accounted for, made complete.

Imports `base`, `recipe` and the contract.
"""
