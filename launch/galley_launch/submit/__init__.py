"""Carry out a plan on a Slurm cluster: job scripts, the frozen code, `sbatch`, and how a submitted run is.

Imports `base`, `recipe`, `cluster`, `plan`, `job` and the contract.
"""
