"""What each layer of the text model sees: a schedule of how vision takes part, and from which layer on it is pruned.

A layer is `full` (stock: visual tokens attend and are updated), `cross` (text attends to the visual tokens as they
stand, by keys and values of the layer's own norm and projections, as in ViCA and ShortV, or in a block in front of the
layer, as in VISOR; they are not updated) or `text` (they take no part). VISOR (CVPR 2026) is a schedule of these.
Behind `prune_layer`, only the kept positions are seen: FastV (Chen et al. 2024) and SGL (Zhao et al. 2025) prune like
this. Layers run on what they see alone, and hold nothing else in the cache. Sizes as in `layout_qgsa`; L' is the
number of positions that reach the text model.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from .attention_qgsa import check_reads_4d_masks, project_heads
from .compat_qgsa import CACHE, causal_mask, is_checkpointing
from .layered_cache_qgsa import (
    Held,
    Seen,
    View,
    check_held,
    check_lengths,
    held_by,
    join_rows,
    joined_views,
    note,
    pad_left,
    slots_in_use,
    take_rows,
)
from .selection_qgsa import splice


@dataclass(frozen=True)
class Interaction:
    """What each layer sees of a prompt.

    Args:
        schedules: of every sample, the kinds of all layers, names in `LAYER_KINDS`.
        prune_layer: the number of layers that see all positions.
        kept: `(B, L')` bool, the positions that the others see.
        visual: `(B, L')` bool, which positions are visual tokens.
        gates: `(B, L')` float, what the relaxed selection of training adds to the attention to each position, at most
            0; None without one.
    """

    schedules: tuple[tuple[str, ...], ...]
    prune_layer: int
    kept: torch.Tensor
    visual: torch.Tensor
    gates: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        schedules: Sequence[tuple[str, ...]],
        prune_layer: int | None,
        first: torch.Tensor,
        stay: torch.Tensor,
        visual: torch.Tensor,
        gates: torch.Tensor | None = None,
    ) -> "Interaction | None":
        """What the layers see in one call; None if all of them see everything that reaches the text model.

        Args:
            schedules, prune_layer, gates: as above; None or 0 layers prune before the text model.
            first, stay: `(B, L)` bool, positions of the prompt that the first layers see, and that stay.
            visual: `(B, L)` bool, those of visual tokens.
        """
        if not prune_layer and all(set(kinds) == {"full"} for kinds in schedules):
            return None
        (kept, visual), _ = splice(first, (stay, False), (visual, False))
        return cls(tuple(schedules), prune_layer or len(schedules[0]), kept, visual, gates)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of all layers, if the samples have the same."""
        (kinds,) = set(self.schedules)
        return kinds

    @property
    def views(self) -> list["View"]:
        return [View(kind, number >= self.prune_layer) for number, kind in enumerate(self.kinds)]

    def of_rows(self, rows: int) -> "Interaction":
        """The same for `rows` rows, several of a sample if beams are searched."""
        repeat = rows // len(self.kept)
        schedules = tuple(kinds for kinds in self.schedules for _ in range(repeat))
        kept, visual = (each.repeat_interleave(repeat, 0) for each in (self.kept, self.visual))
        return replace(self, schedules=schedules, kept=kept, visual=visual)

    def groups(self) -> list[tuple[torch.Tensor, "Interaction"]]:
        """The rows of each schedule, `(n,)` int64, and what the layers see of them."""
        groups = []
        for kinds in dict.fromkeys(self.schedules):
            rows = torch.tensor([row for row, own in enumerate(self.schedules) if own == kinds])
            rows = rows.to(self.kept.device)
            gates = None if self.gates is None else self.gates[rows]
            schedules = (kinds,) * len(rows)
            groups.append(
                (rows, replace(self, schedules=schedules, kept=self.kept[rows], visual=self.visual[rows], gates=gates))
            )
        return groups


def check_prune_layer(layer: int | None, layers: int):
    """Raise ValueError unless `layer` is None or a number of layers of a text model with `layers` of them."""
    if layer is None:
        return
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= layers:
        raise ValueError(f"prune_layer ({layer!r}) must be in 0 .. {layers}, the number of layers of the text model")


# Layers


