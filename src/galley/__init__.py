"""Galley's data plane: the stages that prepare data, train and export, each reading one ``run.json``."""
