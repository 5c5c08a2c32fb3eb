"""Losses of question-guided selection: where to look. All work without boxes."""

import torch

from modeling_qgsa.selection_qgsa import VisualLayout, to_images


def utility_loss(mass: torch.Tensor, utility: torch.Tensor, layout: VisualLayout, temperature: float) -> torch.Tensor:
    """Cross entropy between the selector's mass on the tiles and the softmax of their utilities, a scalar.

    Args:
        mass: `(T,)`, the selector's probability of each tile (`tile_relevance`); 0 for global views.
        utility: `(T,)`, log-likelihood of the answer given that tile; -inf for global views.
        temperature: of the softmax over an image's tiles; below it a difference counts as noise.

    Images of a single tile have nothing to choose and are left out.
    """
    target = to_images(utility, layout, float("-inf"))
    several = target.isfinite().any(1)
    target = (target[several] / temperature).softmax(1)
    mass = to_images(mass, layout, 0.0)[several]
    return -(target * mass.clamp(min=1e-30).log()).sum(1).mean() if several.any() else mass.sum()


def attention_loss(match: torch.Tensor, attention: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """Cross entropy between the softmax of the tokens' match and the attention they get, a scalar (after SGL).

    Args:
        match: `(T, P)`, how well the selector finds that each visual token matches the question.
        attention: `(T, P)`, at least 0; an image without any is left out.
    """
    target = to_images(attention, layout, 0.0).flatten(1)
    taught = target.sum(1) > 0
    target = target[taught] / target[taught].sum(1, keepdim=True)
    match = to_images(match, layout, torch.finfo(match.dtype).min).flatten(1)[taught]
    return -(target * match.log_softmax(1)).sum(1).mean() if taught.any() else match.sum()
