"""Teachers of where and how much to look. They need answers, but no boxes.

The utility of a tile is the log-likelihood of the answer given the glance and that one tile. Given the features of all
tiles, it costs one short pass of the text model per tile, and it is exact.
"""

from dataclasses import replace

import torch

from modeling_qgsa.attention_qgsa import attention_of_rows
from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.pointer_qgsa import Glance, PointedScores
from modeling_qgsa.prompt_qgsa import Prompt
from modeling_qgsa.selection_qgsa import choose_tokens, positions_to_keep, splice, top_k_per_image


CHUNK = 64  # variants of a prompt per pass of the text model
NEUTRAL_FLOOR = 0.1  # share of the mean attention; avoids dividing by the near-zero attention of some tokens


def answer_log_likelihood(model, rows: torch.Tensor, keep: torch.BoolTensor, embeds: torch.Tensor, prompt: Prompt):
    """Summed log-likelihood of the labelled tokens if only some positions are kept, `(n,)` float32.

    Args:
        model: a QGSA model with its language head.
        rows: `(n,)` int64, the sample of each variant.
        keep: `(n, L)` bool, the positions that each variant keeps.
        embeds: `(B, L, D)`, embeddings of the words and visual tokens of all samples.
        prompt: the text side of all samples, with labels.
    """
    scores = torch.zeros(len(rows), device=embeds.device)
    if not len(rows):
        return scores
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
        logits = model.lm_head(hidden[:, :-1][labelled]).float()
        losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:][labelled], reduction="none")
        scores[chunk] = -losses.new_zeros(labelled.shape).masked_scatter(labelled, losses).sum(1)
    return scores


@torch.no_grad()
def tile_utility(model, glance: Glance, features: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    """Log-likelihood of the answer given all glances of the sample and one tile: `(T,)`; -inf for global views.

    Args:
        features: `(T, P, D)`, features of every tile.
    """
    layout = glance.layout
    embeds = model.model.embed(prompt.input_ids, layout, features, torch.ones_like(layout.is_global))
    glances = positions_to_keep(prompt.attention_mask, layout, layout.is_global[:, None].expand(features.shape[:2]))
    tiles = (~layout.is_global).nonzero()[:, 0]
    rows = layout.tile_sample[tiles]
    keep = glances[rows] | (layout.tile_of_position[rows] == tiles[:, None])
    utility = features.new_full((len(layout.tile_sample),), float("-inf"), dtype=torch.float32)
    return utility.index_put((tiles,), answer_log_likelihood(model, rows, keep, embeds, prompt))


@torch.no_grad()
def hard_positions(model, glance: Glance, scores: torch.Tensor, prompt: Prompt, budget: Budget, complexity):
    """The positions that inference would keep at `complexity` `(I,)`, `(B, L)` bool.

    Args:
        scores: `(T, P)`, the selector's scores of all visual tokens.
    """
    m, k = budget.resolve(complexity)
    pointed = PointedScores(model.model.pointer, glance)
    looked = choose_tokens(budget.selection, pointed, glance.layout, m, k)
    kept = top_k_per_image(scores, looked, glance.layout, k)
    return positions_to_keep(prompt.attention_mask, glance.layout, kept)


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
    likelihood = answer_log_likelihood(model, samples.repeat(len(keep)), torch.cat(keep), embeds, prompt)
    tokens = (prompt.labels[:, 1:] != -100).sum(1).clamp(min=1)
    dense, pruned = (likelihood.view(len(keep), -1) / tokens).exp().split([1, levels])
    enough = pruned >= dense - tolerance
    first = torch.where(enough.any(0), enough.int().argmax(0), levels - 1)
    return first[layout.image_sample]
