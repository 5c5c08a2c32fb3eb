"""Size of a selection, and whether it looks at the right place."""
