"""Random tiles: the glance and whole tiles at random, the control that shows what choosing *tiles* is worth.

Unlike `random`, it never loses the overview. A budget smaller than one tile keeps the first tokens of the glance; one
that ends inside a tile keeps the first tokens of that tile.
"""

import torch

from training.methods.method import Method, MethodInputs


def random_tiles(given: MethodInputs) -> torch.Tensor:
    """One number in [0, 1) per tile for all of its tokens, 1 for the global view: scores `(T, P)`."""
    layout = given.layout
    draws = torch.rand(given.shape, generator=given.generator).to(layout.tile_start.device)
    scores = torch.where(layout.is_global, 1.0, draws[layout.tile_sample, layout.tile_ordinal])
    return scores[:, None].expand(-1, layout.tokens_per_tile)


RANDOM_TILES = Method("random-tiles", random_tiles, "before_encoder", "control")
