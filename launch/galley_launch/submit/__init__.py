"""Carry out a plan on a Slurm cluster: job scripts, the frozen code, `sbatch`, and the state of a submitted run.

Imports `base`, `recipe`, `cluster`, `plan`, `job` and the contract.
"""
