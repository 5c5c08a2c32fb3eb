"""Losses of question-guided selection: where to look, and how much. None of them needs boxes."""

import torch
from torch.nn.functional import cross_entropy, normalize

from modeling_qgsa.layout_qgsa import VisualLayout, to_images
from modeling_qgsa.pointer_qgsa import complexity_at


def utility_loss(mass: torch.Tensor, utility: torch.Tensor, layout: VisualLayout, temperature: float) -> torch.Tensor:
    """Cross entropy between the selector's tile probabilities and the softmax of the tiles' utilities, a scalar.

    Images of a single tile offer no choice and are skipped.

    Args:
        mass: `(T,)`, the selector's probability of each tile (`tile_relevance`); 0 for global views.
        utility: `(T,)`, log-likelihood of the answer given that tile; -inf for global views, and for all tiles of an
            image to skip.
        temperature: softmax temperature over the tiles of an image; smaller differences count as noise.
    """
    target = to_images(utility, layout, float("-inf"))
    several = target.isfinite().any(1)
    target = (target[several] / temperature).softmax(1)
    mass = to_images(mass, layout, 0.0)[several]
    return -(target * mass.clamp(min=1e-30).log()).sum(1).mean() if several.any() else mass.sum()


def attention_loss(match: torch.Tensor, attention: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """Cross entropy between the softmax of the tokens' match scores and the attention to them, a scalar (after SGL).

    Args:
        match: `(T, P)`, the selector's score for how well each visual token matches the question.
        attention: `(T, P)`, at least 0; images without any are skipped.
    """
    target = to_images(attention, layout, 0.0).flatten(1)
    taught = target.sum(1) > 0
    target = target[taught] / target[taught].sum(1, keepdim=True)
    match = to_images(match, layout, torch.finfo(match.dtype).min).flatten(1)[taught]
    return -(target * match.log_softmax(1)).sum(1).mean() if taught.any() else match.sum()


def contrastive_loss(
    query: torch.Tensor, keys: torch.Tensor, relevance: torch.Tensor, same: torch.BoolTensor, temperature: float = 0.1
) -> torch.Tensor:
    """InfoNCE between questions and the cells they select, a scalar (contrastive patch selection, QGSA).

    A question must match the mean of its own selected cells better than the mean of the cells dropped from its image,
    and better than the cells selected by the questions of other images. Selected cells are weighted by their
    relevance, dropped cells by the rest.

    Args:
        query: `(I, H)`, embeddings of the questions.
        keys: `(I, C, H)`, embeddings of the cells of the glances.
        relevance: `(I, C)`, log-probabilities of the cells.
        same: `(I, I)` bool, pairs of images with the same question, which are not negatives of each other.
        temperature: softmax temperature over the cosines.
    """
    weights = relevance.exp()[..., None]
    rest = (1 - weights) / (keys.shape[1] - 1)
    query = normalize(query, dim=-1)
    selected, dropped = (normalize((keys * share).sum(1), dim=-1) for share in (weights, rest))
    other = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    against = (query @ selected.T).masked_fill(other, float("-inf"))
    logits = torch.cat([against, (query * dropped).sum(1, keepdim=True)], dim=1) / temperature
    return cross_entropy(logits, torch.arange(len(query), device=query.device))


def budget_loss(logits: torch.Tensor, quantile: float, lowest: int, highest: int, target: float) -> torch.Tensor:
    """Relative distance of the mean number of visual tokens from a target, a scalar.

    The forward value is that of inference (`complexity_at`, then the budget between `lowest` and `highest`). The
    gradient is that of a soft quantile (straight-through), computed in log-odds, where a quantile near 1 does not
    saturate.

    Args:
        logits: `(I, levels)`, output of the complexity estimator.
        quantile: `config.complexity_quantile`.
        lowest, highest: `min_visual_tokens` and `max_visual_tokens`.
        target: mean number of visual tokens per image, between `lowest` and `highest`.
    """
    ahead, behind = logits.logcumsumexp(1)[:, :-1], logits.flip(1).logcumsumexp(1).flip(1)[:, 1:]
    wanted = torch.tensor(quantile, device=logits.device).logit(eps=1e-6)
    soft = (wanted - (ahead - behind)).sigmoid().mean(1)
    complexity = complexity_at(logits.detach(), quantile) + soft - soft.detach()
    tokens = lowest + complexity * (highest - lowest)
    return (tokens.mean() / target - 1).abs()


def patch_word_loss(relevance: torch.Tensor, similarity: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross entropy between the softmax of CLIP similarities and the relevance, a scalar (patch-word alignment, QGSA).

    Args:
        relevance: `(I, C)`, log-probabilities of the cells.
        similarity: `(I, C)`, similarity of cells and words; images with the same value everywhere are skipped.
        temperature: softmax temperature over the cells.
    """
    told = similarity.amax(1) > similarity.amin(1)
    if not told.any():
        return 0 * relevance.sum()
    target = (similarity[told] / temperature).softmax(1)
    return -(target * relevance[told]).sum(1).mean()
