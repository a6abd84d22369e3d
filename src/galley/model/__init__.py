"""The model that is trained: what its files hold, loaded or built sharded, quantised, with adapters and attention.

Imports the contract, `storage` and `data`.
"""
