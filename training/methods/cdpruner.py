"""CDPruner (Zhang et al. 2025): a determinantal point process over tokens, conditioned on the question.

The kernel is the tokens' cosine similarity times the relevance of both, and the most probable set is picked greedily.

Deviation: relevance is the cosine between a token and the mean word embedding of the question, scaled to 0 to 1 within
each image, since SmolVLM's encoder has no text side.
"""

import torch

from training.methods.divprune import unit_length
from training.methods.method import Method, MethodInputs


def cdpruner(given: MethodInputs) -> torch.Tensor:
    """Scores `(T, P)` that fall along the greedy order."""
    inputs = given.inputs
    words = given.model.get_input_embeddings()(inputs["input_ids"]) * inputs["question_mask"][..., None]
    questions = unit_length(words.sum(1))[given.layout.image_sample]
    orders = []
    for tokens, question, k in zip(map(unit_length, given.by_image(given.features)), questions, given.k):
        relevance = tokens @ question
        relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min()).clamp(min=1e-6)
        kernel = relevance[:, None] * (tokens @ tokens.T) * relevance[None]
        orders.append(greedy_map(kernel, min(k, len(tokens))))
    return given.order_scores(orders)


def greedy_map(kernel: torch.Tensor, k: int) -> torch.LongTensor:
    """The k items that greedily maximise the determinant of their part of `kernel` `(n, n)` (Chen et al. 2018)."""
    gain, factors, picked = kernel.diagonal().clone(), kernel.new_zeros(k, len(kernel)), []
    taken = torch.zeros(len(kernel), dtype=torch.bool, device=kernel.device)
    for step in range(k):
        best = int(gain.masked_fill(taken, -1).argmax())
        picked.append(best)
        taken[best] = True
        factors[step] = (kernel[best] - factors[:step, best] @ factors[:step]) / gain[best].clamp(min=1e-12).sqrt()
        gain = (gain - factors[step] ** 2).clamp(min=0)
    return torch.tensor(picked, device=kernel.device)


CDPRUNER = Method("cdpruner", cdpruner, paper="Zhang et al. 2025, arXiv 2506.10967")
