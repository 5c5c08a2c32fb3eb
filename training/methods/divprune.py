"""DivPrune (Alvar et al. 2025): the most diverse tokens, by greedily maximising the smallest cosine distance."""

import torch

from training.methods.method import Method, MethodInputs


def divprune(given: MethodInputs) -> torch.Tensor:
    """Scores `(T, P)` that fall along the greedy order."""
    tokens = map(unit_length, given.by_image(given.features))
    return given.order_scores([most_diverse(1 - each @ each.T, k) for each, k in zip(tokens, given.k)])


def unit_length(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens `(n, D)` in float32 and of length 1."""
    return torch.nn.functional.normalize(tokens.float(), dim=-1)


def most_diverse(distance: torch.Tensor, k: int) -> torch.LongTensor:
    """The token farthest from all others, then always the one farthest from those picked: at most `k` indices.

    Args:
        distance: `(n, n)` between tokens.
    """
    nearest = distance.clone().fill_diagonal_(float("inf")).amin(1)
    picked = [int(nearest.argmax())]
    nearest = distance[picked[0]].index_fill(0, distance.new_tensor(picked, dtype=torch.long), -1)
    while len(picked) < min(k, len(distance)):
        picked.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[picked[-1]])
        nearest[picked[-1]] = -1  # never picked again
    return torch.tensor(picked, device=distance.device)


DIVPRUNE = Method("divprune", divprune, paper="Alvar et al. 2025, arXiv 2503.02175")
