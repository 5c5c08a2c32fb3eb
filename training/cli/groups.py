"""Options of the training scripts, in the groups that `--help` shows."""

from dataclasses import dataclass, field


@dataclass
class ModelArguments:
    """The dense model to start from, and the part of it that is trained."""

    _argument_group_name = "model"

    base_model: str | None = field(
        default=None,
        metadata={"help": "Dense checkpoint: Hub id, folder or `tiny`."},
    )
    random_weights: bool = field(default=False, metadata={"help": "Random weights; only the config is used."})
    lora_rank: int = field(default=8, metadata={"help": "LoRA rank; 0 for no adapters."})
    lora_targets: str = field(
        default=r".*text_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        metadata={"help": "Regular expression for the modules to adapt."},
    )
    quantization: str = field(default="none", metadata={"help": "In training: none, 4bit or 8bit."})


@dataclass
class SelectionArguments:
    """The selection and its budget, with the names of [`QGSAConfig`]."""

    _argument_group_name = "selection"

    selection: str = field(default="before_encoder", metadata={"help": "before_encoder, after_encoder or blocks."})
    min_visual_tokens: int = field(default=16, metadata={"help": "Fewest visual tokens per image."})
    max_visual_tokens: int = field(default=128, metadata={"help": "Most visual tokens per image."})
    min_tiles: int = field(default=0, metadata={"help": "Fewest tiles encoded per image."})
    max_tiles: int = field(default=4, metadata={"help": "Most tiles encoded per image."})
    complexity_quantile: float | None = field(
        default=None, metadata={"help": "Chance that the budget suffices (0.95)."}
    )
    glance_downscale: int = field(default=1, metadata={"help": "2: a glance at half of its size."})
    positions: str = field(default="original", metadata={"help": "original or compact."})


@dataclass
class AnswerArguments:
    """How answers are generated in evaluation."""

    _argument_group_name = "evaluation"

    test_batch_size: int = field(default=50, metadata={"help": "Batch size in evaluation."})
    max_new_tokens: int = field(default=8, metadata={"help": "Longest answer, in tokens."})


@dataclass
class EvaluationArguments(AnswerArguments):
    """The systems to evaluate, and how their answers are generated."""

    systems: list[str] = field(
        default_factory=lambda: [
            "dense",
            "dense-finetuned",
            "dense-global-only",
            "blank-image",
            "random",
            "centre",
            "qgsa",
            "qgsa-after-encoder",
        ],
        metadata={"help": "Systems to evaluate; dense and qgsa must be among them."},
    )

    def __post_init__(self):
        self.systems = " ".join(self.systems).split()  # one quoted string is a list too


@dataclass
class FeatureArguments:
    """Features of frozen networks: the vision encoder, and CLIP as a teacher."""

    _argument_group_name = "features of frozen networks"

    feature_cache: str | None = field(default=None, metadata={"help": "Folder to cache vision features in."})
    feature_cache_gb: float = field(default=20.0, metadata={"help": "Size limit per cache, in GB."})
    clip_model: str | None = field(
        default=None, metadata={"help": "open_clip model for patch words, such as ViT-B-16."}
    )
    clip_pretrained: str | None = field(default=None, metadata={"help": "open_clip tag of its weights."})


@dataclass
class StandInArguments:
    """How the dense stand-in is built and trained."""

    _argument_group_name = "stand-in"

    size: str = field(
        default="tiny",
        metadata={"help": "tiny (words, tower, pictures) or small (tower, glimpses, pictures; cards only)."},
    )
    longest_edge: int = field(
        default=256, metadata={"help": "Longest edge that images are scaled to, in px; a tile has 64 px."}
    )
    words: str = field(
        default="2x2:9600 2x2,3x3,4x4,4x4:12800",
        metadata={"help": "tiny on cards, step 1: lessons in words, as canvases:lessons."},
    )
    tower_samples: int = field(default=160_000, metadata={"help": "cards: tiles and thumbnails for the vision tower."})
    glimpses: str = field(
        default="2x2:9600 2x2,3x3,4x4,4x4:12800",
        metadata={"help": "small, step 2: lessons on pictures with one visual token per tile."},
    )
    pictures: str = field(
        default="4x4:8000", metadata={"help": "cards, step 3: lessons on pictures, as canvases:lessons."}
    )
    validation_size: int = field(default=400, metadata={"help": "cards, step 3: validation questions."})

    def __post_init__(self):
        if self.size not in ("tiny", "small"):
            raise ValueError(f"size ({self.size!r}): must be tiny or small")
