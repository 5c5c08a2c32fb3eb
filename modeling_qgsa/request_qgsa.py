"""The inputs of one call: prompt, visual inputs and budget, checked. Sizes as in `layout_qgsa`."""

import hashlib
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from transformers.utils import TransformersKwargs

from .cache_qgsa import Past
from .compat_qgsa import encoded_images, tile_features
from .configuration_qgsa import Budget, LimitKwargs, QGSAConfig, choose_pointer, choose_positions
from .count_qgsa import ExactCount
from .interaction_qgsa import check_prune_layer
from .layered_cache_qgsa import held_by
from .layout_qgsa import VisualLayout
from .prompt_qgsa import Prompt, check_shape, read_question
from .schedule_qgsa import schedule_of


class BaseModelKwargs(LimitKwargs, total=False):
    """Keyword arguments of `forward` that the base model does not name itself."""

    labels: torch.Tensor | None
    question_mask: torch.Tensor | None
    visual_token_scores: torch.Tensor | None
    complexity: torch.Tensor | None
    image_hidden_states: torch.Tensor | None
    mm_encoder_outputs: Any
    lazy_tiles: Any
    visual_cache: Any
    gumbel_temperature: float | None
    pointer: str | None
    positions: str | None
    prune_layer: int | None
    selection: str | None
    vision_budget: float | str | list[str] | None


class ForwardKwargs(TransformersKwargs, LimitKwargs, total=False):
    """Keyword arguments of `forward` that the model with a language head does not name itself."""

    positions: str | None
    shift_labels: torch.Tensor | None


class RequestKwargs(BaseModelKwargs, total=False):
    """All fields of a request."""

    input_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    inputs_embeds: torch.Tensor | None
    pixel_values: torch.Tensor | None
    pixel_attention_mask: torch.Tensor | None


REQUEST_NAMES = list(RequestKwargs.__annotations__)
BUDGET_NAMES = [each.name for each in fields(Budget)]
# The ones that the stock model takes too; all others need a selection.
STOCK_NAMES = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "pixel_values", "pixel_attention_mask")


