"""Outputs of the models: SmolVLM's, with the selection behind them. Sizes as in `layout_qgsa`."""

from dataclasses import dataclass

import torch
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMBaseModelOutputWithPast, SmolVLMCausalLMOutputWithPast

from .compat_qgsa import features_field
from .interaction_qgsa import Interaction
from .pointer_qgsa import Glance
from .readout_qgsa import columns_of_positions, take_columns
from .selection_qgsa import QGSASelection


@dataclass
class QGSABaseModelOutputWithPast(SmolVLMBaseModelOutputWithPast):
    """SmolVLM's output with the `selection` and the `glance` behind it (None if nothing was selected).

    `image_hidden_states` (since transformers 5.24 `image_outputs.pooler_output`) are the features of the encoded
    tiles, `(n, P, D)`; with "blocks", 0 where no block was chosen. Hidden states are those of the positions of the
    prompt, `(B, L, D)`; at a position that was not kept stand those of the last kept one before it. `attentions` and
    the cache hold the kept positions alone.
    """

    selection: QGSASelection | None = None
    glance: Glance | None = None

    @classmethod
    def of(cls, outputs, prefill: "Prefill") -> "QGSABaseModelOutputWithPast":
        """The `outputs` of SmolVLM for a `prefill`."""
        assert prefill.selection.keep_indices is not None
        columns = columns_of_positions(prefill.selection.keep_indices, prefill.length)
        made = {
            "last_hidden_state": take_columns(outputs.last_hidden_state, columns),
            **features_field(prefill.features),
            "selection": prefill.selection,
            "glance": prefill.glance,
        }
        if outputs.hidden_states is not None:
            made["hidden_states"] = tuple(  # None for a layer that was not asked for
                None if each is None else take_columns(each, columns) for each in outputs.hidden_states
            )
        return cls(**{**outputs, **made})


@dataclass
class QGSACausalLMOutputWithPast(SmolVLMCausalLMOutputWithPast):
    """SmolVLM's output with the `selection` behind it.

    Logits, like hidden states, are those of the positions of the prompt, `(B, L, V)`: at a position that was not kept
    stand those of the last kept one before it, what the model expects next there.

    In training it also holds the `glance`, whose relevance and complexity logits carry gradients for losses on them.
    """

    selection: QGSASelection | None = None
    glance: Glance | None = None

    @classmethod
    def of(cls, outputs: QGSABaseModelOutputWithPast, **fields) -> "QGSACausalLMOutputWithPast":
        """The outputs of the base model without its last hidden state, and `fields`."""
        shared = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return cls(**{**shared, **fields})


@dataclass(frozen=True)
class Prefill:
    """Result of a selection: the inputs of the text model, and how they came about."""

    text_inputs: dict[str, torch.Tensor]  # inputs_embeds (B, L', D), attention_mask, position_ids (original)
    selection: QGSASelection
    glance: Glance
    features: torch.Tensor  # (n, P, D) of the encoded tiles
    length: int  # L, the number of positions of the prompt
    held: torch.Tensor  # (B, L') int64, those that reach the text model, -1 in the padding on the left
    interaction: Interaction | None  # what each layer sees of these; None if all see everything
