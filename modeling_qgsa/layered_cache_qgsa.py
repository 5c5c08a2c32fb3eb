"""Caches whose layers differ in what they hold: what is noted on them, and how they are split and joined by rows.

Sizes as in `layout_qgsa`.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import DynamicCache


NOTE = "qgsa_layers"  # attribute of a cache: what its layers hold has to travel with it, through copies too


class View(NamedTuple):
    """What a layer sees: its kind, and whether the positions are pruned."""

    kind: str
    pruned: bool


class Seen(NamedTuple):
    """What a block, see `crossing_qgsa`, made of the visual tokens so far; it grows by new images alone.

    Args:
        keys, values: `(B, heads, n, head_dim)`.
        shown: `(B, n)`, attention mask.
    """

    keys: torch.Tensor
    values: torch.Tensor
    shown: torch.Tensor

    def of_rows(self, rows: int) -> "Seen":
        """The same for `rows` rows, several of a sample if beams are searched."""
        repeat = rows // len(self.shown)
        return self if repeat == 1 else Seen(*(each.repeat_interleave(repeat, 0) for each in self))

    def take(self, rows: torch.Tensor) -> "Seen":
        """Some rows, `(n,)` int64, without the tokens that all of them hide."""
        used = self.shown[rows].any(0)
        return Seen(self.keys[rows][:, :, used], self.values[rows][:, :, used], self.shown[rows][:, used])


class Held(NamedTuple):
    """What is noted on a cache whose layers do not all hold every position.

    Args:
        schedules: of every sample, the kinds of all layers.
        views: of every layer, its [`View`]; where samples differ, a tuple of those of their schedules.
        slots: number of positions, kept or not, that the attention mask counts up to here.
        first: number of slots in use in the first layer.
        shown: by view, the attention mask of the slots in use, `(B, slots of the view)`.
        seen: by layer, what its block made of visual tokens, which the slots of that layer do not hold.
    """

    schedules: tuple[tuple[str, ...], ...]
    views: list[Hashable]
    slots: int
    first: int
    shown: dict[Hashable, torch.Tensor]
    seen: dict[int, Seen]

    def mask(self, view: Hashable, attention_mask: torch.Tensor) -> torch.Tensor:
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


def note(cache, held: Held):
    """Note on `cache` what its layers hold."""
    setattr(cache, NOTE, held)


def check_held(held: Held | None, views: list[Hashable], schedules: Sequence[tuple[str, ...]]):
    """Raise ValueError if a cache was filled with other views or schedules than those of a prompt."""
    if held is not None and (held.views != views or held.schedules != tuple(schedules)):
        raise ValueError("vision_layers or prune_layer: past_key_values was filled with others")


def check_lengths(cache, held: Held | None, before: dict[Hashable, torch.Tensor]):
    """Raise ValueError if a layer of `cache` does not hold what is noted on it, because it was cropped."""
    for number, view in enumerate([] if held is None else held.views):
        length, expected = int(cache.get_seq_length(number)), before[view].shape[1]
        if length != expected:
            raise ValueError(f"past_key_values holds {length} slots of layer {number}, not {expected}: it was cropped")


def pad_left(tensors: Sequence[torch.Tensor], dim: int) -> list[torch.Tensor]:
    """Tensors of the same length along `dim` (negative), with zeros in front."""
    longest = max(each.shape[dim] for each in tensors)
    return [pad(each, (0, 0) * (-1 - dim) + (longest - each.shape[dim], 0)) for each in tensors]


def take_rows(cache, rows: torch.Tensor, views: list[View], attention_mask: torch.Tensor, config) -> DynamicCache:
    """A new cache of some rows of `cache`, without the slots that all of them hide.

    Args:
        cache: None or an empty one gives an empty one.
        rows: `(n,)` int64.
        views: of all layers, as these rows have them.
        attention_mask: `(B, slots)`, of all rows and of all positions in the cache.
        config: of the text model.
    """
    part, held = DynamicCache(config=config), held_by(cache)
    if cache is None or not cache.get_seq_length():
        return part
    shown: dict[Hashable, torch.Tensor] = {}
    for number, (layer, view) in enumerate(zip(cache.layers, views)):
        mask = attention_mask if held is None else held.mask(held.views[number], attention_mask)
        used = mask[rows].any(0) if held is not None else torch.ones_like(mask[0], dtype=torch.bool)
        part.update(layer.keys[rows][:, :, used], layer.values[rows][:, :, used], number)
        shown[view] = mask[rows][:, used]
    if held is not None:
        schedules = tuple(held.schedules[row] for row in rows.tolist())
        seen = {number: each.of_rows(len(attention_mask)).take(rows) for number, each in held.seen.items()}
        seen = {number: each for number, each in seen.items() if each.shown.shape[1]}
        note(part, Held(schedules, list(views), attention_mask.shape[1], int(part.get_seq_length()), shown, seen))
    return part


def joined_views(views: Sequence[Sequence[Hashable]]) -> list[Hashable]:
    """The views of every layer where several groups of samples have their own, given those of each group."""
    return [tuple(each) for each in zip(*views)]


def join_seen(parts: Sequence[Held], order: torch.Tensor) -> dict[int, Seen]:
    """What blocks made of the visual tokens of all `parts`, with hidden tokens in front; `order` as in `join_rows`."""
    joined = {}
    for number in sorted({number for part in parts for number in part.seen}):
        known = [part.seen.get(number) for part in parts]
        some = next(each for each in known if each is not None)
        none = Seen(some.keys[:1, :, :0], some.values[:1, :, :0], some.shown[:1, :0])
        each_part = [none.of_rows(len(part.schedules)) if each is None else each for part, each in zip(parts, known)]
        fields = zip((-2, -2, -1), zip(*each_part))
        joined[number] = Seen(*(torch.cat(pad_left(tensors, dim))[order] for dim, tensors in fields))
    return joined


def join_rows(cache, parts: Sequence[DynamicCache], order: torch.Tensor, slots: int):
    """Fill `cache` with the rows of several caches, with hidden slots in front of shorter ones.

    Args:
        cache: is overwritten.
        order: `(B,)` int64, the place of every row among those of all `parts`.
        slots: number of positions that the attention mask counts.
    """
    held = [part_held for part_held in map(held_by, parts) if part_held is not None]
    views = joined_views([each.views for each in held])
    shown = {}
    for number, view in enumerate(views):
        layers: list[Any] = [part.layers[number] for part in parts]
        keys = torch.cat(pad_left([layer.keys for layer in layers], -2))[order]
        values = torch.cat(pad_left([layer.values for layer in layers], -2))[order]
        if number < len(cache.layers) and cache.layers[number].get_seq_length():
            cache.layers[number].keys, cache.layers[number].values = keys, values
        else:
            cache.update(keys, values, number)
        masks = pad_left([each.shown[each.views[number]] for each in held], -1)
        shown[view] = torch.cat(masks)[order]
    schedules = [kinds for each in held for kinds in each.schedules]
    ordered = tuple(schedules[place] for place in order.tolist())
    note(cache, Held(ordered, views, slots, int(cache.get_seq_length()), shown, join_seen(held, order)))
