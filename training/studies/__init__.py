"""Studies on cards whose results are committed."""
