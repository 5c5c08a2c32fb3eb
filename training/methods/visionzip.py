"""VisionZip (Yang et al. 2024): the tokens that the encoder attends to, and means of the others around some of them.

54 of 64 kept tokens are dominant, by the attention they receive. The rest are evenly spaced among the others, each
averaged with those of the others whose keys are most similar to its own.

Deviation: without a class token, attention is that from all patches (`encoder_attention.py`).
"""

import torch

from training.methods.encoder_attention import attention_received
from training.methods.method import Method, MethodInputs


def visionzip(given: MethodInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Features with the averaged tokens, `(T, P, D)`, and scores `(T, P)`."""
    received, keys = attention_received(given)
    features = given.features.clone()
    orders = []
    for score, key, tokens, k in zip(*map(given.by_image, (received, keys, features)), given.k):
        count = min(k, len(score))
        dominant = score.topk(max(1, round(count * 54 / 64))).indices
        others = torch.ones_like(score, dtype=torch.bool).index_fill(0, dominant, False).nonzero()[:, 0]
        contextual = count - len(dominant)
        picked = others[torch.linspace(0, len(others) - 1, contextual, device=score.device).long()]
        if contextual:
            unit = torch.nn.functional.normalize(key, dim=-1)
            nearest = (unit[others] @ unit[picked].T).argmax(1)
            nearest[torch.searchsorted(others, picked)] = torch.arange(contextual, device=score.device)
            shares = torch.nn.functional.one_hot(nearest, contextual).to(tokens.dtype)
            tokens[picked] = (shares / shares.sum(0)).T @ tokens[others]  # a view: writes to `features`
        orders.append(torch.cat([dominant, picked]))
    return features, given.order_scores(orders)


VISIONZIP = Method("visionzip", visionzip, paper="Yang et al. 2024, arXiv 2412.04467")
