"""Several turns on one cache: what a cache holds of a conversation from which only part was kept.

Such a cache has fewer slots than the conversation has positions, and whoever continues it counts positions. Sizes as
in `layout_qgsa`; L is the number of new positions.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .layered_cache_qgsa import slots_in_use
from .layout_qgsa import Markers, find_sequence, marker_sequences
from .outputs_qgsa import Prefill


VISUAL_NAMES = ("pixel_values", "pixel_attention_mask", "image_hidden_states", "lazy_tiles", "visual_token_scores")
NOTE = "qgsa_prompt"  # attribute of a cache: what was spliced into it has to travel with it, through copies too


def is_spliced(cache) -> bool:
    """Whether a selection is in `cache`, without asking for its length: a static cache keeps that on the device."""
    return cache is not None and NOTE in vars(cache)


@dataclass(frozen=True)
class Past:
    """The conversation behind a cache: up to its last selection as noted here, then one position in each slot.

    Args:
        held: `(B, S)` int64, the positions in the first S slots, -1 for padding.
        length: number of positions up to there, kept or not.
        following: `(B, 1)` int64, the position id that follows them.
        slots: number of slots in use, at least S.
    """

    held: torch.Tensor
    length: int
    following: torch.Tensor
    slots: int

    @classmethod
    def of(cls, cache, inputs: torch.Tensor | None) -> "Past":
        """What `cache` (None, too) holds for a batch with `inputs` `(B, ...)`.

        Raises ValueError if the cache belongs to another batch, or was cropped within a prompt spliced into it.
        """
        if cache is None or inputs is None:
            return cls(torch.zeros(1, 0).long(), 0, torch.zeros(1, 1).long(), 0)
        slots, rows, device = slots_in_use(cache), len(inputs), inputs.device
        if not slots:
            vars(cache).pop(NOTE, None)  # a cache that was reset starts anew
        nothing = torch.zeros(rows, 0, dtype=torch.long, device=device)
        held, length, following = vars(cache).get(NOTE, (nothing, 0, nothing.new_zeros(rows, 1)))
        if slots < held.shape[1]:
            raise ValueError(
                f"past_key_values holds {slots} positions, but a selection filled its first {held.shape[1]}: it "
                "cannot be cropped within them, start from an empty cache"
            )
        if rows % len(held):
            raise ValueError(f"past_key_values belongs to {len(held)} samples, but there are {rows} inputs")
        repeat = rows // len(held)  # beams, returned sequences
        held, following = (each.to(device).repeat_interleave(repeat, 0) for each in (held, following))
        return cls(held, length, following, slots)

    @property
    def seen(self) -> int:
        """Number of positions of the conversation that are behind, kept or not."""
        return self.length + self.slots - self.held.shape[1]

    @property
    def position_of_slot(self) -> torch.Tensor:
        """Position of the conversation in each slot, `(B, slots)` int64, -1 for padding."""
        later = torch.arange(self.length, self.seen, device=self.held.device)
        return torch.cat([self.held, later.expand(len(self.held), -1)], 1)

    def split_mask(self, mask: torch.Tensor | None, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention masks of the slots, `(B, slots)`, and of the `new` positions, `(B, L)`.

        Args:
            mask: `(B, seen + L)`, over the whole conversation; by default nothing is hidden.

        Raises ValueError, naming all numbers, for a mask of another shape.
        """
        shape = (len(self.held), self.seen + new)
        mask = self.held.new_ones(shape) if mask is None else mask
        if mask.shape != shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}: expected {shape[0]} x {shape[1]}, for {self.seen} "
                f"positions behind past_key_values and {new} new ones"
            )
        position = self.position_of_slot
        return mask.gather(1, position.clamp(min=0)) * (position >= 0), mask[:, self.seen :]

    def new_positions(self, shown: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Position ids of the new positions, `(B, L)` int64; arguments as `split_mask` returns them."""
        later = shown[:, self.held.shape[1] :].long().sum(1, keepdim=True)
        return (self.following + later + mask.long().cumsum(1) - 1).clamp(min=0)

    def continue_text(self, stock: dict[str, Any]) -> dict[str, Any]:
        """Stock inputs of new text with the `attention_mask` `(B, slots + L)` and `position_ids` that fit the cache.

        A mask that is by slot already, as in the loop of `generate`, or has four dimensions, is kept.
        """
        text = stock["inputs_embeds"] if stock["input_ids"] is None else stock["input_ids"]
        mask, positions, new = stock["attention_mask"], stock["position_ids"], text.shape[1]
        if not self.length or (mask is not None and mask.dim() > 2):
            return stock
        if mask is not None and mask.shape[1] == self.slots + new:
            shown, mask = mask[:, : self.slots], mask[:, self.slots :]
        else:
            shown, mask = self.split_mask(mask, new)
        positions = self.new_positions(shown, mask) if positions is None else positions
        return {**stock, "attention_mask": torch.cat([shown, mask], 1), "position_ids": positions}

    def note(self, cache, prefill: Prefill):
        """Note on `cache` (if it is not None) what a `prefill` spliced into it."""
        if cache is None:
            return
        kept, positions = prefill.held, prefill.text_inputs["position_ids"]
        kept = torch.where(kept < 0, -1, kept + self.seen)
        held = torch.cat([self.position_of_slot.to(kept.device).expand(len(kept), -1), kept], 1)
        setattr(cache, NOTE, (held, self.seen + prefill.length, positions[:, -1:] + 1))


# The whole conversation, with all of its images, to the part that is new


def drop_seen(inputs: dict[str, Any], past: Past, markers: Markers) -> dict[str, Any]:
    """The part of a conversation that is not behind the cache yet, as arguments of `forward`.

    Args:
        inputs: arguments of `generate`. As in stock, `input_ids` hold the whole conversation, or, if `attention_mask`
            is longer, only what is new; images are those of the same positions, or only the new ones.

    Raises ValueError, naming both numbers, if nothing is new, if rows have different numbers of seen tiles, or for
    `inputs_embeds` of a conversation from which only part was kept.
    """
    if inputs.get("inputs_embeds") is not None:
        if past.length:
            raise ValueError(
                f"inputs_embeds: past_key_values stands for {past.seen} positions in {past.slots} slots, which only "
                "input_ids can continue"
            )
        return dict(inputs)
    ids, mask, seen = inputs["input_ids"], inputs.get("attention_mask"), past.seen
    if mask is not None and mask.shape[1] == seen + ids.shape[1]:
        return dict(inputs)
    if ids.shape[1] <= seen:
        raise ValueError(
            f"input_ids holds {ids.shape[1]} positions, but {seen} are behind past_key_values already: pass the whole "
            "conversation, or its new part with an attention_mask over the whole"
        )
    cut = {name: inputs[name][:, seen:] for name in ("input_ids", "position_ids") if inputs.get(name) is not None}
    question = inputs.get("question_mask")
    if question is not None and question.shape[1] == ids.shape[1]:
        cut["question_mask"] = question[:, seen:]
    return {**inputs, **cut, **_drop_seen_tiles(inputs, ids, seen, markers)}


def _drop_seen_tiles(inputs, ids: torch.Tensor, seen: int, markers: Markers) -> dict[str, Any]:
    """The visual inputs among `inputs` without those of the first `seen` positions of `ids`, `(B, positions)`."""
    visual: dict[str, Any] = {name: inputs.get(name) for name in VISUAL_NAMES}
    pixels, features, lazy = (visual[name] for name in ("pixel_values", "image_hidden_states", "lazy_tiles"))
    if pixels is None and features is None:
        return visual
    behind = torch.arange(ids.shape[1], device=ids.device) < seen
    tiles, images = (
        torch.stack([(each & behind).sum(1), (each & ~behind).sum(1)])
        for each in (ids == markers.image_token_id, find_sequence(ids, marker_sequences(markers)[0]))
    )
    tiles = tiles // markers.tokens_per_tile
    old, new = tiles
    if not new.any():
        return dict.fromkeys(VISUAL_NAMES)
    if lazy is not None:
        given = sum(lazy.counts)
    else:
        given = len(features) if features is not None else int(pixels.flatten(2).any(-1).sum())
    if given != int(tiles.sum()) or not old.any():
        return visual  # of the new images alone, or not fitting: the request checks that
    if (tiles[0] != tiles[0, 0]).any() or (images[0] != images[0, 0]).any():
        raise ValueError(
            f"the samples have {old.min()} to {old.max()} tiles behind past_key_values: pass the new images alone"
        )
    first = int(old[0])
    if features is not None:
        ordinal = torch.cat([torch.arange(count) for count in tiles.sum(0).tolist()])
        visual["image_hidden_states"] = features[(ordinal >= first).to(features.device)]
    if lazy is not None:
        visual["lazy_tiles"] = lazy.without_first(first)
    for name in ("pixel_values", "pixel_attention_mask"):
        if visual[name] is not None:
            visual[name] = visual[name][:, int(images[0, 0]) if lazy is not None else first :]
    scores = visual["visual_token_scores"]
    if scores is not None:
        visual["visual_token_scores"] = scores[:, first * markers.tokens_per_tile :]
    return visual
