"""VisPruner (Zhang et al. 2025): the tokens that the encoder attends to, then those that duplicate no other.

Half of the k tokens are important: they receive the most attention in the encoder's last but one layer. The remaining
tokens are thinned out in rounds until k are left in all: those at even places are compared with those at odd places,
and up to 8 of them are dropped, the ones with the highest cosine similarity (`encode_images` of the authors' code).

Deviations: without a class token, attention is that from all patches (`encoder_attention.py`); similarity is that of
tokens after the connector, as SmolVLM makes tokens of 4 x 4 patches there; all tiles of an image share one k.
"""

import torch

from training.methods.divprune import unit_length
from training.methods.encoder_attention import attention_received
from training.methods.method import Method, MethodInputs


def vispruner(given: MethodInputs) -> torch.Tensor:
    """Scores `(T, P)`: important tokens by attention, then the distinct ones."""
    received, _ = attention_received(given)
    orders = []
    for attention, tokens, k in zip(*map(given.by_image, (received, given.features)), given.k):
        important, rest = attention.argsort(descending=True, stable=True).tensor_split([k // 2])
        unit = unit_length(tokens)
        orders.append(torch.cat([important, drop_duplicates(unit @ unit.T, rest, k - k // 2)]))
    return given.order_scores(orders)


def drop_duplicates(similarity: torch.Tensor, rest: torch.LongTensor, count: int) -> torch.LongTensor:
    """At most `count` of the tokens `rest`, by the `similarity` `(n, n)` of all tokens; `count` is at least 1."""
    while len(rest) > count:
        even, odd = rest[::2], rest[1::2]
        most_similar = similarity[even][:, odd].amax(1).argsort(descending=True, stable=True)
        rest = torch.cat([even[most_similar[min(8, len(rest) - count) :]], odd])
    return rest


VISPRUNER = Method("vispruner", vispruner, paper="Zhang et al. 2025, arXiv 2412.01818")
