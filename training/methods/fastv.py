"""FastV (Chen et al. 2024): the visual tokens that the last position attends to in an early layer of the text model.

All tokens are seen up to that layer, and the kept ones from there on. Deviation: the first layers run twice, once for
the attention.
"""

from itertools import islice

import torch

from modeling_qgsa.attention_qgsa import attention_of_rows
from modeling_qgsa.prompt_qgsa import Prompt
from training.methods.method import Method, MethodInputs


LAYER = 2  # the number of layers that see all tokens; the attention of the last of them is read


def fastv(given: MethodInputs, layer: int = LAYER) -> torch.Tensor:
    """Attention of the last position to every visual token in a `layer`, mean over heads: scores `(T, P)`."""
    inputs, layout, model = given.inputs, given.layout, given.model.model
    prompt = Prompt.of(inputs["input_ids"], inputs["attention_mask"])
    embeds = model.embed(prompt.input_ids, layout, given.features, torch.ones_like(layout.is_global))
    last = torch.full_like(prompt.input_ids[:, :1], embeds.shape[1] - 1)
    layers = attention_of_rows(model.text_model, embeds, prompt.attention_mask, prompt.position_ids, last)
    weights = next(islice(layers, layer - 1, None)).mean(1)[:, 0]
    return weights[layout.tile_sample[:, None], layout.token_positions]


FASTV = Method("fastv", fastv, paper="Chen et al. 2024, arXiv 2403.06764", prune_layer=LAYER)
