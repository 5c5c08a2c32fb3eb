"""Local `evaluate` metrics, one folder each; the maths is in plain functions."""