@dataclass
class Stream:
    """Hidden states on their way through the layers, and their columns: every field `(B, n, ...)`."""

    hidden: torch.Tensor
    shown: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    gates: torch.Tensor

    def take(self, columns: torch.Tensor) -> tuple["Stream", torch.Tensor]:
        """Some `columns`, `(B, n)` bool, padded on the left, and where they come from; -1 in the padding."""
        fields = (self.hidden, 0.0), (self.shown, 0), (self.positions, 0), (self.visual, False), (self.gates, 0.0)
        taken, places = splice(columns & self.shown.bool(), *fields)
        return Stream(*taken), places

    def put(self, hidden: torch.Tensor, places: torch.Tensor):
        """Replace the hidden states at `places`, as `take` returns them."""
        row, column = (places >= 0).nonzero(as_tuple=True)
        self.hidden = self.hidden.index_put((row, places[row, column]), hidden[row, column])


def visible(rows: Stream, columns: Stream, before: torch.Tensor) -> torch.Tensor:
    """What `rows` see: the columns that do not come after them in the prompt, `(B, rows, slots + columns)` bool.

    Args:
        before: `(B, slots)`, attention mask of what is held in front, and comes earlier.
    """
    seen = columns.shown.bool()[:, None] & (columns.positions[:, None] <= rows.positions[:, :, None])
    return torch.cat([before.bool()[:, None].expand(-1, rows.hidden.shape[1], -1), seen], 2)


def added_to(seen: torch.Tensor, columns: Stream, before: torch.Tensor) -> torch.Tensor:
    """What is added to an attention in which `seen` is visible: `(B, 1, rows, slots + columns)`."""
    added = torch.cat([torch.zeros_like(before, dtype=columns.gates.dtype), columns.gates], 1)[:, None]
    dtype = columns.hidden.dtype
    return torch.where(seen, added, torch.finfo(dtype).min).to(dtype)[:, None]


def additive_mask(rows: Stream, columns: Stream, before: torch.Tensor) -> torch.Tensor:
    """What is added to the attention of `rows`, the last ones of `columns`: `(B, 1, rows, slots + columns)`.

    A row also sees itself, even if it is padding, so that no row is empty; `before` as in `visible`.
    """
    seen = visible(rows, columns, before)
    own = torch.arange(rows.hidden.shape[1], device=rows.hidden.device)
    seen[:, own, seen.shape[2] - len(own) + own] = True
    return added_to(seen, columns, before)


class Reader(NamedTuple):
    """What is common to the groups of layers of one call.

    Args:
        text_model: whose layers are run.
        cache: None, or a cache, which is extended.
        gated: whether the gates count.
        known: by view, what its groups of layers share: masks, positions and their rotary embeddings.
        blocks: those in front of all layers, None without them.
        seen: by layer, what its block made of visual tokens up to here.
    """

    text_model: Any
    cache: Any
    gated: bool
    known: dict[Hashable, dict[str, Any]]
    blocks: Any
    seen: dict[int, Seen]


def look(reader: Reader, number: int, text: Stream, hidden: torch.Tensor, view: Hashable, visual) -> torch.Tensor:
    """Run the block in front of a layer, if it has visual tokens to look at: hidden states of the text.

    Args:
        number, view: of the layer.
        text: the text tokens, with `hidden` `(B, n, D)` in place of their hidden states.
        visual: new visual tokens as `Stream.take` returns them, None if there are none.
    """
    held = reader.seen.get(number)
    if reader.blocks is None or (held is None and visual is None):
        return hidden
    block, key = reader.blocks[number], ("block", view)
    if key not in reader.known:
        before = text.shown[:, :0] if held is None else held.shown
        columns = Stream(*(each[:, :0] for each in vars(text).values())) if visual is None else visual[0]
        sight = visible(text, columns, before)
        reader.known[key] = {
            "options": {"mask": added_to(sight, columns, before), "sees": sight.any(2)},
            "places": None if visual is None else block.places(visual[1]),
            "shown": torch.cat([before, columns.shown], 1),
        }
    known = reader.known[key]
    new = None if visual is None else (visual[0].hidden, known["places"])
    earlier = None if held is None else (held.keys, held.values)
    hidden, (keys, values) = block(hidden, **known["options"], held=earlier, visual=new)
    reader.seen[number] = Seen(keys, values, known["shown"])
    return hidden


