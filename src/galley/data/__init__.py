"""Prepared data as ranks map them, and which samples a step is trained on.

Imports the contract and `storage`; numpy, no torch before a batch is made.
"""