@dataclass(frozen=True)
class VisualInputs:
    """Visual inputs of a batch: the pixels of all tiles, their features if they are known, or lazy tiles.

    Args:
        pixel_values: `(B, tiles, 3, H, W)`; with `lazy_tiles` only the global views, `(B, images, 3, H, W)`.
        pixel_attention_mask: `(B, tiles, H, W)`; None with `lazy_tiles`, whose tiles are full.
        features: `(T, P, D)`.
        lazy_tiles: cuts tiles on demand, see [`LazyTiles`].
        cache: a [`VisualCache`] in which features are looked up first.
    """

    pixel_values: torch.Tensor | None
    pixel_attention_mask: torch.Tensor | None = None
    features: torch.Tensor | None = None
    lazy_tiles: Any = None
    cache: Any = None

    @property
    def missing(self) -> bool:
        return self.pixel_values is None and self.features is None

    def check_dense(self):
        """Raise ValueError if an argument is given that "dense", the stock model, cannot take."""
        for name, given in (
            ("image_hidden_states", self.features),
            ("lazy_tiles", self.lazy_tiles),
            ("visual_cache", self.cache),
        ):
            if given is not None:
                raise ValueError(
                    f'{name}: not available with selection="dense", which encodes pixel_values of all tiles'
                )

    def with_encoded(self, mm_encoder_outputs: Any, tokens_per_tile: int) -> "VisualInputs":
        """These inputs with `features` from `mm_encoder_outputs`, which stock's `generate` makes of the pixels.

        Raises ValueError if features or pixels are given besides.
        """
        if not self.missing:
            raise ValueError("mm_encoder_outputs hold the features of all tiles: give no pixel_values with them")
        features = tile_features(encoded_images(mm_encoder_outputs)).flatten(0, -2)
        return replace(self, features=features.unflatten(0, (-1, tokens_per_tile)))

    def pixels(self, layout: VisualLayout, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pixels `(n, 3, H, W)` and mask (`(n, H, W)` or None) of the tiles chosen by `tiles`, `(T,)` bool."""
        assert self.pixel_values is not None
        samples, ordinals = layout.tile_sample[tiles], layout.tile_ordinal[tiles]
        if self.lazy_tiles is None:
            mask = self.pixel_attention_mask
            return self.pixel_values[samples, ordinals], None if mask is None else mask[samples, ordinals]
        if (tiles <= layout.is_global).all():
            first = torch.searchsorted(layout.image_sample, layout.image_sample)
            number = torch.arange(len(first), device=first.device) - first
            return self.pixel_values[samples, number[layout.tile_image[tiles]]], None
        pixels = self.lazy_tiles.cut(samples.tolist(), ordinals.tolist())
        return pixels.to(self.pixel_values.device, self.pixel_values.dtype), None

    def key(self, layout: VisualLayout, tile: int) -> tuple:
        """Identity of a tile: the digest of its pixels, or of its image together with its place."""
        assert self.pixel_values is not None
        sample, ordinal = int(layout.tile_sample[tile]), int(layout.tile_ordinal[tile])
        if self.lazy_tiles is not None:
            return self.pixel_values.dtype, *self.lazy_tiles.key(sample, ordinal)
        given = [self.pixel_values, self.pixel_attention_mask]
        parts = [part[sample, ordinal].cpu().contiguous() for part in given if part is not None]
        return tuple(hashlib.sha256(part.view(torch.uint8).numpy().data).hexdigest() for part in parts)

    def check(self, layout: VisualLayout, tile_size: int):
        """Raise ValueError unless these are exactly the tiles of the layout, with finite pixels.

        All-zero tiles are padding, as in the stock model. Raises TypeError for an argument of the wrong type.

        Args:
            tile_size: pixels along each side of a tile.
        """
        _check_class("visual_cache", self.cache, "VisualCache")
        _check_class("lazy_tiles", self.lazy_tiles, "LazyTiles")
        if self.features is not None:
            check_shape("image_hidden_states", self.features, (None, None, None), floating=True)
            if self.features.shape[:2] != (len(layout.tile_row), layout.tokens_per_tile):
                raise ValueError(
                    f"image_hidden_states has shape {tuple(self.features.shape)}: the prompts have placeholders for "
                    f"{len(layout.tile_row)} tiles of {layout.tokens_per_tile} visual tokens"
                )
            return
        self._check_pixels(layout, tile_size)
        if self.lazy_tiles is not None:
            self._check_lazy_tiles(layout)
        elif self.pixel_attention_mask is not None:
            assert self.pixel_values is not None
            shape = (*self.pixel_values.shape[:2], tile_size, tile_size)
            check_shape("pixel_attention_mask", self.pixel_attention_mask, shape)

    def _check_pixels(self, layout: VisualLayout, tile_size: int):
        samples = layout.tile_of_position.shape[0]
        check_shape("pixel_values", self.pixel_values, (samples, None, 3, tile_size, tile_size), floating=True)
        assert self.pixel_values is not None
        size = self.pixel_values.abs().flatten(2).sum(-1, dtype=torch.float32)
        for sample in (~size.isfinite().all(1)).nonzero()[:1, 0].tolist():
            raise ValueError(f"sample {sample}: pixel_values holds NaN or infinite values")
        held, owner = ("tiles", layout.tile_sample)
        if self.lazy_tiles is not None:
            held, owner = ("global views", layout.image_sample)
        expected = torch.bincount(owner, minlength=samples)
        for sample in ((size != 0).sum(1) != expected).nonzero()[:1, 0].tolist():
            raise ValueError(
                f"sample {sample}: the prompt has placeholders for {expected[sample]} {held}, but pixel_values holds "
                f"{int((size[sample] != 0).sum())}"
            )

    def _check_lazy_tiles(self, layout: VisualLayout):
        counts, expected = self.lazy_tiles.counts, layout.tiles_per_sample.tolist()
        if len(counts) != len(expected):
            raise ValueError(f"lazy_tiles holds tiles of {len(counts)} samples, but there are {len(expected)} prompts")
        for sample, (count, tiles) in enumerate(zip(counts, expected)):
            if count != tiles:
                raise ValueError(
                    f"sample {sample}: the prompt has placeholders for {tiles} tiles, but lazy_tiles holds {count}"
                )


def _check_class(name: str, given: Any, expected: str):
    """Raise TypeError unless `given` has a class of this name: the code of a checkpoint is a copy of this code."""
    names = [each.__name__ for each in type(given).__mro__]
    if given is not None and expected not in names:
        raise TypeError(f"{name} ({names[0]}) must be a {expected}")


def check_complexity(complexity: torch.Tensor | None, images: int):
    """Raise ValueError unless `complexity` is None, or holds a number in 0 .. 1 for each image."""
    if complexity is None:
        return
    check_shape("complexity", complexity, (images,), floating=True)
    if not ((complexity >= 0) & (complexity <= 1)).all():
        raise ValueError(f"complexity ranges from {complexity.min()} to {complexity.max()}: it must be in 0 .. 1")


def schedules_of(config: QGSAConfig, vision_budget, cache) -> tuple[tuple[str, ...], ...]:
    """[`Request`]'s `schedules`; those that are left open are the ones of the conversation in the `cache`, if any."""
    one, held = schedule_of(config, vision_budget), held_by(cache)
    if one is not None:
        return (one,)
    return () if held is None else held.schedules


@dataclass(frozen=True)
class Request:
    """The inputs of one call.

    Args:
        budget: the configured budget with the overrides of this call.
        pointer: the configured pointer, or that of this call.
        positions: the configured position ids of what is kept, or those of this call.
        stock: inputs that the stock model takes, as given.
        visual: visual inputs.
        token_scores: `(B, N)`, scores of all visual tokens that replace the pointer's.
        complexity: `(I,)`, how much of the budget each image needs, in place of the pointer's estimate.
        prune_layer: the number of layers of the text model that see all that was looked at; None for 0.
        schedules: how vision takes part in each layer of the text model, see `interaction_qgsa`: of every sample, or
            one for all; empty if they are still to be chosen among `config.vision_schedules`.
        gumbel_temperature: temperature of the relaxed selection in training.
        prompt: the text side, checked; None, like the next two, if nothing is selected.
        layout: places of the visual tokens in the prompt.
        count: the positions that each image takes; None if their number depends on the question.
        question_mask: `(I, L)` bool, the question about each image.
        answer_position: `(I,)` int64, the position that predicts the first token of its answer.
        past: the conversation before this prompt.
        shown: `(B, slots)`, attention mask of what the cache holds of the conversation before this prompt.
    """

    budget: Budget
    pointer: str
    positions: str
    stock: dict[str, Any]
    visual: VisualInputs
    token_scores: torch.Tensor | None
    complexity: torch.Tensor | None
    prune_layer: int | None
    schedules: tuple[tuple[str, ...], ...]
    gumbel_temperature: float
    prompt: Prompt | None = None
    layout: VisualLayout | None = None
    count: ExactCount | None = None
    question_mask: torch.Tensor | None = None
    answer_position: torch.Tensor | None = None
    past: Past = field(default_factory=partial(Past.of, None, None))
    shown: torch.Tensor | None = None

    @classmethod
    def take(cls, config: QGSAConfig, kwargs: dict[str, Any], cache=None) -> "Request":
        """Take the fields of [`RequestKwargs`] out of `kwargs`; the rest is for the text model or for `generate`.

        With a selection this is step 1: the layout is read, and everything is checked against it. With a `cache` that
        is in use, the prompt is the new part of a conversation, and its `attention_mask` covers all of it.

        Raises ValueError if the budget is out of range, the inputs do not fit together, an argument
        is given that "dense" cannot take, or one that cannot be selected from; TypeError for an argument of
        the wrong type.
        """
        given = {name: kwargs.pop(name, None) for name in REQUEST_NAMES}
        outputs = given["mm_encoder_outputs"]
        encoded = {} if outputs is None or not len(outputs) else {"mm_encoder_outputs": outputs}  # {}: from `generate`
        budget = Budget.of(config, given["max_image_tokens"], **{name: given[name] for name in BUDGET_NAMES})
        check_prune_layer(given["prune_layer"], config.text_config.num_hidden_layers)
        visual = VisualInputs(
            given["pixel_values"],
            given["pixel_attention_mask"],
            given["image_hidden_states"],
            given["lazy_tiles"],
            given["visual_cache"],
        )
        if budget.selection == "dense":
            visual.check_dense()
            for name in ("prune_layer", "vision_budget", "positions", "positions_per_image"):
                if given[name] is not None:
                    raise ValueError(f'{name} ({given[name]}): not available with selection="dense", the stock model')
        elif encoded:
            visual = visual.with_encoded(**encoded, tokens_per_tile=config.tokens_per_tile)
        temperature = given["gumbel_temperature"]
        request = cls(
            budget=budget,
            pointer=choose_pointer(config.pointer, given["pointer"]),
            positions=choose_positions(config.positions, given["positions"]),
            stock={name: given[name] for name in STOCK_NAMES} | encoded,
            visual=visual,
            token_scores=given["visual_token_scores"],
            complexity=given["complexity"],
            prune_layer=given["prune_layer"],
            schedules=schedules_of(config, given["vision_budget"], cache),
            gumbel_temperature=config.gumbel_temperature if temperature is None else temperature,
        )
        if budget.selection == "dense" or visual.missing:
            return request
        if given["inputs_embeds"] is not None:
            raise ValueError(
                f"inputs_embeds with images: {budget.selection!r} reads the layout and the question from input_ids; "
                'give those instead, or selection="dense"'
            )
        shown, mask, positions = None, given["attention_mask"], given["position_ids"]
        check_shape("input_ids", given["input_ids"], (None, None), floating=False)
        past = Past.of(cache, given["input_ids"])
        if past.slots:
            shown, mask = past.split_mask(mask, given["input_ids"].shape[1])
            positions = past.new_positions(shown, mask) if positions is None else positions
        prompt = Prompt.of(given["input_ids"], mask, positions, given["labels"])
        prompt.check(config.text_config.vocab_size)
        layout = VisualLayout.of(config, prompt.input_ids)
        visual.check(layout, config.vision_config.image_size)
        check_complexity(given["complexity"], len(layout.grids))
        question, answer = read_question(config, prompt, layout, given["question_mask"])
        return replace(
            request,
            prompt=prompt,
            layout=layout,
            count=ExactCount.of(budget, layout, config.keep_tile_markers),
            question_mask=question,
            answer_position=answer,
            past=past,
            shown=shown,
        )

    @property
    def selects(self) -> bool:
        """Whether there is something to select: otherwise the stock model takes the inputs as they are."""
        return self.prompt is not None

    @property
    def points(self) -> bool:
        """Whether the pointer is needed: not if scores are given, and how much of the budget they may use is known.

        Nor if everything is kept.
        """
        known = self.complexity is not None or self.budget.is_fixed
        return (self.token_scores is None or not known) and not self.keeps_everything

    @property
    def trains_pointer(self) -> bool:
        """Whether a call in training teaches the pointer, through the relaxed selection."""
        return self.token_scores is None and self.pointer == "selector"

    @property
    def keeps_everything(self) -> bool:
        """Whether every question gets all tiles, encoded as a whole, and all of their tokens."""
        assert self.layout is not None
        tiles = int(self.layout.grids.prod(1).max())
        every_tile = self.budget.selection == "after_encoder" or self.budget.min_tiles >= tiles
        whole = self.budget.selection != "blocks"
        if self.count is not None:
            return whole and self.count.is_whole
        return whole and every_tile and self.budget.min_visual_tokens >= (1 + tiles) * self.layout.tokens_per_tile

    @property
    def shows_images(self) -> bool:
        """Whether the inputs of the stock model hold images, encoded or not."""
        return self.stock["pixel_values"] is not None or "mm_encoder_outputs" in self.stock

    def check_selects(self):
        """Raise ValueError if there is nothing to select."""
        if self.budget.selection == "dense":
            raise ValueError('selection ("dense") keeps everything: choose another variant to select')
        if not self.selects:
            raise ValueError("pixel_values is missing: there is nothing to select from")
