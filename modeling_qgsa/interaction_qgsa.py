"""What each layer of the text model sees: a schedule of how vision takes part, and from which layer on it is pruned.

A layer is `full` (stock: visual tokens attend and are updated), `cross` (text attends to the visual tokens as they
stand, by keys and values of the layer's own norm and projections; they are not updated; ViCA, ShortV) or `text` (they
take no part). VISOR (CVPR 2026) is a schedule of these. Behind `prune_layer`, only the kept positions are seen: FastV
(Chen et al. 2024) and SGL (Zhao et al. 2025) prune like this. Layers run on what they see alone, and hold nothing else
in the cache. Sizes as in `layout_qgsa`; L' is the number of positions that reach the text model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from .attention_qgsa import check_reads_4d_masks, project_heads
from .compat_qgsa import causal_mask, is_checkpointing
from .configuration_qgsa import LAYER_KINDS, check_kinds
from .selection_qgsa import splice


NOTE = "qgsa_layers"  # attribute of a cache: what its layers hold has to travel with it, through copies too


@dataclass(frozen=True)
class Interaction:
    """What each layer sees of a prompt.

    Args:
        kinds: of all layers, names in `LAYER_KINDS`.
        prune_layer: the number of layers that see all positions.
        kept: `(B, L')` bool, the positions that the others see.
        visual: `(B, L')` bool, which positions are visual tokens.
    """

    kinds: tuple[str, ...]
    prune_layer: int
    kept: torch.Tensor
    visual: torch.Tensor

    @classmethod
    def of(cls, request, first: torch.Tensor, stay: torch.Tensor, visual: torch.Tensor) -> "Interaction | None":
        """What the layers see in one call; None if all of them see everything that reaches the text model.

        Args:
            request: a [`Request`].
            first, stay: `(B, L)` bool, positions of the prompt that the first layers see, and that stay.
            visual: `(B, L)` bool, those of visual tokens.
        """
        if not request.prune_layer and set(request.schedule) == {"full"}:
            return None
        (kept, visual), _ = splice(first, (stay, False), (visual, False))
        return cls(request.schedule, request.prune_layer or len(request.schedule), kept, visual)

    @property
    def views(self) -> list["View"]:
        return [View(kind, number >= self.prune_layer) for number, kind in enumerate(self.kinds)]

    def of_rows(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`kept` and `visual` of each of `rows` rows, several of a sample if beams are searched."""
        repeat = rows // len(self.kept)
        return self.kept.repeat_interleave(repeat, 0), self.visual.repeat_interleave(repeat, 0)


class View(NamedTuple):
    """What a layer sees: its kind, and whether the positions are pruned."""

    kind: str
    pruned: bool


