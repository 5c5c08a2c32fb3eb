"""Outputs of the models: SmolVLM's, with the selection behind them. Sizes as in `layout_qgsa`."""

from dataclasses import dataclass

import torch
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMBaseModelOutputWithPast, SmolVLMCausalLMOutputWithPast

from .pointer_qgsa import Glance
from .selection_qgsa import QGSASelection


@dataclass
class QGSABaseModelOutputWithPast(SmolVLMBaseModelOutputWithPast):
    """SmolVLM's output with the `selection` and the `glance` behind it (None if nothing was selected).

    `image_hidden_states` are the features of the encoded tiles, `(n, P, D)`; with "blocks", 0 where no block was
    chosen.
    """

    selection: QGSASelection | None = None
    glance: Glance | None = None


@dataclass
class QGSACausalLMOutputWithPast(SmolVLMCausalLMOutputWithPast):
    """SmolVLM's output with the `selection` behind it; logits are those of `selection.keep_indices`.

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
