"""The relaxed selection of training: random budgets, and a gate on the attention keys instead of top-k.

Sizes as in `layout_qgsa`.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .layout_qgsa import VisualLayout
from .request_qgsa import Request
from .selection_qgsa import rank_per_image


@dataclass(frozen=True)
class Relaxation:
    """How a selection is relaxed, so that the gradient of the answer reaches the selector.

    Each image gets a random budget between its minimum and maximum, so that the text model learns to read all budgets.
    All tokens that are looked at are spliced in, each gated by the relaxed selection of k of them.

    Args:
        temperature: temperature of the gates, which become hard as it falls to 0.
        markers_stay: whether the markers of every tile stay, see `config.keep_tile_markers`.
    """

    temperature: float
    markers_stay: bool = False

    @classmethod
    def of(cls, request: Request, markers_stay: bool) -> "Relaxation":
        """The relaxation of a `request`.

        Raises ValueError if it goes on with a conversation behind a cache, or prunes between layers.
        """
        if request.prune_layer is not None:
            raise ValueError(
                f"prune_layer ({request.prune_layer}): the relaxed selection of training gates all layers alike; give "
                "visual_token_scores, or call model.eval()"
            )
        if request.shown is not None:
            raise ValueError(
                f"past_key_values holds {request.shown.shape[1]} positions, but the relaxed selection of training "
                "cannot continue a conversation: call model.eval()"
            )
        return cls(request.gumbel_temperature, markers_stay)

    def complexity(self, estimated: torch.Tensor) -> torch.Tensor:
        """Random complexities, `(I,)` in 0 .. 1, that replace the `estimated` ones."""
        return torch.rand_like(estimated)

    def log_gates(
        self, scores: torch.Tensor, looked: torch.Tensor, layout: VisualLayout, k: torch.Tensor
    ) -> torch.Tensor:
        """Log-gates of all positions, `(B, L)`, of a relaxed selection of `k` `(I,)` among the tokens `looked` at.

        Args:
            scores: `(T, P)` float.
            looked: `(T, P)` bool.
        """
        relaxed = partial(relaxed_top_k, temperature=self.temperature)
        return gates_of_positions(rank_per_image(relaxed, scores, looked, layout, k), layout, self.markers_stay)


def relaxed_top_k(
    scores: torch.Tensor, candidates: torch.Tensor, k: torch.Tensor, temperature: float, noise: bool = True
) -> torch.Tensor:
    """Log-gates of a relaxed top-k: Gumbel noise on the scores, then a sigmoid around the k-th of them.

    As `temperature` falls, the gates go to 1 for the `k` best and to 0 for the rest (QGSA's Gumbel-Softmax selector in
    its top-k form; Jang et al. 2017). Shapes as in `keep_top_k`; k is at least 1.

    Returns log g, `(rows, n)`, at most 0; 0 for everything that is not a candidate.
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


def gates_of_positions(gates: torch.Tensor, layout: VisualLayout, markers_stay: bool = False) -> torch.Tensor:
    """Log-gates of all positions, `(B, L)`, from those of the visual tokens, `(T, P)`.

    The markers of a tile are as open as its most open token, since they are dropped only with its last token; text
    and the markers of global views stay, with a log-gate of 0, and with `markers_stay` those of all tiles.
    """
    markers = torch.where(layout.is_global | markers_stay, 0.0, gates.amax(1))
    positions = torch.where(layout.tile_of_position < 0, 0.0, markers[layout.tile_of_position])
    return positions.index_put((layout.tile_sample[:, None], layout.token_positions), gates)


def gated_attention_mask(attention_mask: torch.Tensor, log_gates: torch.Tensor) -> torch.Tensor:
    """Causal mask with an additive `log g` on the keys, `(B, 1, L, L)`.

    The gate is on the keys because RMSNorm would cancel any scaling of the embeddings.

    Args:
        attention_mask: `(B, L)`, 1 for tokens and 0 for padding.
        log_gates: `(B, L)` float, at most 0.
    """
    length = log_gates.shape[1]
    lowest = torch.finfo(log_gates.dtype).min
    causal = torch.ones(length, length, dtype=torch.bool, device=log_gates.device).tril()
    allowed = causal & attention_mask.bool()[:, None, None, :]
    # A padding row may see itself: some kernels turn a row that sees nothing into NaN.
    allowed = allowed | torch.eye(length, dtype=torch.bool, device=log_gates.device)
    return torch.where(allowed, log_gates[:, None, None, :], lowest)
