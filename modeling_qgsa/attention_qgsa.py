"""Attention of chosen rows (query positions), without ever forming a full attention map."""

from collections.abc import Iterator

import torch
from transformers.models.llama.modeling_llama import rotate_half

from .compat_qgsa import causal_mask


def row_attention(
    layer, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], visible: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Attention weights of chosen rows in one layer, `(B, heads, R, L)` float32: O(rows x columns).

    Args:
        layer: a decoder layer of the text model, which is called through its own projections.
        hidden: `(B, L, D)`, the input of the layer.
        rotary: cosines and sines of all positions, `(B, L, head_dim)` each.
        visible: `(B, L)` bool, False for padding.
        rows: `(B, R)` int64, the positions whose attention is read; each sees itself and everything before it.
    """
    attention, hidden = layer.self_attn, layer.input_layernorm(hidden)

    def heads(projection, states, cos, sin):
        states = projection(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        return states * cos[:, None] + rotate_half(states) * sin[:, None]

    def at_rows(values):
        return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))

    query = heads(attention.q_proj, at_rows(hidden), *map(at_rows, rotary))
    key = heads(attention.k_proj, hidden, *rotary)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    seen = (visible[:, None] & (columns <= rows[..., None])) | (columns == rows[..., None])
    weights = (query @ key.transpose(-1, -2) * attention.scaling).float()
    return weights.masked_fill(~seen[:, None], float("-inf")).softmax(-1)


@torch.no_grad()
def attention_of_rows(
    text_model,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    rows: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """Yield the attention weights of chosen rows of a prompt, layer by layer, `(B, heads, R, L)` float32 each.

    The pass itself runs the text model's own attention implementation, and only up to the last layer that is
    requested: stop iterating there. Memory does not grow with the number of layers.

    Args:
        text_model: the model whose layers are read.
        inputs_embeds: `(B, L, D)`.
        attention_mask: `(B, L)`, 1 for tokens and 0 for padding.
        position_ids: `(B, L)` int64.
        rows: `(B, R)` int64, the positions whose attention is read.
    """
    hidden, rotary = inputs_embeds, text_model.rotary_emb(inputs_embeds, position_ids)
    mask = causal_mask(text_model, inputs_embeds, attention_mask, position_ids)
    for layer, previous in zip(text_model.layers, [None, *text_model.layers]):
        if previous is not None:
            hidden = previous(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary)
        yield row_attention(layer, hidden, rotary, attention_mask.bool(), rows)
