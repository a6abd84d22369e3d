"""Who is told of a run while it goes: experiment trackers, each in a process of its own.

Imports the contract.
"""
