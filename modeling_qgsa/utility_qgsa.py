"""What a text model makes of part of a prompt: the likelihood of an answer, and what each tile adds to it.

Sizes as in `layout_qgsa`.
"""

from typing import NamedTuple

import torch

from .layout_qgsa import VisualLayout
from .prompt_qgsa import Prompt
from .selection_qgsa import positions_to_keep, splice


CHUNK = 64  # variants of a prompt per pass of the text model


class Reading(NamedTuple):
    """How the labelled tokens of some prompts are read.

    Args:
        log_likelihood: `(n,)` float32, summed over the labelled tokens.
        agrees: `(n,)` bool, whether each of them is the most probable one: greedy decoding would write them.
    """

    log_likelihood: torch.Tensor
    agrees: torch.Tensor


def read_answers(model, rows: torch.Tensor, keep: torch.Tensor, embeds: torch.Tensor, prompt: Prompt) -> Reading:
    """Read the labelled tokens if only some positions of the prompts are kept.

    Args:
        model: a QGSA model with its language head.
        rows: `(n,)` int64, the sample of each variant.
        keep: `(n, L)` bool, the positions that each variant keeps.
        embeds: `(B, L, D)`, embeddings of the words and visual tokens of all samples.
        prompt: the text side of all samples, with labels.
    """
    scores = torch.zeros(len(rows), device=embeds.device)
    agrees = torch.ones(len(rows), dtype=torch.bool, device=embeds.device)
    if not len(rows):
        return Reading(scores, agrees)
    for chunk in keep.sum(1).argsort().split(CHUNK):  # similar lengths together, for little padding
        some_rows, some_keep = rows[chunk], keep[chunk]
        (hidden, mask, positions, labels), _ = splice(
            some_keep,
            (embeds[some_rows], 0.0),
            (prompt.attention_mask[some_rows], 0),
            (prompt.position_ids[some_rows], 0),
            (prompt.labels[some_rows], -100),
        )
        hidden = model.model.text_model(
            inputs_embeds=hidden, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        labelled = labels[:, 1:] != -100
        logits, learnt = model.lm_head(hidden[:, :-1][labelled]).float(), labels[:, 1:][labelled]
        losses = torch.nn.functional.cross_entropy(logits, learnt, reduction="none")
        scores[chunk] = -losses.new_zeros(labelled.shape).masked_scatter(labelled, losses).sum(1)
        missed = torch.zeros_like(labelled).masked_scatter(labelled, logits.argmax(-1) != learnt)
        agrees[chunk] = ~missed.any(1)
    return Reading(scores, agrees)


@torch.no_grad()
def tile_utility(model, layout: VisualLayout, features: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    """Log-likelihood of the answer given all glances of the sample and one tile: `(T,)`; -inf for global views.

    Given the features of all tiles it costs one short pass of the text model per tile, and it is exact.

    Args:
        features: `(T, P, D)`, features of every tile.
    """
    embeds = model.model.embed(prompt.input_ids, layout, features, torch.ones_like(layout.is_global))
    shown = layout.is_global[:, None].expand(features.shape[:2])
    glances = positions_to_keep(prompt.attention_mask, layout, shown, model.config.keep_tile_markers)
    tiles = (~layout.is_global).nonzero()[:, 0]
    rows = layout.tile_sample[tiles]
    keep = glances[rows] | (layout.tile_of_position[rows] == tiles[:, None])
    utility = features.new_full((len(layout.tile_sample),), float("-inf"), dtype=torch.float32)
    return utility.index_put((tiles,), read_answers(model, rows, keep, embeds, prompt).log_likelihood)
