"""DeepSpeed: the engine, its optimizers, and optimizer state on a disk.

Imports the contract, `storage` and `model`.
"""
