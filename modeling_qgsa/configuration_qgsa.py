"""Configuration of QGSA-SmolVLM: that of SmolVLM, plus how the question selects the visual tokens."""

from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any, TypedDict

import torch

from .compat_qgsa import SmolVLMConfig, strict_config
from .schedule_qgsa import VISION_CROSSES, check_kinds, parse_schedule, vision_share


__version__ = "0.2.0"

MAX_BUDGET = 2**31 - 1  # effectively "keep everything"
MARKERS = (  # fields with the ids of tokens by which images and turns are found
    "image_token_id",
    "global_image_token_id",
    "end_of_utterance_token_id",
    "assistant_token_ids",
    "user_token_ids",
    "tile_token_ids",
)
SELECTIONS = ("before_encoder", "after_encoder", "blocks", "dense")
POINTERS = ("attention", "selector")
POSITIONS = ("original", "compact")

# Everything the Auto classes need to load a checkpoint with `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_qgsa.QGSAConfig",
    "AutoModel": "modeling_qgsa.QGSASmolVLMModel",
    "AutoModelForImageTextToText": "modeling_qgsa.QGSASmolVLMForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_qgsa.QGSASmolVLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_qgsa.QGSASmolVLMForConditionalGeneration",
    "AutoProcessor": "processing_qgsa.QGSAProcessor",
}


class LimitKwargs(TypedDict, total=False):
    """The limits of a [`Budget`] as keyword arguments of one call; None keeps the configured value."""

    max_image_tokens: int | None
    min_visual_tokens: int | None
    max_visual_tokens: int | None
    min_tiles: int | None
    max_tiles: int | None
    positions_per_image: int | None


