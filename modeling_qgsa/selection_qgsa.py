"""Selection of visual tokens: where they stand, which are kept, and what is left of the prompt.

Pure functions on tensors. Sizes in the docstrings: B samples of L positions, I images, T tiles (global views
included), P visual tokens a tile, C = P cells of the glance, D the width of the text model. Tiles, images and tokens
are always in prompt order.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .prompt_qgsa import check_shape


@dataclass
class QGSASelection(ModelOutput):
    """What was looked at and what was kept.

    Args:
        kept_tokens (`(B, N)` bool): visual tokens kept, in prompt order; False beyond a sample's own tokens.
        kept_tiles (`(B, tiles)` bool): tiles that were encoded, in prompt order, the global view of an image last.
        visual_tokens (`(B,)` int64): k, the visual tokens kept in each sample.
        tiles (`(B,)` int64): m, the high-resolution tiles encoded in each sample; global views are not counted.
        relevance (`(I, rows, columns)` float): the selector's probability of each cell of the glance; sums to 1.
        complexity (`(I,)` float): estimated complexity of the question for each image, 0 to 1.
        grids (`(I, 2)` int64): rows and columns of each image's tiles; 0 x 0 for an image of a single tile.
        image_sample (`(I,)` int64): the sample each image belongs to.
        keep_indices (`(B, L')` int64): positions of the prompt that are left, -1 in the padding on the left.
    """

    kept_tokens: torch.BoolTensor | None = None
    kept_tiles: torch.BoolTensor | None = None
    visual_tokens: torch.LongTensor | None = None
    tiles: torch.LongTensor | None = None
    relevance: torch.FloatTensor | None = None
    complexity: torch.FloatTensor | None = None
    grids: torch.LongTensor | None = None
    image_sample: torch.LongTensor | None = None
    keep_indices: torch.LongTensor | None = None


@dataclass(frozen=True)
class VisualLayout:
    """Where the tiles of a batch stand in its prompts.

    Args:
        tile_sample, tile_image (`(T,)` int64): sample and image (0 .. I - 1) of each tile.
        tile_ordinal (`(T,)` int64): number of the tile within its sample, which is its place in `pixel_values`.
        tile_row, tile_column (`(T,)` int64): its place on the grid; -1 for a global view.
        tile_start (`(T,)` int64): position of its first visual token.
        tile_of_position (`(B, L)` int64): the tile whose markers or tokens stand there; -1 in the text.
        grids (`(I, 2)` int64): rows and columns of each image.
        tokens_per_tile (`int`): P.
    """

    tile_sample: torch.LongTensor
    tile_image: torch.LongTensor
    tile_ordinal: torch.LongTensor
    tile_row: torch.LongTensor
    tile_column: torch.LongTensor
    tile_start: torch.LongTensor
    tile_of_position: torch.LongTensor
    grids: torch.LongTensor
    tokens_per_tile: int

    @property
    def is_global(self) -> torch.BoolTensor:
        return self.tile_row < 0

    @property
    def image_sample(self) -> torch.LongTensor:
        return self.tile_sample[self.is_global]

    @property
    def token_positions(self) -> torch.LongTensor:
        """Position of every visual token in its sample, `(T, P)`."""
        return self.tile_start[:, None] + torch.arange(self.tokens_per_tile, device=self.tile_start.device)

    @property
    def tile_slot(self) -> torch.LongTensor:
        """Number of each tile within its image, `(T,)`."""
        first = torch.searchsorted(self.tile_image, torch.arange(len(self.grids), device=self.tile_image.device))
        return torch.arange(len(self.tile_image), device=self.tile_image.device) - first[self.tile_image]


@dataclass(frozen=True)
class Glance:
    """What is known of a batch before any tile is encoded: the layout, the global views, and what they point at."""

    layout: VisualLayout
    features: torch.Tensor  # (I, P, D) of the global views
    relevance: torch.Tensor  # (I, C) log-probabilities of the cells
    question_state: torch.Tensor  # (I, D) words of the question, weighed
    question_mask: torch.BoolTensor  # (I, L) what the selector read
    complexity_logits: torch.Tensor  # (I, levels)
    complexity: torch.Tensor  # (I,) 0 to 1


@dataclass(frozen=True)
class SelectedInputs:
    """What the text model gets: the kept embeddings, their mask and original positions; and the selection made."""

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.LongTensor
    selection: QGSASelection
    glance: Glance
    features: torch.Tensor  # (n, P, D) of the encoded tiles


def read_layout(
    input_ids: torch.LongTensor,
    tokens_per_tile: int,
    image_token_id: int,
    global_image_token_id: int,
    tile_token_ids: list[int],
) -> VisualLayout:
    """Step 1: read the layout of the tiles from the marker tokens of the prompt, `input_ids` `(B, L)` int64.

    Raises ValueError, naming sample and numbers, for placeholders that do not make whole tiles, a tile without its
    marker, an image without its global view, or tiles that do not make a grid.
    """
    is_visual = input_ids == image_token_id
    for sample, count in enumerate(is_visual.sum(1).tolist()):
        if count % tokens_per_tile:
            raise ValueError(
                f"sample {sample} has {count} image placeholders, which is no multiple of the {tokens_per_tile} "
                "of a tile"
            )
    sample, position = is_visual.nonzero(as_tuple=True)
    tile_sample = sample.view(-1, tokens_per_tile)[:, 0]
    positions = position.view(-1, tokens_per_tile)
    tile_start = positions[:, 0]
    for broken in (
        ((positions[:, -1] - tile_start != tokens_per_tile - 1) | (tile_start < 2)).nonzero()[:1, 0].tolist()
    ):
        raise ValueError(
            f"sample {tile_sample[broken]}: the tile at position {tile_start[broken]} is no run of {tokens_per_tile} "
            "placeholders behind its two markers"
        )

    marker = input_ids[tile_sample, tile_start - 1]
    is_global = marker == global_image_token_id
    matches = marker[:, None] == torch.tensor(tile_token_ids, device=input_ids.device)
    for broken in (~(is_global | matches.any(1))).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"sample {tile_sample[broken]}: token {marker[broken]} before the tile at position {tile_start[broken]} "
            "is neither the global view's marker nor one of the 36 of the rows and columns"
        )
    before = input_ids[tile_sample, tile_start - 2]
    for broken in (before != before[:1]).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"sample {tile_sample[broken]}: token {before[broken]} stands two before the tile at position "
            f"{tile_start[broken]}, where <fake_token_around_image> is expected"
        )
    number = matches.int().argmax(1)
    tile_row = torch.where(is_global, -1, number // 6)
    tile_column = torch.where(is_global, -1, number % 6)
    tile_image = is_global.cumsum(0) - is_global.int()
    grids = _read_grids(tile_sample, tile_image, tile_row, tile_column, is_global)

    tile_sample, tile_start = tile_sample.contiguous(), tile_start.contiguous()
    first_of_sample = torch.searchsorted(tile_sample, tile_sample)
    return VisualLayout(
        tile_sample=tile_sample,
        tile_image=tile_image,
        tile_ordinal=torch.arange(len(tile_sample), device=input_ids.device) - first_of_sample,
        tile_row=tile_row,
        tile_column=tile_column,
        tile_start=tile_start,
        tile_of_position=_tiles_of_positions(input_ids.shape, tile_sample, tile_start, is_global, tokens_per_tile),
        grids=grids,
        tokens_per_tile=tokens_per_tile,
    )


def _read_grids(tile_sample, tile_image, tile_row, tile_column, is_global) -> torch.LongTensor:
    """Rows and columns of every image, `(I, 2)`, checked against the tiles that are there."""
    for tile in range(len(tile_sample)):
        last = tile == len(tile_sample) - 1 or tile_sample[tile + 1] != tile_sample[tile]
        if last and not is_global[tile]:
            raise ValueError(f"sample {tile_sample[tile]}: its last image has no global view after its tiles")
    images = int(is_global.sum())
    grids = tile_row.new_zeros(images, 2)
    for axis, index in enumerate((tile_row, tile_column)):
        grids[:, axis].scatter_reduce_(0, tile_image, index + 1, "amax")
    counts = torch.bincount(tile_image, minlength=images) - 1
    for image in (counts != grids.prod(1)).nonzero()[:1, 0].tolist():
        rows, columns = grids[image].tolist()
        raise ValueError(
            f"image {image} has {counts[image]} tiles where its grid of {rows} x {columns} needs {rows * columns}: "
            "is a global view missing?"
        )
    first = torch.searchsorted(tile_image, tile_image)
    slot = torch.arange(len(tile_row), device=first.device) - first
    for tile in ((tile_row * grids[tile_image, 1] + tile_column != slot) & ~is_global).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"sample {tile_sample[tile]}: tile {int(slot[tile])} of its image is marked as row {tile_row[tile] + 1}, "
            f"column {tile_column[tile] + 1}: tiles stand row by row"
        )
    return grids


def _tiles_of_positions(shape, tile_sample, tile_start, is_global, tokens_per_tile) -> torch.LongTensor:
    """The tile at each position, `(B, L)`: from its two markers to the next tile's; a global view's to its last."""
    tile_of_position = torch.full(shape, -1, device=tile_start.device)
    ends = torch.cat([tile_start[1:] - 2, tile_start[:0].new_zeros(1)]) if len(tile_start) else tile_start
    ends = torch.where(is_global, tile_start + tokens_per_tile + 1, ends)
    for tile, (sample, start, end) in enumerate(zip(tile_sample.tolist(), tile_start.tolist(), ends.tolist())):
        tile_of_position[sample, start - 2 : end] = tile
    return tile_of_position


def tile_relevance(relevance: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """Probability mass of the relevance map on every tile, `(T,)`; 0 for global views.

    Args:
        relevance: `(I, C)` probabilities over the cells of the glance, a square map of the whole image.
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


