"""Random tokens: the control that every selection has to beat at the same budget."""

import torch

from training.methods.method import Method, MethodInputs


def random_tokens(given: MethodInputs) -> torch.Tensor:
    """Uniform scores, `(T, P)`, drawn as `(B, N)`."""
    layout, (samples, tiles) = given.layout, given.shape
    draws = torch.rand(samples, tiles * layout.tokens_per_tile, generator=given.generator)
    draws = draws.view(samples, tiles, -1).to(layout.tile_start.device)
    return draws[layout.tile_sample, layout.tile_ordinal]


RANDOM = Method("random", random_tokens, "before_encoder", "control")
