"""Layout of the visual tokens in a prompt, and the geometry between tiles, images and cells of the glance.

Pure functions on tensors. Sizes in the docstrings of this folder: B samples of L positions, I images, T tiles (global
views included), P visual tokens per tile, C = P cells of the glance, D the width of the text model. Tiles, images and
tokens are always in prompt order.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F


class Markers(Protocol):
    """Token ids by which the layout is read: a [`QGSAConfig`], or the processor's own."""

    @property
    def tokens_per_tile(self) -> int: ...
    @property
    def image_token_id(self) -> int: ...
    @property
    def global_image_token_id(self) -> int | list[int]: ...
    @property
    def tile_token_ids(self) -> list: ...


@dataclass(frozen=True)
class VisualLayout:
    """Places of a batch's tiles in its prompts.

    Args:
        tile_sample, tile_image (`(T,)` int64): sample and image (0 .. I - 1) of each tile.
        tile_ordinal (`(T,)` int64): number of the tile within its sample, which is its index in `pixel_values`.
        tile_row, tile_column (`(T,)` int64): its place in the grid; -1 for a global view.
        tile_start (`(T,)` int64): position of its first visual token.
        tile_of_position (`(B, L)` int64): the tile whose markers or tokens stand at each position; -1 for text.
        grids (`(I, 2)` int64): rows and columns of each image.
        tokens_per_tile (`int`): P.
    """

    tile_sample: torch.Tensor
    tile_image: torch.Tensor
    tile_ordinal: torch.Tensor
    tile_row: torch.Tensor
    tile_column: torch.Tensor
    tile_start: torch.Tensor
    tile_of_position: torch.Tensor
    grids: torch.Tensor
    tokens_per_tile: int

    @classmethod
    def of(cls, markers: Markers, input_ids: torch.Tensor) -> "VisualLayout":
        """Step 1: read the layout from the marker tokens of the prompts, `input_ids` `(B, L)` int64.

        Raises ValueError, naming the sample and the numbers, if the placeholders do not make whole tiles, a tile lacks
        its marker, an image lacks its global view, or the tiles do not make a grid.
        """
        per_tile = markers.tokens_per_tile
        tile_sample, tile_start = _find_tiles(input_ids, per_tile, markers.image_token_id)
        is_global, tile_row, tile_column, block_start = _read_markers(input_ids, tile_sample, tile_start, markers)
        tile_image = is_global.cumsum(0) - is_global.int()
        grids = _read_grids(tile_sample, tile_image, tile_row, tile_column, is_global)
        first_of_sample = torch.searchsorted(tile_sample, tile_sample)
        return cls(
            tile_sample=tile_sample,
            tile_image=tile_image,
            tile_ordinal=torch.arange(len(tile_sample), device=input_ids.device) - first_of_sample,
            tile_row=tile_row,
            tile_column=tile_column,
            tile_start=tile_start,
            tile_of_position=_tile_of_each_position(
                input_ids.shape, tile_sample, block_start, is_global, tile_start + per_tile
            ),
            grids=grids,
            tokens_per_tile=per_tile,
        )

    @property
    def is_global(self) -> torch.Tensor:
        """Whether each tile is a global view, `(T,)` bool."""
        return self.tile_row < 0

    @property
    def has_tiles(self) -> torch.Tensor:
        """Whether the image of each tile is more than its global view, `(T,)` bool."""
        return self.grids[self.tile_image].prod(1) > 0

    @property
    def image_sample(self) -> torch.Tensor:
        """Sample of each image, `(I,)` int64."""
        return self.tile_sample[self.is_global]

    @property
    def token_positions(self) -> torch.Tensor:
        """Position of every visual token in its sample, `(T, P)` int64."""
        return self.tile_start[:, None] + torch.arange(self.tokens_per_tile, device=self.tile_start.device)

    @property
    def tile_slot(self) -> torch.Tensor:
        """Number of each tile within its image, `(T,)` int64."""
        first = torch.searchsorted(self.tile_image, torch.arange(len(self.grids), device=self.tile_image.device))
        return torch.arange(len(self.tile_image), device=self.tile_image.device) - first[self.tile_image]

    @property
    def positions_per_tile(self) -> torch.Tensor:
        """Number of positions of each tile, markers and visual tokens together, `(T,)` int64."""
        return torch.bincount(self.tile_of_position[self.tile_of_position >= 0], minlength=len(self.tile_row))

    @property
    def tiles_per_sample(self) -> torch.Tensor:
        """Number of tiles of each sample, global views included, `(B,)` int64."""
        return torch.bincount(self.tile_sample, minlength=len(self.tile_of_position))


