"""Published pruning methods on the same splice: every tile is encoded, then each keeps k tokens in its own way.

Each function takes `(model, inputs, layout, k)` and returns options of `generate`: the features of all tiles
`image_hidden_states`, and `visual_token_scores` whose k highest are the method's choice. None of them sees an answer.
What is kept goes to the text model from its first layer on, at the original positions.
"""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_qgsa.prompt_qgsa import Prompt
from modeling_qgsa.selection_qgsa import VisualLayout, to_images, to_tiles
from training.evaluation.systems import encode_all


def options_for(features: torch.Tensor, scores: torch.Tensor, layout: VisualLayout) -> dict[str, torch.Tensor]:
    """Options of `generate` for features and scores `(T, P)`."""
    samples, per_tile = len(layout.tile_of_position), layout.tokens_per_tile
    most = int(torch.bincount(layout.tile_sample, minlength=samples).max())
    rows = scores.new_zeros(samples, most, per_tile, dtype=torch.float32)
    rows = rows.index_put((layout.tile_sample, layout.tile_ordinal), scores.float())
    return {"image_hidden_states": features, "visual_token_scores": rows.flatten(1)}


def order_scores(order: list[torch.Tensor], candidates: torch.BoolTensor) -> torch.Tensor:
    """Scores `(I, n)` that fall along the `order` in which each image's tokens were picked; -1 for the others."""
    scores = torch.full(candidates.shape, -1.0, device=candidates.device)
    for row, picked in enumerate(order):
        scores[row, picked] = torch.arange(len(picked), 0, -1, dtype=torch.float32, device=candidates.device)
    return scores


