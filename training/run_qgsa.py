"""Train and evaluate question-guided selection for SmolVLM.

The demo, offline, within 8 minutes on two cores (table, pictures and checkpoint in outputs/demo):

    python training/run_qgsa.py

The tiny dense model that the demo starts from (resumes where it stopped):

    python training/run_qgsa.py --preset tiny_dense

SmolVLM-256M on VQA-RAD, with the published weights and data:

    python training/run_qgsa.py --preset vqa_rad_256m

Any field of the arguments below can be given in a preset (training/presets/*.yaml) or on the command line, where it
wins. `--max_steps 2` tries a preset out; a run that was stopped goes on from its last checkpoint.
"""

import sys
from argparse import ArgumentParser
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, set_seed

from training.cli.arguments import Help
from training.learning.output import claimed, identity
from training.learning.tasks import run_dense, run_qgsa
from training.learning.trainer import QGSATrainingArguments


PRESETS = Path(__file__).resolve().parent / "presets"


@dataclass
class RunArguments:
    """What to train, on what, and what to measure."""

    preset: str = field(default="demo", metadata={"help": "Fields to start from: a file of training/presets."})
    task: str = field(
        default="qgsa",
        metadata={"help": "qgsa; evaluate, for what it trained; or dense, for the tiny stand-in itself."},
    )
    base_model: str = field(
        default="hub_cards/tiny-dense",
        metadata={"help": "Dense checkpoint: Hub id or folder; `tiny` for a fresh one."},
    )
    longest_edge: int = field(
        default=256, metadata={"help": "base_model tiny: px that images are scaled to, in tiles of 64 px."}
    )
    random_weights: bool = field(default=False, metadata={"help": "Build base_model from its config, untrained."})
    dataset: str = field(default="cards", metadata={"help": "cards, vqa_rad, aokvqa or refcoco."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Local folder of the data set; the Hub without it. Not for cards."}
    )
    split_by: str = field(
        default="published", metadata={"help": "vqa_rad: published, or by image (no image in both)."}
    )
    form: str = field(default="multiple_choice", metadata={"help": "aokvqa: multiple_choice, or direct_answer."})
    train_split: str = field(default="train", metadata={"help": "Questions to train on."})
    train_size: int = field(default=100_000, metadata={"help": "Samples of cards to draw the training from."})
    eval_split: str = field(default="test", metadata={"help": "Questions to evaluate, such as validation."})
    test_size: int = field(default=2000, metadata={"help": "Test questions to evaluate; all there are, if fewer."})
    test_batch_size: int = field(default=50, metadata={"help": "Batch size of the evaluation."})
    max_new_tokens: int = field(default=8, metadata={"help": "Longest answer, in tokens."})
    systems: str = field(
        default="dense dense-tuned dense-global-only blank-image random centre qgsa qgsa-after-encoder",
        metadata={"help": "Systems to evaluate, in the order of the table; dense comes first."},
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the LoRA adapters on the text model; 0 for none."})
    lora_targets: str = field(
        default=r".*text_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        metadata={"help": "Modules that get adapters, a regular expression over their whole names."},
    )
    quantization: str = field(
        default="none", metadata={"help": "Of the frozen text model in training: none, 4bit or 8bit (bitsandbytes)."}
    )
    selection: str = field(
        default="before_encoder", metadata={"help": "What is looked at: before_encoder, after_encoder or blocks."}
    )
    min_visual_tokens: int = field(default=16, metadata={"help": "Fewest visual tokens kept an image."})
    max_visual_tokens: int = field(default=128, metadata={"help": "Most visual tokens kept an image."})
    min_tiles: int = field(default=0, metadata={"help": "Fewest high-resolution tiles encoded an image."})
    max_tiles: int = field(default=4, metadata={"help": "Most high-resolution tiles encoded an image."})
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder to keep vision features in, which are frozen; none without it."}
    )
    feature_cache_gb: float = field(default=20.0, metadata={"help": "Most gigabytes to keep there."})
    clip_model: str = field(
        default="local-dir:hub_cards/tiny-clip", metadata={"help": "open_clip model of patch-word alignment."}
    )
    clip_pretrained: str | None = field(default=None, metadata={"help": "open_clip's tag of its weights."})
    words: str = field(
        default="2x2:9600 2x2,3x3,4x4,4x4:12800", metadata={"help": "Task dense: lessons in words, canvases:lessons."}
    )
    tower_samples: int = field(
        default=160_000, metadata={"help": "Task dense: tiles and thumbnails for the vision tower."}
    )
    pictures: str = field(default="4x4:8000", metadata={"help": "Task dense: lessons on pictures, canvases:lessons."})
    validation_size: int = field(default=400, metadata={"help": "Task dense: validation questions."})


def read_preset(arguments: list[str]) -> tuple[str, list[str]]:
    """Put the fields of `--preset NAME` in front of the command line's; returns the name and all arguments.

    Raises SystemExit, naming the presets there are, for an unknown one.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=RunArguments.preset)
    parsed, arguments = parser.parse_known_args(arguments)
    name = parsed.preset
    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if name not in known:
        raise SystemExit(f"unknown preset {name!r}: choose from {', '.join(known)}")
    fields = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    return name, [part for key, value in fields.items() for part in (f"--{key}", str(value))] + arguments


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a folder: Trainer writes its state last, so one without it was broken off."""
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def parse_arguments(arguments: list[str], description: str) -> tuple[str, RunArguments, QGSATrainingArguments]:
    """The preset's name and its arguments, where those of the command line win; `description` is for `--help`."""
    preset, arguments = read_preset(arguments)
    parser = HfArgumentParser((RunArguments, QGSATrainingArguments), description=description, formatter_class=Help)
    run, args = parser.parse_args_into_dataclasses(arguments)
    args.remove_unused_columns, args.report_to = False, []
    return preset, run, args


def main():
    preset, run, args = parse_arguments(sys.argv[1:], __doc__)
    if args.resume_from_checkpoint is None:
        args.resume_from_checkpoint = last_checkpoint(args.output_dir)
    set_seed(args.seed)
    if run.task not in ("qgsa", "evaluate", "dense"):
        raise SystemExit(f"unknown task {run.task!r}: choose from qgsa, evaluate, dense")
    command = " ".join(["python training/run_qgsa.py", *sys.argv[1:]])
    with claimed(args.output_dir, identity(run, args), args.process_index == 0):
        (run_dense if run.task == "dense" else run_qgsa)(preset, run, args, command)


if __name__ == "__main__":
    main()
