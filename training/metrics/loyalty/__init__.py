"""How far the answers of selection are those of the dense model."""
