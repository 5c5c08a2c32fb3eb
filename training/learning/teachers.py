"""Teachers of where and how much to look. They need answers, but no boxes.

The strongest of them is the utility of each tile, see `modeling_qgsa.utility_qgsa`.
"""

from dataclasses import replace

import torch

from modeling_qgsa.attention_qgsa import attention_of_rows
from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.pointer_qgsa import Glance, PointedScores
from modeling_qgsa.prompt_qgsa import Prompt
from modeling_qgsa.selection_qgsa import choose_tiles, choose_tokens, positions_to_keep, splice, top_k_per_image
from modeling_qgsa.utility_qgsa import read_answers


NEUTRAL_FLOOR = 0.1  # share of the mean attention; avoids dividing by the near-zero attention of some tokens


@torch.no_grad()
def hard_positions(model, glance: Glance, scores: torch.Tensor, prompt: Prompt, budget: Budget, complexity):
    """The positions that inference would keep at `complexity` `(I,)`, `(B, L)` bool.

    Args:
        scores: `(T, P)`, the selector's scores of all visual tokens.
    """
    m, k = budget.resolve(complexity)
    pointed = PointedScores(glance)
    tiles = choose_tiles(budget.selection, pointed, glance.layout, m)
    looked = choose_tokens(budget.selection, pointed, glance.layout, tiles, k)
    kept = top_k_per_image(scores, looked, glance.layout, k)
    return positions_to_keep(prompt.attention_mask, glance.layout, kept, model.config.keep_tile_markers)


@torch.no_grad()
def visual_attention(
    model, glance: Glance, features: torch.Tensor, prompt: Prompt, samples: int, neutral_ids: tuple[int, ...] = ()
) -> torch.Tensor:
    """Attention from question and answer to every visual token, with nothing dropped, `(T, P)` (SGL).

    It is averaged over heads, and summed over layers, the words of the question and the positions that predict the
    answer. With `neutral_ids`, it is divided by the attention under a neutral question (Zhang et al. 2025, "MLLMs Know
    Where to Look"), which removes attention sinks and position bias.

    Args:
        features: `(T, P, D)`, features of every tile.
        samples: number of samples to compute, from the first on; the tokens of the others get 0.
        neutral_ids: token ids of the neutral question, such as "Describe the image."; empty for raw attention.
    """
    paid = paid_attention(model, glance, features, prompt, samples)
    if not len(neutral_ids):
        return paid
    usual = paid_attention(model, glance, features, neutral_prompt(prompt, glance, neutral_ids), samples)
    return paid / (usual + NEUTRAL_FLOOR * usual.mean()).clamp(min=torch.finfo(usual.dtype).tiny)


def neutral_prompt(prompt: Prompt, glance: Glance, neutral_ids: tuple[int, ...]) -> Prompt:
    """The prompt with every question replaced by the neutral one, cut to the question's length, without answers."""
    input_ids, mask, labels = prompt.input_ids.clone(), prompt.attention_mask.clone(), prompt.labels.clone()
    neutral = torch.tensor(neutral_ids, device=input_ids.device)
    for sample, words in zip(glance.layout.image_sample.tolist(), glance.question_mask):
        words, answer = words.nonzero()[:, 0], (labels[sample] != -100).nonzero()[:, 0]
        length = min(len(neutral), len(words))
        input_ids[sample, words[:length]] = neutral[:length]
        mask[sample, words[length:]], mask[sample, answer] = 0, 0
        labels[sample, answer[1:]] = -100
    return replace(prompt, input_ids=input_ids, attention_mask=mask, labels=labels)


@torch.no_grad()
def paid_attention(model, glance: Glance, features: torch.Tensor, prompt: Prompt, samples: int) -> torch.Tensor:
    """Attention from question and answer to every visual token, `(T, P)`; arguments as in `visual_attention`."""
    layout, text_model = glance.layout, model.model.text_model
    embeds = model.model.embed(prompt.input_ids, layout, features, torch.ones_like(layout.is_global))
    asking = prompt.labels.roll(-1, dims=1) != -100
    asking = asking.index_put((layout.image_sample,), asking[layout.image_sample] | glance.question_mask)
    asking = asking & prompt.attention_mask.bool()
    _, rows = splice(asking[:samples])
    asked = (rows >= 0).float()
    prefix = (embeds[:samples], prompt.attention_mask[:samples], prompt.position_ids[:samples])
    paid = embeds.new_zeros(embeds.shape[:2], dtype=torch.float32)
    for weights in attention_of_rows(text_model, *prefix, rows.clamp(min=0)):
        paid[:samples] += torch.einsum("br,brk->bk", asked, weights.mean(1))
    return paid[layout.tile_sample[:, None], layout.token_positions]


@torch.no_grad()
def cheapest_sufficient(
    model,
    glance: Glance,
    features: torch.Tensor,
    scores: torch.Tensor,
    prompt: Prompt,
    budget: Budget,
    tolerance: float,
) -> torch.Tensor:
    """The lowest complexity level at which the answer is about as probable as with everything, `(I,)` int64 (VISOR).

    All levels of the estimator are tried, with tiles and visual tokens in the selector's own order: the label is the
    budget that this selector needs, not the one that an oracle would need. Blocks have the features of whole tiles
    here, which have seen slightly more context than those of inference. Probabilities are geometric means over the
    tokens of the answer, so that long answers are not at a disadvantage.

    Args:
        features: `(T, P, D)`, features of every tile.
        scores: `(T, P)`, the selector's scores of all visual tokens.
        tolerance: largest drop of that probability, 0 to 1, below the dense model's.

    Returns the index of the level, 0 for complexity 0; the highest if none suffices.
    """
    layout = glance.layout
    every = torch.ones_like(layout.is_global)
    embeds = model.model.embed(prompt.input_ids, layout, features, every)
    levels = glance.complexity_logits.shape[1]
    keep = [prompt.attention_mask.bool()]
    for level in range(levels):
        complexity = torch.full_like(glance.complexity, level / (levels - 1))
        keep.append(hard_positions(model, glance, scores, prompt, budget, complexity))
    samples = torch.arange(len(prompt.input_ids), device=features.device)
    likelihood = read_answers(model, samples.repeat(len(keep)), torch.cat(keep), embeds, prompt).log_likelihood
    tokens = (prompt.labels[:, 1:] != -100).sum(1).clamp(min=1)
    dense, pruned = (likelihood.view(len(keep), -1) / tokens).exp().split([1, levels])
    enough = pruned >= dense - tolerance
    first = torch.where(enough.any(0), enough.int().argmax(0), levels - 1)
    return first[layout.image_sample]
