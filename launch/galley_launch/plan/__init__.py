"""From the words of the command line to a RunSpec and a Plan: files to write, commands to start. Nothing happens here.

Imports `base`, `recipe`, `deepspeed`, `cluster` and the contract.
"""
