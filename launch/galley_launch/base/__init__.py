"""What every room of the control plane stands on: the grammar of the command line, YAML as text, tables, locks.

Imports the contract and light libraries, and no other room.
"""
