"""Attention of chosen rows (query positions), without a full attention map; which implementations read which masks."""

from collections.abc import Iterator

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import rotate_half

from .compat_qgsa import causal_mask
from .configuration_qgsa import Budget
from .layout_qgsa import VisualLayout


def check_reads_4d_masks(config, part: str, purpose: str):
    """Raise ValueError unless the attention implementation of `config` reads 4D masks, as "sdpa" and "eager" do.

    Flash attention reads 2D padding masks only, and implementations without a registered mask format may read none.

    Args:
        config: configuration of the text model or of the encoder.
        part: its name in `set_attn_implementation`.
        purpose: what needs the mask.
    """
    masks, name = ALL_MASK_ATTENTION_FUNCTIONS, config._attn_implementation
    if masks.get(name) not in (masks["sdpa"], masks["eager"], masks["flex_attention"]):
        raise ValueError(
            f"attn_implementation ({name!r} in {part}): {purpose} needs a 4D attention mask, which it does not read. "
            f'Choose "sdpa" or "eager", such as with model.set_attn_implementation({{"{part}": "sdpa"}})'
        )


def check_attention(model, budget: Budget, layout: VisualLayout, gated: bool):
    """Raise ValueError, before anything is computed, if a 4D mask may be needed that the model does not read.

    Args:
        model: a [`QGSASmolVLMModel`].
        gated: whether gates on the attention keys train the selector.
    """
    if gated:
        check_reads_4d_masks(model.text_model.config, "text_config", "training, which gates the attention keys,")
    if budget.selection == "blocks":
        most_tiles = min(budget.max_tiles * len(layout.image_sample), int((~layout.is_global).sum()))
        if most_tiles > 1:
            check_reads_4d_masks(model.vision_model.config, "vision_config", 'selection="blocks" with several tiles')


def project_heads(
    attention, projection, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """Queries, keys or values of an attention layer by heads, `(B, heads, L, head_dim)`.

    Args:
        attention: the attention of a decoder layer.
        projection: one of its projections.
        hidden: `(B, L, D)`, the normed input of the layer.
        rotary: cosines and sines of all positions, `(B, L, head_dim)` each; None for values.
    """
    states = projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    if rotary is None:
        return states
    cos, sin = rotary
    return states * cos[:, None] + rotate_half(states) * sin[:, None]


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

    def at_rows(values):
        return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))

    query = project_heads(attention, attention.q_proj, at_rows(hidden), tuple(map(at_rows, rotary)))
    key = project_heads(attention, attention.k_proj, hidden, rotary)
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
