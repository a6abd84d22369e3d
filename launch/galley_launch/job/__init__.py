"""What runs inside a job: the standard library and ``galley.rundir`` only, for a host's own Python from 3.9 on."""
