"""Recipes: found, merged, typed, checked and explained; and what is known of a model without loading it.

Imports `base` and the contract.
"""