class Held(NamedTuple):
    """What is noted on a cache whose layers do not all hold every position.

    Args:
        views: of all layers.
        slots: number of positions, kept or not, that the attention mask counts up to here.
        first: number of slots in use in the first layer.
        shown: by view, the attention mask of the slots in use, `(B, slots of the view)`.
    """

    views: list[View]
    slots: int
    first: int
    shown: dict[View, torch.Tensor]

    def mask(self, view: View, attention_mask: torch.Tensor) -> torch.Tensor:
        """The attention mask of the layers with a view, given that of all positions, `(B, slots)`."""
        shown = self.shown[view].to(attention_mask)
        shown = shown.repeat_interleave(len(attention_mask) // len(shown), 0)  # beams
        return torch.cat([shown, attention_mask[:, self.slots :]], 1)


def held_by(cache) -> Held | None:
    """What is noted on `cache`, which may be None; None if all of its layers hold the same, or nothing yet."""
    noted = None if cache is None else vars(cache).get(NOTE)
    return noted if noted is not None and any(layer.get_seq_length() for layer in cache.layers) else None


def slots_in_use(cache) -> int:
    """The number of positions that the attention mask of `cache` counts."""
    held = held_by(cache)
    return int(cache.get_seq_length()) if held is None else held.slots + int(cache.get_seq_length()) - held.first


def check_prune_layer(layer: int | None, layers: int):
    """Raise ValueError unless `layer` is None or a number of layers of a text model with `layers` of them."""
    if layer is None:
        return
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= layers:
        raise ValueError(f"prune_layer ({layer!r}) must be in 0 .. {layers}, the number of layers of the text model")


# Schedules


LETTERS = {kind[0].upper(): kind for kind in LAYER_KINDS}


def cross_share(text_config) -> float:
    """The work of a cross layer on a visual token, its keys and values, as a share of that of a full layer."""
    head = text_config.head_dim or text_config.hidden_size // text_config.num_attention_heads
    keys, queries = 2 * text_config.num_key_value_heads * head, 2 * text_config.num_attention_heads * head
    return keys / (keys + queries + 3 * text_config.intermediate_size)


def schedule_of(config, vision_budget: float | str | Sequence[str] | None = None) -> tuple[str, ...]:
    """The kinds of all layers, names in `LAYER_KINDS`.

    Args:
        config: a [`QGSAConfig`]: its `vision_layers` by default.
        vision_budget: the kinds of one call, in words or as letters ("FFCT"); or the share of the layers' work on
            visual tokens that is to be done, 0 to 1: updates are left out first, in the order of
            `config.vision_ranking`, then keys and values.

    Raises ValueError for another number of layers, unknown kinds, a share out of range, and a share on a checkpoint
    without a ranking.
    """
    text = config.text_config
    layers = text.num_hidden_layers
    if vision_budget is None:
        return ("full",) * layers if config.vision_layers is None else tuple(config.vision_layers)
    if isinstance(vision_budget, str):
        vision_budget = [LETTERS.get(letter, letter) for letter in vision_budget]
    if not isinstance(vision_budget, (int, float)):
        check_kinds("vision_budget", vision_budget, layers)
        return tuple(vision_budget)
    if not 0 <= vision_budget <= 1:
        raise ValueError(f"vision_budget ({vision_budget}) must be in 0 .. 1")
    if config.vision_ranking is None:
        raise ValueError(
            f"vision_budget ({vision_budget}): the layers of this checkpoint were not ranked. Call "
            'rank_vision_layers, or give a schedule, such as "FFCC" for four layers'
        )
    kinds, work = ["full"] * layers, {"full": 1.0, "cross": cross_share(text), "text": 0.0}
    for kind, order in zip(("cross", "text"), config.vision_ranking):
        for number in order:
            if sum(work[each] for each in kinds) > vision_budget * layers + 1e-9:
                kinds[number] = kind
    return tuple(kinds)


# Layers


@dataclass
class Stream:
    """Hidden states on their way through the layers, and their columns: every field `(B, n, ...)`."""

    hidden: torch.Tensor
    shown: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor

    def take(self, columns: torch.Tensor) -> tuple["Stream", torch.Tensor]:
        """Some `columns`, `(B, n)` bool, padded on the left, and where they come from; -1 in the padding."""
        fields = (self.hidden, 0.0), (self.shown, 0), (self.positions, 0), (self.visual, False)
        taken, places = splice(columns & self.shown.bool(), *fields)
        return Stream(*taken), places

    def put(self, hidden: torch.Tensor, places: torch.Tensor):
        """Replace the hidden states at `places`, as `take` returns them."""
        row, column = (places >= 0).nonzero(as_tuple=True)
        self.hidden = self.hidden.index_put((row, places[row, column]), hidden[row, column])


def run_layers(text_model, layers: range, stream: Stream, before: torch.Tensor, cache) -> torch.Tensor:
    """Some layers over all columns of a stream: hidden states `(B, n, D)`.

    Args:
        before: `(B, slots)`, attention mask of what these layers hold in the cache.
        cache: None, or a cache, which is extended.
    """
    hidden, shown = stream.hidden, torch.cat([before, stream.shown], 1)
    mask = causal_mask(text_model, hidden, shown, stream.positions, cache, layers.start)
    rotary = text_model.rotary_emb(hidden, stream.positions)
    options = {"attention_mask": mask, "position_ids": stream.positions, "position_embeddings": rotary}
    for number in layers:
        hidden = text_model.layers[number](hidden, past_key_values=cache, **options)
    return hidden


def run_cross_layers(
    text_model, layers: range, text: Stream, visual: Stream, before: torch.Tensor, cache
) -> torch.Tensor:
    """Layers in which text attends to visual tokens that stay as they are: hidden states of the text.

    Keys and values of the visual tokens, at their original positions, go into the cache in front of those of the text;
    without a cache into a passing one.
    """
    rows, shown = text.positions[:, :, None], torch.cat([visual.shown, text.shown], 1).bool()
    positions = torch.cat([visual.positions, text.positions], 1)
    seen = shown[:, None] & (positions[:, None] <= rows)
    own = torch.arange(rows.shape[1], device=rows.device)
    seen[:, own, visual.positions.shape[1] + own] = True  # padding, too, so that no row is empty
    seen = torch.cat([before.bool()[:, None].expand(-1, rows.shape[1], -1), seen], 2)[:, None]
    mask = torch.where(seen, 0.0, torch.finfo(text.hidden.dtype).min).to(text.hidden.dtype)
    rotary = text_model.rotary_emb(text.hidden, text.positions)
    options = {"attention_mask": mask, "position_ids": text.positions, "position_embeddings": rotary}
    places, hidden = text_model.rotary_emb(visual.hidden, visual.positions), text.hidden
    for number in layers:
        layer, holding = text_model.layers[number], DynamicCache() if cache is None else cache
        normed = layer.input_layernorm(visual.hidden)
        keys = project_heads(layer.self_attn, layer.self_attn.k_proj, normed, places)
        values = project_heads(layer.self_attn, layer.self_attn.v_proj, normed)
        holding.update(keys, values, number)
        hidden = layer(hidden, past_key_values=holding, **options)
    return hidden


def run_group(text_model, kind: str, layers: range, stream: Stream, before: torch.Tensor, cache) -> list[torch.Tensor]:
    """Run layers of one kind over a stream, in place.

    Returns the attention masks of what they add to the cache, `(B, slots)` each, in its order.
    """
    if kind == "full":
        stream.hidden = run_layers(text_model, layers, stream, before, cache)
        return [stream.shown]
    text, places = stream.take(~stream.visual)
    if kind == "text":
        stream.put(run_layers(text_model, layers, text, before, cache), places)
        return [text.shown]
    visual, _ = stream.take(stream.visual)
    stream.put(run_cross_layers(text_model, layers, text, visual, before, cache), places)
    return [visual.shown, text.shown]


def check_inputs(text_model, shown: torch.Tensor, cache, kinds: Sequence[str], options: dict[str, Any]):
    """Raise ValueError for what layers that differ in length cannot serve; arguments as in `read_layers`."""
    for name in ("output_attentions", "output_hidden_states"):
        if options.get(name):
            raise ValueError(f"{name}: not available where layers of the text model differ in what they see")
    if shown.dim() != 2:
        raise ValueError(f"attention_mask has shape {tuple(shown.shape)}: layers that differ need one of 2 dimensions")
    if not isinstance(cache, DynamicCache | None):
        raise ValueError(f"past_key_values ({type(cache).__name__}) must be a DynamicCache: layers differ in length")
    if "cross" in kinds:
        check_reads_4d_masks(text_model.config, "text_config", "a cross layer")
        if text_model.training and is_checkpointing(text_model):
            raise ValueError("vision_layers (cross): not available with activation checkpointing in training")


def read_layers(text_model, text_inputs: dict[str, Any], cache, interaction: Interaction | None, options: dict):
    """The text model, if some of its layers see, or hold in the cache, only part of the positions.

    Args:
        text_inputs: `inputs_embeds` `(B, L', D)`, `attention_mask` `(B, slots + L')`, or None if nothing is padding,
            and `position_ids` `(B, L')`.
        cache: None, or a cache, perhaps one whose layers differ already.
        interaction: None for text alone, which all layers see.
        options: further arguments of the text model.

    Returns `(hidden, cache)`: the last hidden state of the positions that are kept, padded on the left, and the cache.
    Visual tokens that the last layers do not update stay as they are.

    Raises ValueError as `check_inputs` does, and if layers of the cache hold other views, or were cropped since.
    """
    hidden, shown, positions = (text_inputs[name] for name in ("inputs_embeds", "attention_mask", "position_ids"))
    new, use_cache = hidden.shape[1], options.get("use_cache")
    if shown is None:
        shown = positions.new_ones(len(hidden), (0 if cache is None else slots_in_use(cache)) + new)
    if cache is None and (text_model.config.use_cache if use_cache is None else use_cache):
        cache = DynamicCache(config=text_model.config)
    check_inputs(text_model, shown, cache, () if interaction is None else interaction.kinds, options)
    held = held_by(cache)
    views = interaction.views if interaction is not None else held.views if held is not None else []
    if held is not None and held.views != views:
        raise ValueError("vision_layers or prune_layer: past_key_values was filled with others")
    before = {view: (shown if held is None else held.mask(view, shown))[:, :-new] for view in set(views)}
    check_lengths(cache, held, before)
    if interaction is None:
        kept, visual = torch.ones_like(positions, dtype=torch.bool), torch.zeros_like(positions, dtype=torch.bool)
    else:
        kept, visual = (each.to(hidden.device) for each in interaction.of_rows(len(hidden)))
    stream, pruned, after = Stream(hidden, shown[:, -new:], positions, visual), False, dict(before)
    for view, group in groupby(range(len(views)), views.__getitem__):
        numbers = list(group)
        if view.pruned and not pruned:
            stream, pruned = stream.take(kept)[0], True
        kind = view.kind if visual.any() else "full"
        layers = range(numbers[0], numbers[-1] + 1)
        added = run_group(text_model, kind, layers, stream, before[view], cache)
        after[view] = torch.cat([before[view], *added], 1)
    if cache is not None and interaction is not None:
        setattr(cache, NOTE, Held(views, shown.shape[1], int(cache.get_seq_length()), after))
    if not pruned and interaction is not None and interaction.prune_layer == len(views):
        stream = stream.take(kept)[0]
    return text_model.norm(stream.hidden), cache


def check_lengths(cache, held: Held | None, before: dict[View, torch.Tensor]):
    """Raise ValueError if a layer of `cache` does not hold what is noted on it, because it was cropped."""
    for number, view in enumerate([] if held is None else held.views):
        length, expected = int(cache.get_seq_length(number)), before[view].shape[1]
        if length != expected:
            raise ValueError(f"past_key_values holds {length} slots of layer {number}, not {expected}: it was cropped")
