"""Exact counts: how many positions every image takes in the spliced prompt, known before anything is encoded.

An engine that serves many requests reserves the positions of an image before it has seen it. With
`positions_per_image` (N), the markers and the visual tokens of each image therefore take N positions together:

    count   min(N, what the glance and the `max_tiles` tiles hold): a function of grid and budget alone
    tiles   as many as the complexity asks for, but enough to fill the count, and so few that tokens have room
    tokens  what the markers of the global view and of the chosen tiles leave of the count

The markers of every chosen tile stay, even if none of its tokens is kept. Pure functions on tensors; sizes as in
`layout_qgsa`.
"""

from dataclasses import dataclass, replace

import torch

from .configuration_qgsa import MAX_BUDGET, Budget
from .layout_qgsa import VisualLayout, sum_per_image, to_images


@dataclass(frozen=True)
class ExactCount:
    """The positions that the images of a batch take.

    Args:
        total (`(I,)` int64): the count itself.
        fixed (`(I,)` int64): positions among them of markers that stay whatever is chosen: those of the global view;
            those of all tiles with `keep_tile_markers` and for "after_encoder".
        added (`(T,)` int64): positions of the markers that stay if their tile is chosen.
        least_tiles, most_tiles (`(I,)` int64): how many tiles fill the count, and leave room for a visual token.
        is_whole (`bool`): whether the counts are those of everything that there is.
    """

    total: torch.Tensor
    fixed: torch.Tensor
    added: torch.Tensor
    least_tiles: torch.Tensor
    most_tiles: torch.Tensor
    is_whole: bool

    @classmethod
    def of(cls, budget: Budget, layout: VisualLayout, keep_tile_markers: bool) -> "ExactCount | None":
        """The count of each image; None if the budget sets none.

        Raises ValueError, naming both numbers, if it leaves no room for a visual token.
        """
        limit, per_tile, every_tile = budget.positions_per_image, layout.tokens_per_tile, layout.grids.prod(1)
        if limit is None:
            return None
        markers, all_tiles = layout.positions_per_tile - per_tile, budget.selection == "after_encoder"
        stay = layout.is_global | keep_tile_markers | all_tiles
        fixed, added = sum_per_image(markers.where(stay, 0), layout), markers.where(~stay, 0)
        cheapest = to_images(added.where(~layout.is_global, MAX_BUDGET), layout, MAX_BUDGET).amin(1)
        dearest = to_images(added, layout, 0).amax(1)
        tiles = every_tile if all_tiles else every_tile.clamp(max=budget.max_tiles)
        everything = sum_per_image(layout.positions_per_tile, layout)
        held = torch.where(tiles == every_tile, everything, fixed + per_tile + tiles * (per_tile + cheapest))
        total = held.clamp(max=limit)
        room = total - fixed
        least = ((room + cheapest - 1) // (per_tile + cheapest)).clamp(min=0).minimum(tiles)
        most = (room - 1) // dearest.clamp(min=1)
        for image in ((room < 1) | (most < least)).nonzero()[:1, 0].tolist():
            raise ValueError(
                f"positions_per_image ({limit}) leaves no room for visual tokens: {int(fixed[image])} positions of "
                f"image {image} are markers that always stay, and those of a chosen tile take up to "
                f"{int(dearest[image])}"
            )
        return cls(total, fixed, added, least, most, bool((total == everything).all()))

    def tiles(self, m: torch.Tensor) -> torch.Tensor:
        """The number of tiles nearest to `m` `(I,)` with which the count can be met, `(I,)` int64."""
        return m.maximum(self.least_tiles).minimum(self.most_tiles)

    def tokens(self, chosen: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
        """The number of visual tokens that fill the count beside the markers of the `chosen` `(T,)` tiles, `(I,)`."""
        return self.total - self.fixed - sum_per_image(self.added.where(chosen, 0), layout)

    def limits(self, budget: Budget) -> Budget:
        """The `budget` with the most visual tokens that the count leaves room for as its limit."""
        tokens = max(self.total.sub(self.fixed).tolist())
        return replace(budget, min_visual_tokens=tokens, max_visual_tokens=tokens)
