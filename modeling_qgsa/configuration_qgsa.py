"""Configuration of QGSA-SmolVLM: a SmolVLM whose question selects what it looks at."""

from dataclasses import dataclass, field, replace
from numbers import Integral

from .generations_qgsa import SmolVLMConfig, strict_config


MOST = 2**31 - 1  # of a budget: all there is
SELECTIONS = ("before_encoder", "after_encoder", "blocks", "dense")

# Everything the Auto classes need to load a checkpoint with `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_qgsa.QGSAConfig",
    "AutoModel": "modeling_qgsa.QGSASmolVLMModel",
    "AutoModelForImageTextToText": "modeling_qgsa.QGSASmolVLMForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_qgsa.QGSASmolVLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_qgsa.QGSASmolVLMForConditionalGeneration",
    "AutoProcessor": "processing_qgsa.QGSAProcessor",
}


@strict_config
class QGSAConfig(SmolVLMConfig):
    r"""
    Configuration of [`QGSASmolVLMForConditionalGeneration`]: that of SmolVLM, the selection and its budgets, the
    selector's size, and the ids of the marker tokens the layout of the images is read from.

    All budgets are per image. Inference interpolates between the minimum (complexity 0) and the maximum
    (complexity 1) by the complexity that is estimated from the question and the glance.

    Args:
        selection (`str`, defaults to `"before_encoder"`):
            `"before_encoder"` encodes the most relevant tiles only, then keeps the best visual tokens;
            `"after_encoder"` encodes every tile, then keeps the best visual tokens (QGSA as published);
            `"blocks"` encodes only the most relevant blocks of patches of the most relevant tiles, one a visual token
            and at most as many as tokens may be kept, then keeps the best visual tokens;
            `"dense"` is the stock model, bit for bit.
        min_visual_tokens (`int`, defaults to 16): fewest visual tokens kept, of the glance and the tiles together.
        max_visual_tokens (`int`, defaults to 128): most visual tokens kept.
        min_tiles (`int`, defaults to 0): fewest high-resolution tiles encoded; the global view comes on top.
        max_tiles (`int`, defaults to 4): most high-resolution tiles encoded.
        selector_hidden_size (`int`, defaults to 128): width of the selector.
        selector_layers (`int`, defaults to 2): transformer layers over glance and question.
        selector_heads (`int`, defaults to 4): attention heads of each.
        max_question_tokens (`int`, defaults to 128): the selector reads the last so many tokens of a question.
        gumbel_temperature (`float`, defaults to 1.0): temperature of the relaxed selection in training.
        complexity_levels (`int`, defaults to 9): complexities from 0 to 1 that the estimator tells apart.
        complexity_quantile (`float`, defaults to 0.95): the budget is to suffice with this estimated probability;
            a lower one is cheaper.
        tiles_per_step (`int`, *optional*): tiles encoded at once, all of them by default; see `tune`.
        global_image_token_id, end_of_utterance_token_id (`int`): markers in the prompt; the
            defaults are those of the published SmolVLM tokenizers.
        tile_token_ids (`list[int]`): ids of `<row_1_col_1>` ... `<row_6_col_6>`, row by row, 36 in all.

    Raises huggingface_hub's StrictDataclass errors where a field is out of its range, naming the field and the number.
    """

    model_type = "qgsa_smolvlm"

    selection: str = "before_encoder"
    min_visual_tokens: int = 16
    max_visual_tokens: int = 128
    min_tiles: int = 0
    max_tiles: int = 4
    selector_hidden_size: int = 128
    selector_layers: int = 2
    selector_heads: int = 4
    max_question_tokens: int = 128
    gumbel_temperature: float | int = 1.0
    complexity_levels: int = 9
    complexity_quantile: float | int = 0.95
    tiles_per_step: int | None = None
    image_token_id: int = 49190
    global_image_token_id: int = 49152
    end_of_utterance_token_id: int = 49279
    tile_token_ids: list[int] = field(default_factory=lambda: list(range(49153, 49189)))

    def __post_init__(self, **kwargs):
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile: its patches after the pixel shuffle."""
        return (self.vision_config.image_size // self.vision_config.patch_size // self.scale_factor) ** 2

    def check_tiles(self):
        """Raise ValueError unless the patches of a tile make whole visual tokens."""
        patches = self.vision_config.image_size // self.vision_config.patch_size
        if patches % self.scale_factor:
            raise ValueError(
                f"scale_factor {self.scale_factor} is no divisor of the {patches} patches of a tile's side"
            )

    def validate_budget(self):
        """The selection is known and its budgets are in order; run by `@strict_config` on construction."""
        check_budget(self.selection, self.min_visual_tokens, self.max_visual_tokens, self.min_tiles, self.max_tiles)

    def validate_selector(self):
        """The selector can be built; run by `@strict_config` on construction."""
        for name in ("selector_hidden_size", "selector_layers", "selector_heads", "max_question_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it has to be at least 1")
        if self.selector_hidden_size % self.selector_heads:
            raise ValueError(
                f"selector_hidden_size {self.selector_hidden_size} is no multiple of "
                f"selector_heads {self.selector_heads}"
            )
        if not self.gumbel_temperature > 0:
            raise ValueError(f"gumbel_temperature is {self.gumbel_temperature}: it has to be above 0")
        if self.complexity_levels < 2:
            raise ValueError(f"complexity_levels is {self.complexity_levels}: it has to be at least 2")
        if not 0 < self.complexity_quantile <= 1:
            raise ValueError(f"complexity_quantile is {self.complexity_quantile}: it has to be above 0 and at most 1")
        if self.tiles_per_step is not None and self.tiles_per_step < 1:
            raise ValueError(f"tiles_per_step is {self.tiles_per_step}: it has to be at least 1")
        if len(self.tile_token_ids) != 36:
            raise ValueError(f"tile_token_ids holds {len(self.tile_token_ids)} ids: 6 rows of 6 columns make 36")

    def validate_sizes(self):
        """Tiles make visual tokens, and ids can be ids; run by `@strict_config` on construction."""
        vision, text = self.vision_config, self.text_config
        for name, size in (
            ("image_size", vision.image_size),
            ("patch_size", vision.patch_size),
            ("scale_factor", self.scale_factor),
            ("hidden_size", text.hidden_size),
            ("vocab_size", text.vocab_size),
        ):
            if size < 1:
                raise ValueError(f"{name} is {size}: it has to be at least 1")
        if self.tokens_per_tile < 1:
            raise ValueError(
                f"image_size {vision.image_size}, patch_size {vision.patch_size} and scale_factor {self.scale_factor} "
                "make 0 visual tokens a tile"
            )
        for name in ("image_token_id", "global_image_token_id", "end_of_utterance_token_id"):
            if not 0 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} is {getattr(self, name)}: an id is 0 to {2**31 - 1}")


def check_budget(selection: str, min_visual_tokens: int, max_visual_tokens: int, min_tiles: int, max_tiles: int):
    """Raise ValueError, naming the field and both numbers, unless the budget can be kept."""
    if selection not in SELECTIONS:
        raise ValueError(f"selection is {selection!r}: choose from {', '.join(SELECTIONS)}")
    for name, low, high, least in (
        ("visual_tokens", min_visual_tokens, max_visual_tokens, 1),
        ("tiles", min_tiles, max_tiles, 0),
    ):
        for number in (low, high):
            if isinstance(number, bool) or not isinstance(number, Integral) or number > MOST:
                raise ValueError(f"{name} of {number!r}: min_{name} and max_{name} are integers up to {MOST}")
        if low < least:
            raise ValueError(f"min_{name} is {low}: it has to be at least {least}")
        if low > high:
            raise ValueError(f"min_{name} {low} is above max_{name} {high}")


@dataclass(frozen=True)
class Budget:
    """Which selection, and how many visual tokens and high-resolution tiles of each image it may use."""

    selection: str
    min_visual_tokens: int
    max_visual_tokens: int
    min_tiles: int
    max_tiles: int

    @classmethod
    def of(cls, config: QGSAConfig, **overrides) -> "Budget":
        """The configured budget with this call's overrides; None keeps the configured value. Raises ValueError."""
        fields = {name: getattr(config, name) for name in cls.__dataclass_fields__}
        budget = replace(cls(**fields), **{name: value for name, value in overrides.items() if value is not None})
        check_budget(**{name: getattr(budget, name) for name in fields})
        return budget

    def resolve(self, complexity):
        """(m, k) of each image, `(I,)` int64 each, from its complexity `(I,)` in 0 .. 1."""
        m = self.min_tiles + complexity * (self.max_tiles - self.min_tiles)
        k = self.min_visual_tokens + complexity * (self.max_visual_tokens - self.min_visual_tokens)
        return m.round().long(), k.round().long()


def pop_budget(kwargs: dict) -> dict:
    """Take the budget fields out of a call's keyword arguments, so that the rest can be passed on."""
    names = ("min_visual_tokens", "max_visual_tokens", "min_tiles", "max_tiles")
    return {name: kwargs.pop(name) for name in names if name in kwargs}
