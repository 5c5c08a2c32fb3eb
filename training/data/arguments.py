"""Command-line options that choose the training and evaluation data."""

from dataclasses import dataclass, field


@dataclass
class DataArguments:
    """Training and evaluation data."""

    _argument_group_name = "data"

    dataset: str = field(default="cards", metadata={"help": "Data set: cards, vqa_rad, aokvqa or refcoco."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Local folder of the data set (default: the Hub). Not used by cards."}
    )
    split_by: str = field(default="published", metadata={"help": "vqa_rad: published or image."})
    form: str = field(default="multiple_choice", metadata={"help": "aokvqa: multiple_choice or direct_answer."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    train_size: int = field(default=100_000, metadata={"help": "cards: training samples."})
    train_canvases: list[str] | None = field(
        default=None,
        metadata={"help": "cards: canvases to train on, as rows x columns in tiles, such as 2x4 4x4 (default: 4x4)."},
    )
    eval_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    test_size: int = field(default=2000, metadata={"help": "Questions to evaluate at most."})
