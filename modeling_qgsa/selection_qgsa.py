"""From scores to a selection under a budget, and from a selection to a shorter prompt.

Pure functions on tensors. Sizes as in `layout_qgsa`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers.utils import ModelOutput

from .layout_qgsa import VisualLayout, to_images, to_samples, to_tiles


@dataclass
class QGSASelection(ModelOutput):
    """The tiles that were encoded and the visual tokens that were kept.

    Args:
        kept_tokens (`(B, N)` bool): visual tokens kept, in prompt order; False beyond a sample's own tokens.
        kept_tiles (`(B, tiles)` bool): tiles that were encoded, in prompt order, the global view of an image last.
        visual_tokens (`(B,)` int64): k, the number of visual tokens kept per sample.
        tiles (`(B,)` int64): m, the number of high-resolution tiles encoded per sample, without global views.
        relevance (`(I, rows, columns)` float): the pointer's probability of each cell of the glance; sums to 1. All
            cells are alike if everything is kept, since nothing has to point.
        complexity (`(I,)` float): estimated complexity of the question for each image, 0 to 1.
        grids (`(I, 2)` int64): rows and columns of each image's tiles; 0 x 0 for an image of a single tile.
        image_sample (`(I,)` int64): the sample to which each image belongs.
        keep_indices (`(B, L')` int64): kept positions of the prompt, -1 in the padding on the left.
        vision_share (`(B,)` float): the share of the text model's work on a visual token that its layers do, 0 to 1.
    """

    kept_tokens: torch.Tensor | None = None
    kept_tiles: torch.Tensor | None = None
    visual_tokens: torch.Tensor | None = None
    tiles: torch.Tensor | None = None
    relevance: torch.Tensor | None = None
    complexity: torch.Tensor | None = None
    grids: torch.Tensor | None = None
    image_sample: torch.Tensor | None = None
    keep_indices: torch.Tensor | None = None
    vision_share: torch.Tensor | None = None


# Scores to tiles and tokens


def keep_top_k(scores: torch.Tensor, candidates: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Keep the `k` best candidates of each row; ties go to the first.

    Args:
        scores: `(rows, n)` float.
        candidates: `(rows, n)` bool.
        k: `(rows,)` int64; if it exceeds the number of candidates, all of them are kept.

    Returns keep, `(rows, n)` bool.
    """
    order = scores.masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < k[:, None]) & candidates


def rank_per_image(
    rank: Callable, scores: torch.Tensor, candidates: torch.Tensor, layout: VisualLayout, k: torch.Tensor
) -> torch.Tensor:
    """Apply `rank(scores, candidates, k)`, such as `keep_top_k`, to all tiles or tokens of an image together.

    Args:
        scores, candidates: `(T,)` by tile or `(T, P)` by token.
        k: `(I,)` int64.

    Returns the result in the shape of `scores`.
    """
    rows = to_images(scores, layout, 0), to_images(candidates, layout, False)
    ranked = rank(*(row.flatten(1) for row in rows), k)
    return to_tiles(ranked.view(rows[0].shape), layout)


def top_k_per_image(
    scores: torch.Tensor, candidates: torch.Tensor, layout: VisualLayout, k: torch.Tensor
) -> torch.Tensor:
    """Keep the `k` best tiles `(T,)` or tokens `(T, P)` of every image, see `keep_top_k`; bool in the same shape."""
    return rank_per_image(keep_top_k, scores, candidates, layout, k)


def choose_tiles(selection: str, scores, layout: VisualLayout, m: torch.Tensor) -> torch.Tensor:
    """The tiles to look at, `(T,)` bool: the global views, and the `m` best of each image; for "after_encoder" all.

    Args:
        selection: a variant other than "dense".
        scores: scores of tiles and of tokens, before any tile is encoded; see `pointer_qgsa`.
        m: `(I,)` int64.
    """
    if selection == "after_encoder":
        return torch.ones_like(layout.is_global)
    return top_k_per_image(scores.of_tiles(), ~layout.is_global, layout, m) | layout.is_global