def token_cells(layout: VisualLayout) -> torch.LongTensor:
    """The cell of the glance that every visual token lies in, `(T, P)`; a glance token's is its own."""
    side = round(layout.tokens_per_tile**0.5)
    steps = torch.arange(side, device=layout.tile_row.device)
    cells = []
    for axis, index in enumerate((layout.tile_row, layout.tile_column)):
        parts = layout.grids[layout.tile_image, axis].clamp(min=1)
        centre = (index.clamp(min=0)[:, None] * side + steps + 0.5) / torch.where(layout.is_global, 1, parts)[:, None]
        cells.append(centre.long().clamp(max=side - 1))
    return (cells[0][:, :, None] * side + cells[1][:, None, :]).flatten(1)


def to_images(values: torch.Tensor, layout: VisualLayout, fill: float) -> torch.Tensor:
    """Gather values of tiles, `(T, ...)`, into one row an image, `(I, slots, ...)`, padded with `fill`."""
    slot = layout.tile_slot
    slots = int(slot.max()) + 1 if len(slot) else 0
    rows = values.new_full((len(layout.grids), slots, *values.shape[1:]), fill)
    return rows.index_put((layout.tile_image, slot), values)


def to_tiles(rows: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """Take the tokens in the rows of the images, `(I, slots * P)`, back to their tiles, `(T, P)`."""
    return rows.view(len(rows), -1, layout.tokens_per_tile)[layout.tile_image, layout.tile_slot]


def relevance_of_tokens(relevance: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """The relevance map read at the centre of every visual token, `(T, P)`, bilinearly between the cells' centres.

    Finer than `token_cells`: within a cell that stands out the tokens around its centre come first.

    Args:
        relevance: `(I, C)` log-probabilities over the cells of the glance, a square map of the whole image.
    """
    side = round(relevance.shape[1] ** 0.5)
    steps = (torch.arange(side, device=relevance.device) + 0.5) / side
    axes = []
    for axis, index in enumerate((layout.tile_column, layout.tile_row)):
        parts = layout.grids[layout.tile_image, 1 - axis].clamp(min=1)
        place = (index.clamp(min=0)[:, None] + steps) / torch.where(layout.is_global, 1, parts)[:, None]
        axes.append(2 * place.to(relevance.dtype) - 1)
    where = torch.stack([axes[0][:, None, :].expand(-1, side, -1), axes[1][:, :, None].expand(-1, -1, side)], dim=-1)
    maps = relevance.view(-1, 1, side, side)[layout.tile_image]
    return nn.functional.grid_sample(maps, where, padding_mode="border", align_corners=False).flatten(1)


def rank_tokens(
    scores: torch.Tensor, candidates: torch.BoolTensor, layout: VisualLayout
) -> tuple[torch.Tensor, torch.BoolTensor]:
    """All tokens of an image in a row, for `keep_top_k`: `scores` and `candidates` `(T, P)` as `(I, slots * P)`."""
    return to_images(scores, layout, 0).flatten(1), to_images(candidates, layout, False).flatten(1)


def keep_top_k(scores: torch.Tensor, candidates: torch.BoolTensor, k: torch.LongTensor) -> torch.BoolTensor:
    """Keep the `k` best candidates of each row; ties go to the first.

    Args:
        scores: `(rows, n)` float.
        candidates: `(rows, n)` bool.
        k: `(rows,)` int64; more than there are keeps all candidates.

    Returns keep, `(rows, n)` bool.
    """
    order = scores.masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < k[:, None]) & candidates


def relaxed_top_k(
    scores: torch.Tensor, candidates: torch.BoolTensor, k: torch.LongTensor, temperature: float, noise: bool = True
) -> torch.Tensor:
    """Log-gates of a relaxed top-k: Gumbel noise on the scores, then a sigmoid around the k-th of them.

    As `temperature` falls the gates go to 1 for the `k` best and to 0 for the rest (QGSA's Gumbel-Softmax selector,
    in its top-k form; Jang et al. 2017). Shapes as in `keep_top_k`; k is at least 1.

    Returns log g, `(rows, n)`, at most 0; 0 for what is no candidate.
    """
    if noise:
        uniform = torch.rand_like(scores, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
        scores = scores - torch.log(-torch.log(uniform)).to(scores.dtype)
    ordered = scores.masked_fill(~candidates, float("-inf")).sort(dim=1, descending=True).values
    count = candidates.sum(1)
    last = ordered.gather(1, (k - 1)[:, None].clamp(max=ordered.shape[1] - 1))
    following = ordered.gather(1, k[:, None].clamp(max=ordered.shape[1] - 1))
    gates = nn.functional.logsigmoid((scores - (last + following) / 2) / temperature)
    return gates.masked_fill(~candidates | (k >= count)[:, None], 0.0)


def complexity_at(logits: torch.Tensor, quantile: float) -> torch.Tensor:
    """The lowest complexity that suffices with the estimated probability `quantile`, `(I,)` float32 in 0 .. 1.

    Args:
        logits: `(I, levels)`, of each of some evenly spaced complexities to be the lowest that suffices.
    """
    highest = logits.shape[1] - 1
    level = (logits.float().softmax(1).cumsum(1) < quantile).sum(1).clamp(max=highest)
    return level / highest


def gates_of_positions(gates: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """Log-gates of all positions, `(B, L)`, from those of the visual tokens, `(T, P)`.

    The markers of a tile are as open as its most open token, since they go with the last one that is kept; text and
    the markers of global views stay, with a log-gate of 0.
    """
    markers = torch.where(layout.is_global, 0.0, gates.amax(1))
    positions = torch.where(layout.tile_of_position < 0, 0.0, markers[layout.tile_of_position])
    return positions.index_put((layout.tile_sample[:, None], layout.token_positions), gates)


def gated_attention_mask(attention_mask: torch.Tensor, log_gates: torch.Tensor) -> torch.Tensor:
    """Causal mask with an additive `log g` on the keys, `(B, 1, L, L)`.

    The gate is on the keys because RMSNorm divides a scale of the embeddings straight out again.

    Args:
        attention_mask: `(B, L)`, 1 for tokens and 0 for padding.
        log_gates: `(B, L)` float, at most 0.
    """
    length = log_gates.shape[1]
    lowest = torch.finfo(log_gates.dtype).min
    causal = torch.ones(length, length, dtype=torch.bool, device=log_gates.device).tril()
    allowed = causal & attention_mask.bool()[:, None, None, :]
    # A padding row may see itself: a row that sees nothing at all is NaN in some kernels.
    allowed = allowed | torch.eye(length, dtype=torch.bool, device=log_gates.device)
    return torch.where(allowed, log_gates[:, None, None, :], lowest)


def splice(
    keep: torch.BoolTensor, *tensors: tuple[torch.Tensor, float]
) -> tuple[list[torch.Tensor], torch.LongTensor]:
    """Step 6: take the kept positions of each sample together, padded on the left.

    Args:
        keep: `(B, L)` bool.
        tensors: pairs of a tensor `(B, L, ...)` and the value its padding gets.

    Returns `(tensors, keep_indices)`: each tensor as `(B, L', ...)` with L' the largest number kept, and the positions
    they came from, `(B, L')` int64, -1 in the padding.
    """
    counts = keep.sum(1)
    length = int(counts.max())
    sample, position = keep.nonzero(as_tuple=True)
    column = (keep.cumsum(1) - 1 + (length - counts)[:, None])[keep]
    keep_indices = position.new_full((len(keep), length), -1)
    keep_indices[sample, column] = position
    taken = []
    for tensor, fill in tensors:
        out = tensor.new_full((len(keep), length, *tensor.shape[2:]), fill)
        taken.append(out.index_put((sample, column), tensor[sample, position]))
    return taken, keep_indices


def scores_of_tiles(scores: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """Scores of all visual tokens, `(B, N)` in prompt order, by tile: `(T, P)`. Raises ValueError on a wrong size."""
    check_shape("visual_token_scores", scores, (None, None))
    samples, per_tile = layout.tile_of_position.shape[0], layout.tokens_per_tile
    most = int(torch.bincount(layout.tile_sample, minlength=samples).max()) * per_tile
    if scores.dim() != 2 or tuple(scores.shape) != (samples, most):
        raise ValueError(
            f"visual_token_scores has shape {tuple(scores.shape)}: the prompts hold {samples} samples of at most "
            f"{most} visual tokens"
        )
    if not scores.isfinite().all():
        raise ValueError("visual_token_scores holds NaN or infinite values")
    return scores.view(samples, -1, per_tile)[layout.tile_sample, layout.tile_ordinal].float()


def positions_to_keep(attention_mask: torch.Tensor, layout: VisualLayout, kept: torch.BoolTensor) -> torch.BoolTensor:
    """Positions left of the prompt, `(B, L)` bool, when the visual tokens `kept` `(T, P)` are.

    All text stays. The markers of a tile go with its last token; those of a global view stay, they close the image.
    """
    marked = kept.any(1) | layout.is_global
    keep = torch.where(layout.tile_of_position < 0, True, marked[layout.tile_of_position])
    keep = keep.index_put((layout.tile_sample[:, None], layout.token_positions), kept)
    return keep & attention_mask.bool()


def describe_selection(
    layout: VisualLayout,
    kept: torch.BoolTensor,
    tiles: torch.BoolTensor,
    relevance: torch.Tensor,
    complexity: torch.Tensor,
    keep_indices: torch.LongTensor,
) -> QGSASelection:
    """Bring what was kept, `(T, P)` and `(T,)` bool, into the form of the samples; the rest as in `QGSASelection`."""
    samples, side = len(layout.tile_of_position), round(layout.tokens_per_tile**0.5)
    most = int(torch.bincount(layout.tile_sample, minlength=samples).max())
    where = (layout.tile_sample, layout.tile_ordinal)
    kept_tokens = kept.new_zeros(samples, most, layout.tokens_per_tile).index_put(where, kept).flatten(1)
    high_resolution = torch.zeros_like(kept_tokens[:, :most]).index_put(where, tiles & ~layout.is_global)
    return QGSASelection(
        kept_tokens=kept_tokens,
        kept_tiles=torch.zeros_like(high_resolution).index_put(where, tiles),
        visual_tokens=kept_tokens.sum(1),
        tiles=high_resolution.sum(1),
        relevance=relevance.exp().view(-1, side, side),
        complexity=complexity,
        grids=layout.grids,
        image_sample=layout.image_sample,
        keep_indices=keep_indices,
    )
