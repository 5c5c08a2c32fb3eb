"""Scores of visual tokens that do not come from the question: the controls every table carries."""

import torch

from modeling_qgsa.selection_qgsa import VisualLayout


def random_scores(layout: VisualLayout, generator: torch.Generator) -> torch.Tensor:
    """Uniform scores of all visual tokens, `(B, N)`: the control that a selection has to beat."""
    return torch.rand(_shape(layout), generator=generator)


def centre_scores(layout: VisualLayout, generator: torch.Generator) -> torch.Tensor:
    """Scores that fall with the distance from the centre of the image, `(B, N)`; tiles before the global view."""
    side = round(layout.tokens_per_tile**0.5)
    steps = (torch.arange(side, device=layout.tile_row.device) + 0.5) / side
    squares = []
    for axis, index in enumerate((layout.tile_row, layout.tile_column)):
        parts = layout.grids[layout.tile_image, axis].clamp(min=1)
        place = (index.clamp(min=0)[:, None] + steps) / torch.where(layout.is_global, 1, parts)[:, None]
        squares.append((place - 0.5) ** 2)
    scores = -(squares[0][:, :, None] + squares[1][:, None, :]).flatten(1) - layout.is_global[:, None].float()
    where = (layout.tile_sample, layout.tile_ordinal)
    samples, most = _shape(layout)
    placed = scores.new_zeros(samples, most // layout.tokens_per_tile, layout.tokens_per_tile)
    return placed.index_put(where, scores).flatten(1)


def _shape(layout: VisualLayout) -> tuple[int, int]:
    samples = len(layout.tile_of_position)
    return samples, int(torch.bincount(layout.tile_sample, minlength=samples).max()) * layout.tokens_per_tile