def choose_tokens(selection: str, scores, layout: VisualLayout, tiles: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The visual tokens to look at, `(T, P)` bool: those of the chosen `tiles`, `(T,)` bool.

    "blocks" takes only the `k` best tokens of the tiles that are no global views.

    Args:
        selection, scores: as in `choose_tiles`.
        k: `(I,)` int64.
    """
    is_global = layout.is_global
    looked = tiles[:, None].expand(-1, layout.tokens_per_tile)
    if selection != "blocks":
        return looked
    return top_k_per_image(scores.of_places(), looked & ~is_global[:, None], layout, k) | is_global[:, None]


def spread(values: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Put values `(n, ...)` of the chosen `tiles` `(T,)` bool at their places among all tiles, `(T, ...)`, else 0."""
    return values.new_zeros(len(tiles), *values.shape[1:]).index_put((tiles,), values)


# Selection to prompt


def positions_to_keep(
    attention_mask: torch.Tensor, layout: VisualLayout, kept: torch.Tensor, markers_stay: bool | torch.Tensor = False
) -> torch.Tensor:
    """Positions of the prompt to keep, `(B, L)` bool, given the visual tokens `kept` `(T, P)`.

    All text stays. The markers of a tile are dropped with its last token; those of a global view stay, as they close
    the image.

    Args:
        markers_stay: whether the markers of every tile stay, see `config.keep_tile_markers`; or of which, `(T,)` bool.
    """
    marked = kept.any(1) | layout.is_global | markers_stay
    keep = torch.where(layout.tile_of_position < 0, True, marked[layout.tile_of_position])
    keep = keep.index_put((layout.tile_sample[:, None], layout.token_positions), kept)
    return keep & attention_mask.bool()


def splice(keep: torch.Tensor, *tensors: tuple[torch.Tensor, float]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Step 6: gather the kept positions of each sample, padded on the left.

    Args:
        keep: `(B, L)` bool.
        tensors: pairs of a tensor `(B, L, ...)` and the value of its padding.

    Returns `(tensors, keep_indices)`: each tensor as `(B, L', ...)` with L' the largest number of kept positions, and
    the original positions, `(B, L')` int64, -1 in the padding.
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


def compact_positions(attention_mask: torch.Tensor, prompt) -> torch.Tensor:
    """Position ids of a spliced prompt without gaps, as any engine numbers them, `(B, L')` int64; 0 in the padding.

    Args:
        attention_mask: `(B, L')`, that of the spliced prompt.
        prompt: the whole [`Prompt`], whose first position id is that of the spliced one, too.
    """
    last = torch.iinfo(prompt.position_ids.dtype).max
    first = prompt.position_ids.masked_fill(prompt.attention_mask == 0, last).amin(1, keepdim=True)
    return (first + attention_mask.long().cumsum(1) - 1).masked_fill(attention_mask == 0, 0)


def describe_selection(
    glance, kept: torch.Tensor, tiles: torch.Tensor, keep_indices: torch.Tensor, vision_share: torch.Tensor
) -> QGSASelection:
    """The selection by sample.

    Args:
        glance: a [`Glance`].
        kept: `(T, P)` bool, the visual tokens kept.
        tiles: `(T,)` bool, the tiles encoded.
        keep_indices, vision_share: as in `QGSASelection`.
    """
    layout, side = glance.layout, round(glance.layout.tokens_per_tile**0.5)
    kept_tokens = to_samples(kept, layout)
    by_sample = partial(to_samples, layout=layout)
    return QGSASelection(
        kept_tokens=kept_tokens,
        kept_tiles=by_sample(tiles[:, None]),
        visual_tokens=kept_tokens.sum(1),
        tiles=by_sample((tiles & ~layout.is_global)[:, None]).sum(1),
        relevance=glance.relevance.exp().view(-1, side, side),
        complexity=glance.complexity,
        grids=layout.grids,
        image_sample=layout.image_sample,
        keep_indices=keep_indices,
        vision_share=vision_share,
    )