@torch.no_grad()
def fastv(model, inputs: dict, layout: VisualLayout, k: int, layer: int = 2) -> dict[str, torch.Tensor]:
    """FastV (Chen et al. 2024): the tokens that the last position attends to in the `layer`-th layer.

    FastV prunes behind that layer; here its first layers run once more over what is kept.
    """
    features = encode_all(model, inputs)
    prompt, text_model = Prompt.of(inputs["input_ids"], inputs["attention_mask"]), model.model.text_model
    hidden = model.model.embed(prompt.input_ids, layout, features, torch.ones_like(layout.is_global))
    rotary = text_model.rotary_emb(hidden, prompt.position_ids)
    length = hidden.shape[1]
    seen = prompt.attention_mask.bool()[:, None, None] & torch.ones(length, length, device=hidden.device).tril().bool()
    seen = seen | torch.eye(length, dtype=torch.bool, device=hidden.device)
    mask = torch.where(seen, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)
    for block in text_model.layers[: layer - 1]:
        hidden = block(hidden, attention_mask=mask, position_ids=prompt.position_ids, position_embeddings=rotary)
    block = text_model.layers[layer - 1]
    attention, hidden = block.self_attn, block.input_layernorm(hidden)
    heads = (*hidden.shape[:2], -1, attention.head_dim)
    query, key = (
        projection(hidden).view(heads).transpose(1, 2) for projection in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    weights = (query[:, :, -1:] @ key.transpose(-1, -2) * attention.scaling + mask[:, :, -1:]).softmax(-1)
    weights = weights.mean(1)[:, 0]
    return options_for(features, weights[layout.tile_sample[:, None], layout.token_positions], layout)


@torch.no_grad()
def visionzip(model, inputs: dict, layout: VisualLayout, k: int) -> dict[str, torch.Tensor]:
    """VisionZip (Yang et al. 2024): the tokens the encoder attends to, and means of the others around some of them.

    54 of 64 kept tokens are dominant, by the attention they get in the last but one layer (SigLIP has no class token:
    from all patches); the rest are evenly spaced among the others, each averaged with those whose keys are most alike.
    Keys and attention of a token are the means over its patches.
    """
    features, received, keys = _attention_received(model, inputs, layout)
    scores = to_images(received, layout, float("-inf")).flatten(1)
    rows, keys = to_images(features, layout, 0).flatten(1, 2), to_images(keys, layout, 0).flatten(1, 2)
    order = []
    for row, score in enumerate(scores):
        count = min(k, int(score.isfinite().sum()))
        dominant = score.topk(max(1, round(count * 54 / 64))).indices
        others = torch.isfinite(score).index_fill(0, dominant, False).nonzero()[:, 0]
        contextual = count - len(dominant)
        picked = others[torch.linspace(0, len(others) - 1, contextual, device=score.device).long()]
        if contextual:
            unit = torch.nn.functional.normalize(keys[row], dim=-1)
            nearest = (unit[others] @ unit[picked].T).argmax(1)
            nearest[torch.searchsorted(others, picked)] = torch.arange(contextual, device=score.device)
            shares = torch.nn.functional.one_hot(nearest, contextual).to(rows.dtype)
            rows[row, picked] = (shares / shares.sum(0)).T @ rows[row, others]
        order.append(torch.cat([dominant, picked]))
    features = rows.view(len(rows), -1, *features.shape[1:])[layout.tile_image, layout.tile_slot]
    return options_for(features, to_tiles(order_scores(order, scores.isfinite()), layout), layout)


def _attention_received(model, inputs: dict, layout: VisualLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features `(T, P, D)`, and of the last but one layer of the encoder the attention that each token gets `(T, P)`
    and its keys `(T, P, width)`.
    """
    vision, scale = model.model.vision_model, model.config.scale_factor
    attention, queries, keys, received = vision.encoder.layers[-2].self_attn, [], [], []
    inputs = {name: value for name, value in inputs.items() if name != "image_hidden_states"}
    hooks = [
        projection.register_forward_hook(lambda module, args, output, into=into: into.append(output))
        for projection, into in ((attention.q_proj, queries), (attention.k_proj, keys))
    ]
    try:
        features = encode_all(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    keys = torch.cat(keys)
    for query, key in zip(torch.cat(queries), keys):
        heads = (len(query), attention.num_heads, attention.head_dim)
        weights = query.view(heads).transpose(0, 1) @ key.view(heads).permute(1, 2, 0) * attention.scale
        received.append(weights.softmax(-1).mean((0, 1)))
    side = round(len(received[0]) ** 0.5) // scale

    def of_tokens(values):
        return values.unflatten(1, (side, scale, side, scale)).mean((2, 4)).flatten(1, 2)

    return features, of_tokens(torch.stack(received)), of_tokens(keys)


@torch.no_grad()
def divprune(model, inputs: dict, layout: VisualLayout, k: int) -> dict[str, torch.Tensor]:
    """DivPrune (Alvar et al. 2025): the most diverse tokens, greedily the farthest from those picked (cosine)."""
    features = encode_all(model, inputs)
    rows = torch.nn.functional.normalize(to_images(features, layout, 0).flatten(1, 2).float(), dim=-1)
    candidates = to_images(torch.ones_like(features[..., 0], dtype=torch.bool), layout, False).flatten(1)
    order = []
    for row, present in zip(rows, candidates):
        tokens = row[present]
        distance = 1 - tokens @ tokens.T
        nearest = distance.clone().fill_diagonal_(float("inf")).amin(1)  # starts from the token farthest from all
        picked = [int(nearest.argmax())]
        nearest = distance[picked[0]].index_fill(0, distance.new_tensor(picked, dtype=torch.long), -1)
        while len(picked) < min(k, len(tokens)):
            picked.append(int(nearest.argmax()))
            nearest = torch.minimum(nearest, distance[picked[-1]])
            nearest[picked[-1]] = -1  # a picked token is no candidate again
        order.append(present.nonzero()[:, 0][torch.tensor(picked, device=row.device)])
    return options_for(features, to_tiles(order_scores(order, candidates), layout), layout)


@torch.no_grad()
def cdpruner(model, inputs: dict, layout: VisualLayout, k: int) -> dict[str, torch.Tensor]:
    """CDPruner (Zhang et al. 2025): a determinantal point process over tokens, conditioned on the question.

    Relevance is the cosine between a token and the mean of the question's word embeddings, from 0 to 1 within an
    image: SmolVLM's encoder has no text side to ask. The most probable set is picked greedily.
    """
    features = encode_all(model, inputs)
    words = model.get_input_embeddings()(inputs["input_ids"]) * inputs["question_mask"][..., None]
    question = torch.nn.functional.normalize(words.sum(1).float(), dim=-1)[layout.image_sample]
    rows = torch.nn.functional.normalize(to_images(features, layout, 0).flatten(1, 2).float(), dim=-1)
    candidates = to_images(torch.ones_like(features[..., 0], dtype=torch.bool), layout, False).flatten(1)
    order = []
    for row, present, asked in zip(rows, candidates, question):
        tokens = row[present]
        relevance = tokens @ asked
        relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min()).clamp(min=1e-6)
        kernel = relevance[:, None] * (tokens @ tokens.T) * relevance[None]
        picked = greedy_map(kernel, min(k, len(tokens)))
        order.append(present.nonzero()[:, 0][picked])
    return options_for(features, to_tiles(order_scores(order, candidates), layout), layout)


def greedy_map(kernel: torch.Tensor, k: int) -> torch.LongTensor:
    """The k items that greedily make the determinant of their part of `kernel` `(n, n)` largest (Chen et al. 2018)."""
    gain, factors, picked = kernel.diagonal().clone(), kernel.new_zeros(k, len(kernel)), []
    taken = torch.zeros(len(kernel), dtype=torch.bool, device=kernel.device)
    for step in range(k):
        best = int(gain.masked_fill(taken, -1).argmax())
        picked.append(best)
        taken[best] = True
        factors[step] = (kernel[best] - factors[:step, best] @ factors[:step]) / gain[best].clamp(min=1e-12).sqrt()
        gain = (gain - factors[step] ** 2).clamp(min=0)
    return torch.tensor(picked, device=kernel.device)


PEERS = {"fastv": fastv, "visionzip": visionzip, "divprune": divprune, "cdpruner": cdpruner}
