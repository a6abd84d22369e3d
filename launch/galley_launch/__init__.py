"""The control plane: turns a recipe and a ZeRO config into a run. Never imports torch or anything as heavy."""
