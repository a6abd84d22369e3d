"""Files that outlive a run: the shared cache, folders of weights, checksums, and limits on work of others' making.

Imports the contract and the standard library; no torch.
"""
