"""What is saved while training goes on, and read back by any number of ranks under any ZeRO stage.

Imports the contract, `storage`, `model`, `engine` and `ranks`.
"""
