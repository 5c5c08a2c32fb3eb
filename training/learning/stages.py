"""Training in stages: each one has a folder and checkpoints of its own."""

from dataclasses import replace

from transformers import Trainer

from training.learning.output import last_checkpoint


def stage_arguments(args, name: str, **changes):
    """`args` for a step before the last: in a subfolder, without evaluation."""
    return replace(args, output_dir=f"{args.output_dir}/{name}", eval_strategy="no", **changes)


def train_resumable(trainer: Trainer):
    """Train, continuing from the last checkpoint in the trainer's folder, if there is one."""
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))
