"""Train VISOR: vision in few layers of the text model, as deep as each question needs.

On cards, offline, with the tiny stand-in:

    python training/run_visor.py

The layers are ranked on a few questions without training, which gives a schedule for every share of the work on visual
tokens. LoRA adapters then learn the schedules of a shortlist, one per step, so that one checkpoint serves all of them.
Last, the policy learns how deep each question has to be read. With `--schedules` of one schedule, this is ViCA, and
there is no policy. The checkpoint encodes every tile and keeps every visual token; with `--calibration_size` there is
a second one, in `<output_dir>_calibrated`, that also points with its attention and reads only the tiles in question.

With `--vision_cross block`, text looks at visual tokens through blocks of cross-attention in front of the layers, as
VISOR does, and these are trained, too. The layers are then ranked without the blocks, which see nothing before they
are trained.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch.utils.data import Dataset, Subset
from transformers import TrainingArguments, set_seed

from modeling_qgsa.schedule_qgsa import parse_schedule, shortlist
from training.cli.arguments import check_source, errors_in_one_line
from training.cli.presets import VISOR_PRESETS, parse_arguments
from training.data.arguments import DataArguments
from training.data.cards import Cards
from training.data.conversations import Conversations
from training.data.sets import load_data
from training.learning.depth import keep_everything, train_schedules
from training.learning.output import claimed, identity, last_checkpoint
from training.learning.store import replace_file
from training.studies.checkpoints import load_dense


@dataclass
class VisorArguments:
    """The dense model, its schedules, and what is fitted after training."""

    _argument_group_name = "schedules"

    base_model: str = field(default="", metadata={"help": "Dense checkpoint: Hub id or folder; required."})
    shares: list[float] = field(
        default_factory=lambda: [0.0625, 0.125, 0.25, 0.5, 1.0],
        metadata={"help": "Shares of the work on visual tokens to have a schedule for."},
    )
    schedules: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Schedules in letters, such as FFCCTT, in place of ranked ones; "
            "one that is named twice is trained twice as often."
        },
    )
    vision_cross: str = field(
        default="own",
        metadata={"help": "How cross layers look: own, by their own projections, or block, each through a new block."},
    )
    ranking_size: int = field(default=40, metadata={"help": "Questions to rank the layers on."})
    families: str = field(default="", metadata={"help": "cards: families of questions; all published by default."})
    turns: int = field(default=1, metadata={"help": "cards: questions about each picture in training."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapters."})
    lora_targets: str = field(
        default=r".*text_model\.layers\.\d+\.(self_attn\.(q|k|v|o)|mlp\.(gate|up|down))_proj",
        metadata={"help": "Regular expression for the modules to adapt."},
    )
    policy_size: int = field(default=500, metadata={"help": "Questions to fit the policy on."})
    policy_target: float = field(default=0.99, metadata={"help": "1 minus how far an answer's probability may fall."})
    complexity_quantile: float = field(default=0.95, metadata={"help": "Chance that the schedule suffices."})
    calibration_size: int = field(default=0, metadata={"help": "Questions to calibrate the pointer on; 0: none."})
    target_loyalty: float = field(default=0.99, metadata={"help": "Share of answers that the pointer is to keep."})

    def __post_init__(self):
        if not self.base_model:
            raise ValueError("base_model (''): required. Name a Hub id or a folder with --base_model")


def parse(arguments: list[str]) -> tuple:
    """The preset's name and the groups of a command line, see `parse_arguments`."""
    kinds = (VisorArguments, DataArguments, TrainingArguments)
    return parse_arguments(arguments, __doc__, kinds, folder=VISOR_PRESETS, default="visor_tiny")


def training_samples(visor: VisorArguments, data: DataArguments, args: TrainingArguments) -> tuple[Dataset, Dataset]:
    """What to train on, and single questions to rank, fit and calibrate on.

    Raises ValueError for turns or families of another data set than cards.
    """
    families = visor.families.replace(",", " ").split() or None
    if data.train_canvases is not None:
        raise ValueError(f"train_canvases ({', '.join(data.train_canvases)}): conversations are on 4 x 4 tiles alone")
    if data.dataset == "cards":
        train = Conversations("train", data.train_size, args.seed, visor.turns, families)
        return train, Cards("train", data.train_size, args.seed, families=families)
    if families is not None or visor.turns != 1:
        raise ValueError(f"turns ({visor.turns}) and families ({visor.families!r}): for cards alone")
    train, _ = load_data(data, args.seed)
    return train, train


def set_schedules(model, visor: VisorArguments, samples: Dataset, processor):
    """Write the schedules to train with into the config: those of the options, or ranked ones."""
    config, layers = model.config, model.config.text_config.num_hidden_layers
    if visor.schedules:
        for each in visor.schedules:
            parse_schedule("schedules", each, layers)
        config.vision_schedules = visor.schedules
    else:
        ranked = model
        if visor.vision_cross == "block":  # the blocks see nothing yet
            ranked, _ = load_dense(visor.base_model)
            keep_everything(ranked)
        ranked.rank_vision_layers(samples, processor)
        config.vision_ranking = ranked.config.vision_ranking
        config.vision_schedules = shortlist(config, visor.shares)
    config.validate_vision_layers()
    print(f"schedules: {', '.join(config.vision_schedules)}")


def finish(model, processor, samples: Dataset, visor: VisorArguments, folder: Path):
    """Fit the policy, if there are several schedules, and save the checkpoint with what was measured."""
    found = {"schedules": model.config.vision_schedules}
    if len(model.config.vision_schedules) > 1:
        model.config.complexity_quantile = visor.complexity_quantile
        some = Subset(samples, range(min(visor.policy_size, len(samples))))
        found["policy"] = model.fit_policy(some, processor, visor.policy_target)
    else:
        (letters,) = model.config.vision_schedules
        model.config.vision_layers = list(parse_schedule("schedules", letters, len(letters)))
        model.config.vision_schedules = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    replace_file(folder / "visor.json", json.dumps(found, indent=2).encode())
    print(f"{folder}: {found}")


def run(visor: VisorArguments, data: DataArguments, args: TrainingArguments):
    """Rank, train, fit, and save; then calibrate, if asked to."""
    train, single = training_samples(visor, data, args)
    model, processor = load_dense(visor.base_model, vision_cross=visor.vision_cross)
    keep_everything(model)
    set_schedules(model, visor, Subset(single, range(min(visor.ranking_size, len(single)))), processor)
    model = train_schedules(model, processor, train, args, visor.lora_rank, visor.lora_targets)
    model.config.vision_schedules = list(dict.fromkeys(model.config.vision_schedules))
    if not args.should_save:  # all processes have trained; the first one fits and saves
        return
    output = Path(args.output_dir)
    finish(model, processor, single, visor, output)
    if visor.calibration_size:
        samples = Subset(single, range(min(visor.calibration_size, len(single))))
        print(model.calibrate(samples, processor, visor.target_loyalty, f"{args.output_dir}/observations"))
        finish(model, processor, single, visor, output.with_name(f"{output.name}_calibrated"))


def main():
    with errors_in_one_line():
        _, visor, data, args = parse(sys.argv[1:])
        check_source(visor.base_model)
        if args.resume_from_checkpoint is None:
            args.resume_from_checkpoint = last_checkpoint(args.output_dir)
        set_seed(args.seed)
        wanted, added = asdict(visor) | identity([data], args), {"vision_cross": "own"}
        with claimed(args.output_dir, wanted, args.process_index == 0, added=added):
            run(visor, data, args)


if __name__ == "__main__":
    main()
