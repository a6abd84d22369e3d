"""The report of a run: one page that needs nothing but a browser.

Imports `base`, `recipe`, `plan`, `submit`, `runs`, `job` and the contract.
"""
