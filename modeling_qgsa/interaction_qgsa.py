"""What each layer of the text model sees: up to some layer all that was looked at, from there on what was kept of it.

FastV (Chen et al. 2024) and SGL (Zhao et al. 2025) prune like this: later layers run on fewer positions, and hold
fewer in the cache. Sizes as in `layout_qgsa`; L' is the number of positions that reach the text model.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from .compat_qgsa import causal_mask
from .selection_qgsa import splice


NOTE = "qgsa_pruning"  # attribute of a cache: how its later layers differ has to travel with it, through copies too


@dataclass(frozen=True)
class Pruning:
    """From some layer on, only part of a prompt is seen.

    Args:
        layer: the number of layers that see all of it.
        kept: `(B, L')` bool, the columns that the other layers see.
    """

    layer: int
    kept: torch.Tensor


class Pruned(NamedTuple):
    """What is noted on a cache whose later layers are shorter.

    Args:
        layer: as in [`Pruning`].
        slots: number of slots of the first layers that the later ones have pruned.
        shown: `(B, later slots)`, attention mask of what the later layers hold in their place.
    """

    layer: int
    slots: int
    shown: torch.Tensor

    def mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """The attention mask of the later layers, given that of the first ones, `(B, slots)`."""
        shown = self.shown.to(attention_mask).repeat_interleave(len(attention_mask) // len(self.shown), 0)  # beams
        return torch.cat([shown, attention_mask[:, self.slots :]], 1)


def pruned_cache(cache) -> Pruned | None:
    """What is noted on `cache`, which may be None; None if all of its layers hold the same, or nothing yet."""
    noted = None if cache is None else vars(cache).get(NOTE)
    return noted if noted is not None and cache.get_seq_length() else None


def check_prune_layer(layer: int | None, layers: int):
    """Raise ValueError unless `layer` is None or a number of layers of a text model with `layers` of them."""
    if layer is None:
        return
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= layers:
        raise ValueError(f"prune_layer ({layer!r}) must be in 0 .. {layers}, the number of layers of the text model")


def run_layers(
    text_model, layers: slice, hidden: torch.Tensor, shown: torch.Tensor, positions: torch.Tensor, cache
) -> torch.Tensor:
    """Some layers of a text model over hidden states `(B, L', D)`.

    Args:
        layers: which ones.
        shown: `(B, slots + L')`, attention mask over what they hold in the cache and over the new positions.
        positions: `(B, L')` int64.
        cache: None, or a cache, which is extended.
    """
    mask = causal_mask(text_model, hidden, shown, positions, cache, layers.start or 0)
    rotary = text_model.rotary_emb(hidden, positions)
    for layer in text_model.layers[layers]:
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            position_embeddings=rotary,
        )
    return hidden


def run_pruned(text_model, text_inputs: dict[str, Any], cache, pruning: Pruning | None, options: dict[str, Any]):
    """The text model, if some of its layers see, or hold in the cache, only part of the positions.

    Args:
        text_inputs: `inputs_embeds` `(B, L', D)`, `attention_mask` `(B, slots + L')`, or None if nothing is padding,
            and `position_ids` `(B, L')`.
        cache: None, or a cache, perhaps one that was pruned before.
        pruning: None if all layers see these positions.
        options: further arguments of the text model.

    Returns `(hidden, cache)`: the last hidden state of the kept positions, padded on the left, and the cache.

    Raises ValueError for a static cache, for outputs of every layer, for a mask that is not by slot, and if the cache
    was pruned at another layer, or cropped since.
    """
    hidden, shown, positions = (text_inputs[name] for name in ("inputs_embeds", "attention_mask", "position_ids"))
    for name in ("output_attentions", "output_hidden_states"):
        if options.get(name):
            raise ValueError(f"{name}: not available with prune_layer, whose layers differ in length")
    if shown is None:
        slots = 0 if cache is None else cache.get_seq_length()
        shown = positions.new_ones(len(hidden), slots + hidden.shape[1])
    if shown.dim() != 2:
        raise ValueError(f"attention_mask has shape {tuple(shown.shape)}: prune_layer needs one of 2 dimensions")
    use_cache = options.get("use_cache")
    if cache is None and (text_model.config.use_cache if use_cache is None else use_cache):
        cache = DynamicCache(config=text_model.config)
    if not isinstance(cache, DynamicCache | None):
        raise ValueError(f"past_key_values ({type(cache).__name__}) must be a DynamicCache: layers differ in length")
    past = pruned_cache(cache)
    first = pruning.layer if pruning is not None else past.layer if past is not None else 0
    if past is not None and past.layer != first:
        raise ValueError(f"prune_layer ({first}) must be {past.layer}, at which past_key_values was pruned")
    later, new = shown if past is None else past.mask(shown), hidden.shape[1]
    if cache is not None and past is not None and first < len(cache.layers):
        held, expected = cache.get_seq_length(first), later.shape[1] - new
        if held != expected:
            raise ValueError(f"past_key_values holds {held} slots of layer {first}, not {expected}: it was cropped")
    hidden = run_layers(text_model, slice(0, first), hidden, shown, positions, cache)
    if pruning is not None:
        kept = pruning.kept.to(hidden.device).repeat_interleave(len(hidden) // len(pruning.kept), 0)  # beams
        (hidden, mask, positions), _ = splice(kept, (hidden, 0.0), (shown[:, -new:], 0), (positions, 0))
        later = torch.cat([later[:, :-new], mask], 1)
    hidden = run_layers(text_model, slice(first, None), hidden, later, positions, cache)
    if cache is not None and pruning is not None:
        setattr(cache, NOTE, Pruned(first, shown.shape[1], later))
    return text_model.norm(hidden), cache
