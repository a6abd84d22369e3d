"""What is minimised: one file for each loss, and a table of their names.

Imports `contract`, `data` and `model`.
"""