def run_layers(
    reader: Reader, layers: range, stream: Stream, before: torch.Tensor, view: Hashable, cache, visual=None
) -> torch.Tensor:
    """Some layers over all columns of a stream: hidden states `(B, n, D)`.

    Args:
        before: `(B, slots)`, attention mask of what these layers hold in the cache.
        view: of these layers.
        cache: that of the reader, or None.
        visual: new visual tokens that blocks in front of these layers look at, see `look`.
    """
    text_model, hidden = reader.text_model, stream.hidden
    if view not in reader.known:
        if reader.gated:
            mask = additive_mask(stream, stream, before)
        else:
            shown = torch.cat([before, stream.shown], 1)
            mask = causal_mask(text_model, hidden, shown, stream.positions, cache, layers.start)
        rotary = text_model.rotary_emb(hidden, stream.positions)
        options = {"attention_mask": mask, "position_ids": stream.positions, "position_embeddings": rotary}
        reader.known[view] = options
    for number in layers:
        hidden = look(reader, number, stream, hidden, view, visual)
        hidden = text_model.layers[number](hidden, **{CACHE: cache}, **reader.known[view])
    return hidden


def run_cross_layers(
    reader: Reader, layers: range, text: Stream, visual: Stream, before: torch.Tensor, view: Hashable
) -> torch.Tensor:
    """Layers in which text attends to visual tokens that stay as they are: hidden states of the text.

    Keys and values of the visual tokens, at their original positions, go into the cache in front of those of the text;
    without a cache into a passing one.
    """
    text_model, hidden = reader.text_model, text.hidden
    if view not in reader.known:
        columns = Stream(*(torch.cat([vars(visual)[name], vars(text)[name]], 1) for name in vars(text)))
        mask, rotary = additive_mask(text, columns, before), text_model.rotary_emb(hidden, text.positions)
        options = {"attention_mask": mask, "position_ids": text.positions, "position_embeddings": rotary}
        reader.known[view] = {"places": text_model.rotary_emb(visual.hidden, visual.positions), "options": options}
    places, options = reader.known[view]["places"], reader.known[view]["options"]
    for number in layers:
        layer, holding = text_model.layers[number], DynamicCache() if reader.cache is None else reader.cache
        normed = layer.input_layernorm(visual.hidden)
        keys = project_heads(layer.self_attn, layer.self_attn.k_proj, normed, places)
        values = project_heads(layer.self_attn, layer.self_attn.v_proj, normed)
        holding.update(keys, values, number)
        hidden = layer(hidden, **{CACHE: holding}, **options)
    return hidden


def run_group(
    reader: Reader, kind: str, layers: range, stream: Stream, before: torch.Tensor, view: Hashable
) -> list[torch.Tensor]:
    """Run layers of one kind over a stream, in place.

    Returns the attention masks of what they add to the cache, `(B, slots)` each, in its order.
    """
    if kind == "full":
        stream.hidden = run_layers(reader, layers, stream, before, view, reader.cache)
        return [stream.shown]
    own = kind == "cross" and reader.blocks is None
    if own and reader.text_model.training and is_checkpointing(reader.text_model):
        # A layer that is checkpointed takes no cache. Over all columns it makes the same of the text, at more cost.
        for number in layers:
            hidden = run_layers(reader, range(number, number + 1), stream, before, view, None)
            stream.hidden = torch.where(stream.visual[..., None], stream.hidden, hidden)
        return []
    text, places = stream.take(~stream.visual)
    if own:
        visual, _ = stream.take(stream.visual)
        stream.put(run_cross_layers(reader, layers, text, visual, before, view), places)
        return [visual.shown, text.shown]
    looked_at = stream.take(stream.visual) if kind == "cross" else None
    stream.put(run_layers(reader, layers, text, before, view, reader.cache, looked_at), places)
    return [text.shown]


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


