"""From rows of a file to documents: tokens, and which of them are trained on.

Imports the contract, `storage`, `data` and no other part of `prepare`.
"""
