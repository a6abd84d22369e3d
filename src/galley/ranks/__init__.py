"""Processes that train together: how a stage starts and ends, how ranks meet, beat, agree and stop.

Imports the contract and `storage`.
"""