def read_layers(
    text_model, text_inputs: dict[str, Any], cache, interaction: Interaction | None, options: dict, blocks=None
):
    """The text model, if some of its layers see, or hold in the cache, only part of the positions.

    Args:
        text_inputs: `inputs_embeds` `(B, L', D)`, `attention_mask` `(B, slots + L')`, or None if nothing is padding,
            and `position_ids` `(B, L')`.
        cache: None, or a cache, perhaps one whose layers differ already.
        interaction: None for text alone, which all layers see.
        options: further arguments of the text model.
        blocks: the [`VisionBlock`] in front of each layer; None if cross layers look by their own projections.

    Returns `(hidden, cache)`: the last hidden state of the positions that are kept, padded on the left, and the cache.
    Visual tokens that the last layers do not update stay as they are.

    Raises ValueError as `check_inputs` does, and if layers of the cache hold other views, or were cropped since.
    """
    hidden, shown, positions = (text_inputs[name] for name in ("inputs_embeds", "attention_mask", "position_ids"))
    new, use_cache = hidden.shape[1], options.get("use_cache")
    if shown is None:
        shown = positions.new_ones(len(hidden), (0 if cache is None else slots_in_use(cache)) + new)
    if text_model.training and is_checkpointing(text_model):
        use_cache = False  # as stock
    if cache is None and (text_model.config.use_cache if use_cache is None else use_cache):
        cache = DynamicCache(config=text_model.config)
    used = () if interaction is None else [kind for kinds in interaction.schedules for kind in kinds]
    check_inputs(text_model, shown, cache, used, options)
    interaction = None if interaction is None else interaction.of_rows(len(hidden))
    if interaction is not None and len(set(interaction.schedules)) > 1:
        return read_groups(text_model, hidden, shown, positions, cache, interaction, blocks)
    return read_group(text_model, hidden, shown, positions, cache, interaction, blocks)


def read_groups(text_model, hidden, shown, positions, cache, interaction: Interaction, blocks):
    """`read_layers` for samples of several schedules, which are read in groups; arguments as in `read_group`."""
    slots, groups, hidden_of, caches, places = shown.shape[1] - hidden.shape[1], interaction.groups(), [], [], []
    check_held(held_by(cache), joined_views([own.views for _, own in groups]), interaction.schedules)
    for rows, own in groups:
        part = None if cache is None else take_rows(cache, rows, own.views, shown[:, :slots], text_model.config)
        made, part = read_group(text_model, hidden[rows], shown[rows], positions[rows], part, own, blocks)
        hidden_of.append(made)
        caches.append(part)
        places.append(rows)
    order = torch.cat(places).argsort()
    if cache is not None:
        join_rows(cache, caches, order, shown.shape[1])
    return torch.cat(pad_left(hidden_of, -2))[order], cache


def read_group(text_model, hidden, shown, positions, cache, interaction: Interaction | None, blocks):
    """`read_layers` for samples of one schedule.

    Args:
        hidden, shown, positions: `inputs_embeds`, `attention_mask` and `position_ids` of the text model.
        interaction: that of these rows.
        blocks: as in `read_layers`.
    """
    new, held = hidden.shape[1], held_by(cache)
    views: list[Any] = interaction.views if interaction is not None else held.views if held is not None else []
    if interaction is not None:
        check_held(held, views, interaction.schedules)
    before = {view: (shown if held is None else held.mask(view, shown))[:, :-new] for view in set(views)}
    check_lengths(cache, held, before)
    kept, visual, gates = torch.ones_like(shown[:, -new:]).bool(), torch.zeros_like(shown[:, -new:]).bool(), None
    if interaction is not None:
        kept, visual = interaction.kept.to(hidden.device), interaction.visual.to(hidden.device)
        gates = interaction.gates
    neutral = torch.zeros_like(positions, dtype=hidden.dtype)
    stream = Stream(hidden, shown[:, -new:], positions, visual, neutral if gates is None else gates.to(hidden))
    seen = {} if held is None else {number: each.of_rows(len(hidden)) for number, each in held.seen.items()}
    reader = Reader(text_model, cache, gates is not None, {}, blocks, seen)
    pruned, after = False, dict(before)
    for view, group in groupby(range(len(views)), views.__getitem__):
        numbers = list(group)
        layers, kind = range(numbers[0], numbers[-1] + 1), "full"
        if interaction is not None:
            kind = view.kind if visual.any() else "full"
            if view.pruned and not pruned:
                stream, pruned = stream.take(kept)[0], True
        added = run_group(reader, kind, layers, stream, before[view], view)
        after[view] = torch.cat([before[view], *added], 1)
    if interaction is None:
        return text_model.norm(stream.hidden), cache
    if cache is not None:
        first = int(cache.get_seq_length())
        note(cache, Held(interaction.schedules, list(views), shown.shape[1], first, after, reader.seen))
    if not pruned and interaction.prune_layer == len(views):
        stream = stream.take(kept)[0]
    return text_model.norm(stream.hidden), cache
