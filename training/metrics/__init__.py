"""Local `evaluate` metrics, one folder for each; the maths are plain functions that need no `evaluate`."""
