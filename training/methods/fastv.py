"""FastV (Chen et al. 2024): the visual tokens that the last position attends to in an early layer of the text model.

Deviation: FastV prunes behind its second layer. Here the first layers run once more over the kept tokens.
"""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_qgsa.prompt_qgsa import Prompt
from training.methods.method import Method, MethodInputs


LAYER = 2  # whose attention is read, counted from 1


def fastv(given: MethodInputs) -> torch.Tensor:
    """Attention of the last position to every visual token, mean over heads: scores `(T, P)`."""
    inputs, layout, model = given.inputs, given.layout, given.model.model
    prompt, text_model = Prompt.of(inputs["input_ids"], inputs["attention_mask"]), model.text_model
    hidden = model.embed(prompt.input_ids, layout, given.features, torch.ones_like(layout.is_global))
    rotary = text_model.rotary_emb(hidden, prompt.position_ids)
    mask = causal_mask(prompt.attention_mask, hidden.dtype)
    for block in text_model.layers[: LAYER - 1]:
        hidden = block(hidden, attention_mask=mask, position_ids=prompt.position_ids, position_embeddings=rotary)
    weights = attention_of_last(text_model.layers[LAYER - 1], hidden, rotary, mask).mean(1)
    return weights[layout.tile_sample[:, None], layout.token_positions]


def causal_mask(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask `(B, 1, L, L)` from `attention_mask` `(B, L)`; padding sees itself, so that no row is empty."""
    length, device = attention_mask.shape[1], attention_mask.device
    seen = attention_mask.bool()[:, None, None] & torch.ones(length, length, device=device).tril().bool()
    seen = seen | torch.eye(length, dtype=torch.bool, device=device)
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)


def attention_of_last(block, hidden: torch.Tensor, rotary, mask: torch.Tensor) -> torch.Tensor:
    """Attention weights of the last position in the decoder layer `block`, `(B, heads, L)`; `hidden` `(B, L, D)`."""
    attention, hidden = block.self_attn, block.input_layernorm(hidden)
    heads = (*hidden.shape[:2], -1, attention.head_dim)
    query, key = (
        projection(hidden).view(heads).transpose(1, 2) for projection in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (query[:, :, -1:] @ key.transpose(-1, -2) * attention.scaling + mask[:, :, -1:]).softmax(-1)[:, :, 0]


FASTV = Method("fastv", fastv, paper="Chen et al. 2024, arXiv 2403.06764")
