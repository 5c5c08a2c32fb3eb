"""Centre: the tokens nearest the centre of the image, the control for data sets whose objects are in the middle."""

import torch

from training.methods.method import Method, MethodInputs


def centre(given: MethodInputs) -> torch.Tensor:
    """The negative squared distance from the image's centre, `(T, P)`; 1 less for the glance, which comes last."""
    layout = given.layout
    side = round(layout.tokens_per_tile**0.5)
    steps = (torch.arange(side, device=layout.tile_row.device) + 0.5) / side
    squares = []
    for axis, index in enumerate((layout.tile_row, layout.tile_column)):
        parts = layout.grids[layout.tile_image, axis].clamp(min=1)
        place = (index.clamp(min=0)[:, None] + steps) / torch.where(layout.is_global, 1, parts)[:, None]
        squares.append((place - 0.5) ** 2)
    return -(squares[0][:, :, None] + squares[1][:, None, :]).flatten(1) - layout.is_global[:, None].float()


CENTRE = Method("centre", centre, "before_encoder", "control")
