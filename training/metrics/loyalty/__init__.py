"""Agreement of the answers with those of the dense model."""