def _find_tiles(
    input_ids: torch.Tensor, tokens_per_tile: int, image_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample and first position of every tile, `(T,)` each, by its run of placeholders."""
    is_visual = input_ids == image_token_id
    for row, count in enumerate(is_visual.sum(1).tolist()):
        if count % tokens_per_tile:
            raise ValueError(
                f"sample {row}: the number of image placeholders ({count}) must be a multiple of the number of visual "
                f"tokens per tile ({tokens_per_tile})"
            )
    sample, position = is_visual.nonzero(as_tuple=True)
    tile_sample = sample.view(-1, tokens_per_tile)[:, 0].contiguous()
    positions = position.view(-1, tokens_per_tile)
    tile_start = positions[:, 0].contiguous()
    broken = (positions[:, -1] - tile_start != tokens_per_tile - 1) | (tile_start < 2)
    for tile in broken.nonzero()[:1, 0].tolist():
        raise ValueError(
            f"sample {tile_sample[tile]}: expected {tokens_per_tile} consecutive image placeholders after the two "
            f"tile markers at position {tile_start[tile]}"
        )
    return tile_sample, tile_start


def marker_sequences(markers: Markers) -> list[list[int]]:
    """The ids of each marker: that of the global view, then those of the 36 tiles.

    A marker is one token in most tokenizers, and several of ordinary text in those that lack it.
    """
    found = (markers.global_image_token_id, *markers.tile_token_ids)
    return [[each] if isinstance(each, int) else each for each in found]


def find_sequence(input_ids: torch.Tensor, sequence: list[int]) -> torch.Tensor:
    """Where `sequence` ends in `input_ids` `(B, L)`: bool of the same shape."""
    windows = F.pad(input_ids, (len(sequence) - 1, 0), value=-1).unfold(1, len(sequence), 1)
    return (windows == input_ids.new_tensor(sequence)).all(-1)


def covered_by(input_ids: torch.Tensor, sequence: list[int]) -> torch.Tensor:
    """The positions of `input_ids` `(B, L)` that belong to a `sequence`, which may be empty: bool, the same shape."""
    if not sequence:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    ends = find_sequence(input_ids, sequence)
    return F.pad(ends, (0, len(sequence) - 1)).unfold(1, len(sequence), 1).any(-1)


def _read_markers(
    input_ids: torch.Tensor, tile_sample: torch.Tensor, tile_start: torch.Tensor, markers: Markers
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whether each tile is a global view, its row and its column (-1 for a global view), and where its markers begin.

    Each is `(T,)`. The first marker is <fake_token_around_image>, the second tells the place.
    """
    sequences = marker_sequences(markers)
    ends = torch.stack([find_sequence(input_ids, each) for each in sequences])[:, tile_sample, tile_start - 1]
    for tile in (~ends.any(0)).nonzero()[:1, 0].tolist():
        sample, start = int(tile_sample[tile]), int(tile_start[tile])
        raise ValueError(
            f"sample {sample}: token {input_ids[sample, start - 1]} before the tile at position {start} is neither "
            "the marker of the global view nor one of the 36 row and column markers"
        )
    number = ends.int().argmax(0)
    block_start = tile_start - 1 - tile_start.new_tensor([len(each) for each in sequences])[number]
    before = F.pad(input_ids, (1, 0), value=-1)[tile_sample, block_start + 1]
    for tile in ((before != before[:1]) | (block_start < 0)).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"sample {tile_sample[tile]}: expected <fake_token_around_image> two positions before the tile at "
            f"position {tile_start[tile]}, found token {before[tile]}"
        )
    is_global = number == 0
    row, column = (number - 1) // 6, (number - 1) % 6
    return is_global, torch.where(is_global, -1, row), torch.where(is_global, -1, column), block_start


def _read_grids(tile_sample, tile_image, tile_row, tile_column, is_global) -> torch.Tensor:
    """Rows and columns of every image, `(I, 2)`, checked against its tiles."""
    last = torch.ones_like(is_global)
    last[:-1] = tile_sample[1:] != tile_sample[:-1]
    for tile in (last & ~is_global).nonzero()[:1, 0].tolist():
        raise ValueError(f"sample {tile_sample[tile]}: the last image has no global view after its tiles")
    images = int(is_global.sum())
    grids = tile_row.new_zeros(images, 2)
    for axis, index in enumerate((tile_row, tile_column)):
        grids[:, axis].scatter_reduce_(0, tile_image, index + 1, "amax")
    counts = torch.bincount(tile_image, minlength=images) - 1
    for image in (counts != grids.prod(1)).nonzero()[:1, 0].tolist():
        rows, columns = grids[image].tolist()
        raise ValueError(
            f"image {image} has {counts[image]} tiles, but its grid of {rows} x {columns} needs {rows * columns}: is "
            "a global view missing?"
        )
    slot = torch.arange(len(tile_row), device=tile_row.device) - torch.searchsorted(tile_image, tile_image)
    for tile in ((tile_row * grids[tile_image, 1] + tile_column != slot) & ~is_global).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"sample {tile_sample[tile]}: tile {int(slot[tile])} of its image is marked as row {tile_row[tile] + 1}, "
            f"column {tile_column[tile] + 1}; tiles must come row by row"
        )
    return grids


