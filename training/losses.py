"""Losses of question-guided selection: where to look, and how much. All work without boxes."""

import torch

from modeling_qgsa.selection_qgsa import VisualLayout, to_images


def utility_loss(mass: torch.Tensor, utility: torch.Tensor, layout: VisualLayout, temperature: float) -> torch.Tensor:
    """Cross entropy between the selector's mass on the tiles and the softmax of their utilities, a scalar.

    Args:
        mass: `(T,)`, the selector's probability of each tile (`tile_relevance`); 0 for global views.
        utility: `(T,)`, log-likelihood of the answer given that tile; -inf for global views.
        temperature: of the softmax over an image's tiles; below it a difference counts as noise.

    Images of a single tile have nothing to choose and count 0.
    """
    target = to_images(utility, layout, float("-inf"))
    several = target.isfinite().any(1)
    target = (target[several] / temperature).softmax(1)
    mass = to_images(mass, layout, 0.0)[several]
    return -(target * mass.clamp(min=1e-6).log()).sum(1).mean() if several.any() else mass.sum()


def quantile_loss(complexity: torch.Tensor, target: torch.Tensor, quantile: float) -> torch.Tensor:
    """Pinball loss, a scalar: its minimum is the complexity that suffices for the share `quantile` of such questions.

    Args:
        complexity, target: `(I,)` in 0 .. 1.
    """
    short = target - complexity
    return torch.maximum(quantile * short, (quantile - 1) * short).mean()
