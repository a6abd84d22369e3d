"""What a job decides on the cluster's nodes, and how Slurm is asked. Its entry point there is :mod:`.verdict`.

Imports the standard library and the contract but for its pydantic, for a host's own Python from 3.9 on.
"""