def _tile_of_each_position(shape, tile_sample, block_start, is_global, tile_end) -> torch.Tensor:
    """The tile at each position, `(B, L)`; it spans its markers and everything up to the next tile's markers.

    A global view ends with its closing marker, after the `tile_end` `(T,)` of its visual tokens.
    """
    tile_of_position = torch.full(shape, -1, device=block_start.device)
    following = torch.cat([block_start[1:], block_start[:1]])  # a global view comes last
    ends = torch.where(is_global, tile_end + 1, following)
    for tile, (sample, start, end) in enumerate(zip(tile_sample.tolist(), block_start.tolist(), ends.tolist())):
        tile_of_position[sample, start:end] = tile
    return tile_of_position


# Between images, tiles and tokens


def to_images(values: torch.Tensor, layout: VisualLayout, fill: float) -> torch.Tensor:
    """Arrange per-tile values, `(T, ...)`, in one row per image, `(I, slots, ...)`, padded with `fill`."""
    slot = layout.tile_slot
    slots = int(slot.max()) + 1 if len(slot) else 0
    rows = values.new_full((len(layout.grids), slots, *values.shape[1:]), fill)
    return rows.index_put((layout.tile_image, slot), values)


def sum_per_image(values: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """Sum per-tile values, `(T,)`, over the tiles of each image, `(I,)`."""
    return values.new_zeros(len(layout.grids)).index_add(0, layout.tile_image, values)


def to_tiles(rows: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """Arrange per-image rows, `(I, slots, ...)`, by tile again, `(T, ...)`: the inverse of `to_images`."""
    return rows[layout.tile_image, layout.tile_slot]


def to_samples(values: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """Arrange per-token values, `(T, P)`, in prompt order by sample, `(B, N)`; 0 beyond a sample's own."""
    samples = len(layout.tile_of_position)
    most = int(layout.tiles_per_sample.max()) if samples else 0
    rows = values.new_zeros(samples, most, *values.shape[1:])
    return rows.index_put((layout.tile_sample, layout.tile_ordinal), values).flatten(1)


# Geometry: the glance is a square map of the whole image


def tile_relevance(relevance: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """Probability mass of the relevance map on every tile, `(T,)`; 0 for global views.

    Args:
        relevance: `(I, C)` probabilities over the cells of the glance.
    """
    side = round(relevance.shape[1] ** 0.5)
    edges = torch.arange(side + 1, device=relevance.device) / side
    overlaps = []
    for axis, index in enumerate((layout.tile_row, layout.tile_column)):
        parts = layout.grids[layout.tile_image, axis].clamp(min=1)
        low, high = (index / parts)[:, None], ((index + 1) / parts)[:, None]
        overlaps.append((torch.minimum(high, edges[1:]) - torch.maximum(low, edges[:-1])).clamp(min=0) * side)
    maps = relevance.view(-1, side, side)[layout.tile_image]
    return torch.einsum("tij,ti,tj->t", maps, overlaps[0].to(maps.dtype), overlaps[1].to(maps.dtype))


def token_centres(layout: VisualLayout, axis: int) -> torch.Tensor:
    """Centres of the token rows (`axis` 0) or columns (1) of every tile as fractions of the image, `(T, side)`."""
    side = round(layout.tokens_per_tile**0.5)
    index = (layout.tile_row, layout.tile_column)[axis].clamp(min=0)[:, None]
    steps = (torch.arange(side, device=index.device) + 0.5) / side
    parts = layout.grids[layout.tile_image, axis].clamp(min=1)
    return (index + steps) / torch.where(layout.is_global, 1, parts)[:, None]


def token_cells(layout: VisualLayout) -> torch.Tensor:
    """The glance cell that contains the centre of every visual token, `(T, P)` int64; a glance token's is its own."""
    side = round(layout.tokens_per_tile**0.5)
    steps = torch.arange(side, device=layout.tile_row.device)
    cells = []
    for axis, index in enumerate((layout.tile_row, layout.tile_column)):
        parts = layout.grids[layout.tile_image, axis].clamp(min=1)
        centre = (index.clamp(min=0)[:, None] * side + steps + 0.5) / torch.where(layout.is_global, 1, parts)[:, None]
        cells.append(centre.long().clamp(max=side - 1))
    return (cells[0][:, :, None] * side + cells[1][:, None, :]).flatten(1)


def token_relevance(relevance: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """The relevance map at the centre of every visual token, `(T, P)`, interpolated bilinearly between cell centres.

    Finer than `token_cells`: within a cell that stands out, the tokens around its centre come first.

    Args:
        relevance: `(I, C)` log-probabilities over the cells of the glance.
    """
    side = round(relevance.shape[1] ** 0.5)
    y, x = (2 * token_centres(layout, axis).to(relevance.dtype) - 1 for axis in (0, 1))
    where = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], dim=-1)
    maps = relevance.view(-1, 1, side, side)[layout.tile_image]
    return nn.functional.grid_sample(maps, where, padding_mode="border", align_corners=False).flatten(1)
