"""What is minimised: one file for each loss.

Imports `data` and `model`.
"""