@dataclass(frozen=True)
class Budget:
    """The selection variant, and how many visual tokens and high-resolution tiles it may use per image.

    `positions_per_image` replaces the limits of visual tokens by an exact count of positions, see `count_qgsa`.
    """

    selection: str = "before_encoder"
    min_visual_tokens: int = 16
    max_visual_tokens: int = 128
    min_tiles: int = 0
    max_tiles: int = 4
    positions_per_image: int | None = None

    @classmethod
    def of(cls, config, max_image_tokens: int | None = None, **overrides: Any) -> "Budget":
        """The budget of `config` with the overrides of one call; None keeps the configured value.

        Args:
            max_image_tokens: most visual tokens per image; sets the limits that are not overridden, see `limited_to`.

        A call that limits visual tokens has no exact count, whatever is configured.

        Raises ValueError if the result is out of range, both are given, or the exact count is larger than the
        configured one; TypeError for an unknown field.
        """
        budget = cls(**{each.name: getattr(config, each.name) for each in fields(cls)})
        given = {name: value for name, value in overrides.items() if value is not None}
        limits = {"max_image_tokens": max_image_tokens} | given
        for name in ("max_image_tokens", "min_visual_tokens", "max_visual_tokens"):
            if limits.get(name) is None:
                continue
            if "positions_per_image" in given:
                raise ValueError(f"positions_per_image ({given['positions_per_image']}): {name} must not be given too")
            budget = replace(budget, positions_per_image=None)
        if max_image_tokens is not None:
            budget = budget.limited_to(max_image_tokens, config.tokens_per_tile, given)
        budget = replace(budget, **given)
        budget.check()
        count, configured = budget.positions_per_image, config.positions_per_image
        if configured is not None and count is not None and count > configured:
            raise ValueError(
                f"positions_per_image ({count}): this checkpoint is configured for at most {configured}; give fewer, "
                "or change the configuration"
            )
        return budget

    def limited_to(self, max_image_tokens: int, tokens_per_tile: int, given: dict[str, Any]) -> "Budget":
        """This budget with at most `max_image_tokens` visual tokens, and tiles in proportion to them.

        There are at least as many tiles as can deliver so many tokens together with the global view. A number that is
        the budget's own changes nothing, and a higher one raises it. Minima are lowered where they exceed the new
        maxima. An image that nothing is asked about is kept whole all the same.

        Args:
            given: fields that one call sets besides.

        Raises ValueError if the number is out of range, or contradicts what is given.
        """
        number = max_image_tokens
        if isinstance(number, bool) or not isinstance(number, Integral) or not 1 <= number <= MAX_BUDGET:
            raise ValueError(f"max_image_tokens ({number!r}) must be an integer of 1 to {MAX_BUDGET}")
        if given.get("selection", self.selection) == "dense":
            raise ValueError(f'max_image_tokens ({number}): not available with selection "dense", which keeps all')
        fill, proportion = -(-number // tokens_per_tile) - 1, -(-number * self.max_tiles // self.max_visual_tokens)
        tiles = min(max(fill, proportion), MAX_BUDGET)
        for name, most in {"max_visual_tokens": number, "min_visual_tokens": number, "min_tiles": tiles}.items():
            value = given.get(name)
            if isinstance(value, Integral) and (value > most or name == "max_visual_tokens"):
                raise ValueError(
                    f"max_image_tokens ({number}, at most {tiles} tiles) contradicts {name} ({value}): give one of "
                    "them"
                )
        return replace(
            self,
            min_visual_tokens=min(self.min_visual_tokens, number),
            max_visual_tokens=number,
            min_tiles=min(self.min_tiles, tiles),
            max_tiles=tiles,
        )

    def check(self):
        """Raise ValueError, naming the field and both numbers, if the budget is out of range."""
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection ({self.selection!r}): choose from {', '.join(SELECTIONS)}")
        for name, low, high, least in (
            ("visual_tokens", self.min_visual_tokens, self.max_visual_tokens, 1),
            ("tiles", self.min_tiles, self.max_tiles, 0),
        ):
            for end, number in (("min", low), ("max", high)):
                if isinstance(number, bool) or not isinstance(number, Integral) or number > MAX_BUDGET:
                    raise ValueError(f"{end}_{name} ({number!r}) must be an integer of at most {MAX_BUDGET}")
            if low < least:
                raise ValueError(f"min_{name} ({low}) must be at least {least}")
            if low > high:
                raise ValueError(f"min_{name} ({low}) must not exceed max_{name} ({high})")
        count = self.positions_per_image
        if count is not None and (isinstance(count, bool) or not isinstance(count, Integral) or count < 1):
            raise ValueError(f"positions_per_image ({count!r}) must be an integer of at least 1")

    @property
    def is_fixed(self) -> bool:
        """Whether it is the same for every question."""
        same_tiles = self.selection == "after_encoder" or self.min_tiles == self.max_tiles
        same_tokens = self.positions_per_image is not None or self.min_visual_tokens == self.max_visual_tokens
        return same_tokens and same_tiles

    def resolve(
        self, complexity: torch.Tensor, asked: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(m, k) per image, `(I,)` int64 each, from its complexity, `(I,)` in 0 .. 1.

        Args:
            asked: `(I,)` bool; images that nothing is asked about keep everything.
        """
        asked = torch.ones_like(complexity, dtype=torch.bool) if asked is None else asked
        m = self.min_tiles + complexity * (self.max_tiles - self.min_tiles)
        k = self.min_visual_tokens + complexity * (self.max_visual_tokens - self.min_visual_tokens)
        return m.round().long().where(asked, MAX_BUDGET), k.round().long().where(asked, MAX_BUDGET)


def flat(ids: int | list) -> list[int]:
    """All ids of a marker field: of one token, of a list, or of a list of lists."""
    return [ids] if not isinstance(ids, list) else [number for each in ids for number in flat(each)]


def choose_pointer(configured: str, override: str | None = None) -> str:
    """The pointer of one call: the configured one, or its `override`. Raises ValueError for an unknown one."""
    pointer = configured if override is None else override
    if pointer not in POINTERS:
        raise ValueError(f"pointer ({pointer!r}): choose from {', '.join(POINTERS)}")
    return pointer


def choose_positions(configured: str, override: str | None = None) -> str:
    """The position ids of one call: the configured ones, or their `override`. Raises ValueError for unknown ones."""
    positions = configured if override is None else override
    if positions not in POSITIONS:
        raise ValueError(f"positions ({positions!r}): choose from {', '.join(POSITIONS)}")
    return positions


@strict_config
class QGSAConfig(SmolVLMConfig):
    r"""
    Configuration of [`QGSASmolVLMForConditionalGeneration`]: that of SmolVLM, the selection and its budgets, the size
    of the selector, and the ids of the marker tokens from which the layout of the images is read.

    All budgets are per image. Inference interpolates between the minimum (complexity 0) and the maximum (complexity 1)
    by the complexity estimated from the question and the glance.

    Args:
        selection (`str`, defaults to `"before_encoder"`):
            `"before_encoder"` encodes only the most relevant tiles, then keeps the best visual tokens;
            `"after_encoder"` encodes every tile, then keeps the best visual tokens (QGSA as published);
            `"blocks"` encodes only the most relevant blocks of patches within the most relevant tiles, one block per
            visual token and at most as many as tokens may be kept, then keeps the best visual tokens;
            `"dense"` is the stock model, bit for bit.
        min_visual_tokens (`int`, defaults to 16): fewest visual tokens kept, from the glance and the tiles together.
        max_visual_tokens (`int`, defaults to 128): most visual tokens kept.
        min_tiles (`int`, defaults to 0): fewest high-resolution tiles encoded, in addition to the global view.
        max_tiles (`int`, defaults to 4): most high-resolution tiles encoded.
        positions_per_image (`int`, *optional*): the exact number of positions that each image takes in the prompt of
            the text model, visual tokens and markers together, in place of the limits of visual tokens; fewer only if
            the global view and `max_tiles` tiles hold fewer. For engines that reserve the positions of an image before
            it is encoded. A call may ask for fewer, not for more. The relaxed selection of training has no such count.
        positions (`str`, defaults to `"original"`): position ids of what is kept: `"original"` are those of the whole
            prompt, `"compact"` are consecutive, as an engine numbers a prompt.
        pointer (`str`, defaults to `"selector"`): what tells relevant places from others. `"attention"` is the text
            model's own attention to the glance and needs no training, `"selector"` is the trained selector.
            `from_dense` sets `"attention"`.
        attention_weights (`list[list[float]]`, *optional*): weights of the attention maps of the text model's first
            layers, `layers x 2`: of the question's words, and of the position that predicts the answer. `calibrate`
            fits them; by default the layers of the first three quarters count alike.
        attention_temperature (`float`, defaults to 1.0): temperature of the softmax over the cells of the glance that
            turns the attention's scores into relevance.
        attention_nowhere (`float`, *optional*): score of looking nowhere besides those of the cells, for questions
            about nothing that is visible; `calibrate` finds a value where it helps.
        attention_coverage (`float`, defaults to 1.0): share of that relevance that the encoded tiles should cover,
            within the budget; 1 always uses the whole budget. `calibrate` finds a value.
        keep_tile_markers (`bool`, defaults to `False`): whether the markers of tiles that were not looked at stay in
            the prompt. A text model that was not trained with a selection needs them to tell places; `from_dense` sets
            it for the attention.
        calibration (`dict`, *optional*): what `calibrate` measured; for the reader.
        vision_layers (`list[str]`, *optional*): how vision takes part in each layer of the text model: `"full"`,
            `"cross"` (text attends to visual tokens that are not updated) or `"text"`; all full by default. Not for
            `"dense"`.
        vision_schedules (`list[str]`, *optional*): the schedules that this checkpoint serves, a letter per layer (F,
            C, T), those with less work on visual tokens first. In training each step draws one of them.
        vision_policy (`bool`, defaults to `False`): whether the complexity of the question chooses among
            `vision_schedules`; `fit_policy` sets it.
        vision_ranking (`list[str]`, *optional*): schedules found by `rank_vision_layers`, each with less work on
            visual tokens than the one before. A `vision_budget` between 0 and 1 chooses among them.
        vision_cross (`str`, defaults to `"own"`): how a cross layer looks at visual tokens. `"own"`: its own
            projections make keys and values of them, without new weights (ViCA, ShortV); `"block"`: an extra block of
            cross-attention runs before the layer, which then sees text alone (VISOR). There is a block per layer, with
            a quarter of its heads: 7 % more weights in the text model of SmolVLM-256M, 9 % in that of 500M. A block
            changes nothing until it is trained.
        selector_hidden_size (`int`, defaults to 128): width of the selector.
        selector_layers (`int`, defaults to 2): transformer layers over glance and question.
        selector_heads (`int`, defaults to 4): attention heads per layer.
        max_question_tokens (`int`, defaults to 128): most question tokens that the selector reads, the last ones.
        gumbel_temperature (`float`, defaults to 1.0): temperature of the relaxed selection in training.
        complexity_levels (`int`, defaults to 9): number of complexities from 0 to 1 that the estimator distinguishes.
        complexity_quantile (`float`, defaults to 0.95): estimated probability with which the budget should suffice; a
            lower value is cheaper.
        glance_downscale (`int`, defaults to 1): by how much the global view of an image that has tiles is scaled down
            before it is encoded. 2 costs less than a quarter; as many tokens come of it. Not for `"dense"`.
        tiles_per_step (`int`, *optional*): tiles encoded at once, all of them by default; see `tune`.
        global_image_token_id, end_of_utterance_token_id (`int`): markers in the prompt, the second one of the end of a
            turn; the defaults are those of the published SmolVLM tokenizers.
        assistant_token_ids (`list[int]`): ids that open an answer, without white space before them; the default is
            "Assistant:" in the published SmolVLM tokenizers. `from_dense` reads them from the chat template. A
            checkpoint that was saved without them and has another tokenizer gets them by
            `model.config.update(marker_ids(processor))` from `conversion_qgsa`, or when it is exported again.
        user_token_ids (`list[int]`): ids that open a question, such as "User:", which alone are no question; the
            attention of these words is not read. `from_dense` reads them from the chat template.
        tile_token_ids (`list[int]`): ids of `<row_1_col_1>` ... `<row_6_col_6>`, row by row, 36 in total. Where the
            tokenizer has no token for a marker (that of SmolVLM-2.2B, for example, writes them as plain text), it is
            the list of its ids, as is `global_image_token_id`.

    A saved configuration also carries `qgsa_version`, the version of this package that wrote it.

    Raises huggingface_hub's StrictDataclass error, naming the field and the number, if a field is out of range.
    """

    model_type = "qgsa_smolvlm"

    selection: str = Budget.selection
    min_visual_tokens: int = Budget.min_visual_tokens
    max_visual_tokens: int = Budget.max_visual_tokens
    min_tiles: int = Budget.min_tiles
    max_tiles: int = Budget.max_tiles
    positions_per_image: int | None = Budget.positions_per_image
    positions: str = "original"
    pointer: str = "selector"
    attention_weights: list[list[float]] | None = None
    attention_temperature: float | int = 1.0
    attention_nowhere: float | int | None = None
    attention_coverage: float | int = 1.0
    keep_tile_markers: bool = False
    calibration: dict[str, Any] | None = None
    vision_layers: list[str] | None = None
    vision_schedules: list[str] | None = None
    vision_policy: bool = False
    vision_ranking: list[str] | None = None
    vision_cross: str = "own"
    selector_hidden_size: int = 128
    selector_layers: int = 2
    selector_heads: int = 4
    max_question_tokens: int = 128
    gumbel_temperature: float | int = 1.0
    complexity_levels: int = 9
    complexity_quantile: float | int = 0.95
    glance_downscale: int = 1
    tiles_per_step: int | None = None
    image_token_id: int = 49190
    global_image_token_id: int | list[int] = 49152
    end_of_utterance_token_id: int = 49279
    assistant_token_ids: list[int] = field(default_factory=lambda: [9519, 9531, 42])
    user_token_ids: list[int] = field(default_factory=lambda: [11126, 42])
    tile_token_ids: list[int] | list[list[int]] = field(default_factory=lambda: list(range(49153, 49189)))

    def __post_init__(self, **kwargs):
        kwargs.pop("qgsa_version", None)  # of the file that was read; `to_dict` writes the present one
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"qgsa_version": __version__}

    @property
    def patches_per_side(self) -> int:
        """Whole patches along each side of a tile."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens per tile: its patches after the pixel shuffle."""
        return (self.patches_per_side // self.scale_factor) ** 2

    def keep_whole_tiles(self):
        """Set the budget of visual tokens so that the glance and all tiles that are encoded stay whole."""
        self.min_visual_tokens = self.tokens_per_tile * (1 + self.min_tiles)
        self.max_visual_tokens = self.tokens_per_tile * (1 + self.max_tiles)

    def check_tiles(self):
        """Raise ValueError if the patches of a tile do not form whole visual tokens."""
        if self.patches_per_side % self.scale_factor:
            raise ValueError(
                f"scale_factor ({self.scale_factor}) must divide the number of patches per tile side "
                f"({self.patches_per_side})"
            )

    def validate_budget(self):
        """Check the selection and its budgets; run by `@strict_config` on construction."""
        Budget.of(self)
        choose_positions(self.positions)

    def validate_pointer(self):
        """Check the pointer and what it reads; run by `@strict_config` on construction."""
        choose_pointer(self.pointer)
        if not self.attention_temperature > 0:
            raise ValueError(f"attention_temperature ({self.attention_temperature}) must be greater than 0")
        if not 0 < self.attention_coverage <= 1:
            raise ValueError(f"attention_coverage ({self.attention_coverage}) must be in (0, 1]")
        weights, layers = self.attention_weights, self.text_config.num_hidden_layers
        if weights is not None and not (1 <= len(weights) <= layers and all(len(row) == 2 for row in weights)):
            raise ValueError(
                f"attention_weights ({len(weights)} rows) must have 1 to {layers} rows, one per layer of the text "
                "model, of 2 weights each"
            )

    def validate_vision_layers(self):
        """Check the schedules of the text model's layers; run by `@strict_config` on construction."""
        layers = self.text_config.num_hidden_layers
        if self.vision_cross not in VISION_CROSSES:
            raise ValueError(f"vision_cross ({self.vision_cross!r}): choose from {', '.join(VISION_CROSSES)}")
        if self.vision_layers is not None:
            check_kinds("vision_layers", self.vision_layers, layers)
        for name, given in (("vision_schedules", self.vision_schedules), ("vision_ranking", self.vision_ranking)):
            kinds = [parse_schedule(name, each, layers) for each in given or ()]
            shares = [vision_share(each, self) for each in kinds]
            if shares != sorted(shares, reverse=name == "vision_ranking"):
                raise ValueError(f"{name} ({', '.join(given or ())}): must be in the order of their work")
        if self.vision_policy and not self.vision_schedules:
            raise ValueError("vision_policy (True): there are no vision_schedules to choose from")
        if self.vision_policy and self.vision_layers is not None:
            raise ValueError("vision_policy (True): vision_layers would be ignored; set one of them")

    def validate_selector(self):
        """Check that the selector can be built; run by `@strict_config` on construction."""
        for name in ("selector_hidden_size", "selector_layers", "selector_heads", "max_question_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.selector_hidden_size % self.selector_heads:
            raise ValueError(
                f"selector_hidden_size ({self.selector_hidden_size}) must be a multiple of selector_heads "
                f"({self.selector_heads})"
            )
        if not self.gumbel_temperature > 0:
            raise ValueError(f"gumbel_temperature ({self.gumbel_temperature}) must be greater than 0")
        if self.complexity_levels < 2:
            raise ValueError(f"complexity_levels ({self.complexity_levels}) must be at least 2")
        if not 0 < self.complexity_quantile <= 1:
            raise ValueError(f"complexity_quantile ({self.complexity_quantile}) must be in (0, 1]")
        if self.tiles_per_step is not None and self.tiles_per_step < 1:
            raise ValueError(f"tiles_per_step ({self.tiles_per_step}) must be at least 1")
        if len(self.tile_token_ids) != 36:
            raise ValueError(f"tile_token_ids ({len(self.tile_token_ids)} ids) must hold 36: 6 rows of 6 columns")
        if not self.assistant_token_ids:
            raise ValueError("assistant_token_ids (0 ids) must hold at least 1")

    def validate_sizes(self):
        """Check that tiles yield visual tokens and that ids are in range; run by `@strict_config` on construction."""
        vision, text = self.vision_config, self.text_config
        for name, size in (
            ("image_size", vision.image_size),
            ("patch_size", vision.patch_size),
            ("scale_factor", self.scale_factor),
            ("hidden_size", text.hidden_size),
            ("vocab_size", text.vocab_size),
        ):
            if size < 1:
                raise ValueError(f"{name} ({size}) must be at least 1")
        if self.tokens_per_tile < 1:
            raise ValueError(
                f"image_size ({vision.image_size}), patch_size ({vision.patch_size}) and scale_factor "
                f"({self.scale_factor}) make 0 visual tokens per tile"
            )
        patches = vision.image_size // vision.patch_size
        if self.glance_downscale < 1 or patches % self.glance_downscale:
            raise ValueError(
                f"glance_downscale ({self.glance_downscale}) must divide the patches along a tile ({patches})"
            )
        for name in MARKERS:
            for number in flat(getattr(self, name)):
                if not 0 <= number < 2**31:
                    raise ValueError(f"{name} ({number}) must be in 0 .. {2**31 - 1}")
