"""Train and evaluate question-guided selection for SmolVLM.

The demo, offline, about 8 minutes on two cores with AVX-512, 10 with AVX2 only
(table, figures and checkpoint in outputs/demo):

    python training/run_qgsa.py

SmolVLM-256M on VQA-RAD, with the published weights and data; the evaluation alone; calibration instead of training;
answers to a file of questions (`--task answer --help` shows its options):

    python training/run_qgsa.py --preset vqa_rad_256m
    python training/run_qgsa.py --preset vqa_rad_256m --task evaluate
    python training/run_qgsa.py --preset vqa_rad_256m --task calibrate
    python training/run_qgsa.py --task answer --model outputs/demo --data questions.jsonl --output answers.jsonl

A preset (training/presets) sets options, which the command line overrides; `--max_steps 2` tries a preset out. A run
that was interrupted continues from its last checkpoint. The stand-in's own training is training/run_stand_in.py.
"""

import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from torch.utils.data import Subset
from transformers import set_seed

from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from training.cli.arguments import end_with_error, errors_in_one_line
from training.cli.groups import (
    EvaluationArguments,
    FeatureArguments,
    ModelArguments,
    SelectionArguments,
    StandInArguments,
)
from training.cli.presets import parse_arguments
from training.data.arguments import DataArguments
from training.data.sets import load_data
from training.evaluation.rows import add_flops, evaluate_systems
from training.evaluation.systems import choose_systems
from training.learning.distillation import distil_glance
from training.learning.output import claimed, field_names, identity, last_checkpoint
from training.learning.report import write_report
from training.learning.train import check_training, to_qgsa, train_selection
from training.learning.training_arguments import GROUPS, LossArguments, QGSATrainingArguments
from training.run_answers import main as answer_questions
from training.standins.loading import load_base


ADDED = {  # options that earlier runs lack, with what they did
    "glance_downscale": 1,
    "positions": "original",
    "distillation_steps": 0,
    "distillation_learning_rate": 5e-4,
}
TASKS = ("train", "evaluate", "calibrate")
SMOKE_QUESTIONS = 2  # with random weights, accuracies mean nothing: enough questions to show that the code runs


@dataclass
class TaskArguments:
    """The task to run, and how `calibrate` does it."""

    _argument_group_name = "task"

    task: str = field(default="train", metadata={"help": "train, calibrate, evaluate only, or answer."})
    calibration_size: int = field(default=200, metadata={"help": "Questions to calibrate on."})
    target_loyalty: float = field(default=0.99, metadata={"help": "Share of answers to keep."})

    def __post_init__(self):
        if self.task == "dense":
            raise ValueError("task ('dense'): now a script of its own. Use python training/run_stand_in.py")
        if self.task == "qgsa":
            print(
                "warning: --task qgsa is now called --task train; the former name will be removed in the next version",
                file=sys.stderr,
            )
            self.task = "train"
        if self.task not in TASKS:
            raise ValueError(f"task ({self.task!r}): choose from {', '.join(TASKS)}")


def parse(arguments: list[str]) -> tuple:
    """The preset's name and the groups of a command line, see `parse_arguments`."""
    for name in field_names(StandInArguments):
        if any(argument.partition("=")[0] == f"--{name}" for argument in arguments):
            end_with_error(f"option --{name} belongs to another script: run_stand_in.py")
    kinds, shown = (TaskArguments, *GROUPS, QGSATrainingArguments), (TaskArguments, *GROUPS, LossArguments)
    return parse_arguments(arguments, __doc__, kinds, shown)


def run(
    preset: str,
    command: str,
    task: TaskArguments,
    model: ModelArguments,
    data: DataArguments,
    selection: SelectionArguments,
    evaluation: EvaluationArguments,
    features: FeatureArguments,
    args: QGSATrainingArguments,
):
    """Train selector and adapters on a frozen dense model, evaluate all systems, and fill the output folder.

    The task `evaluate` takes the trained model from the output folder instead, and `calibrate` makes one that points
    with its attention.
    """
    train, test = load_data(data, args.seed)
    dense, processor = load_base(model)
    if model.random_weights:
        test = Subset(test, range(min(SMOKE_QUESTIONS, len(test))))
    if task.task == "evaluate":
        tuned = QGSASmolVLMForConditionalGeneration.from_pretrained(args.output_dir).to(args.device)
        if selection.complexity_quantile is not None:
            tuned.config.complexity_quantile = selection.complexity_quantile
    elif task.task == "calibrate":
        kept = {"glance_downscale": selection.glance_downscale, "positions": selection.positions}
        tuned = QGSASmolVLMForConditionalGeneration.from_dense(dense, processor, **kept).to(args.device)
        if args.distillation_steps > 0:
            distil_glance(tuned, processor, train, args)
        samples = Subset(train, range(min(task.calibration_size, len(train))))
        print(tuned.calibrate(samples, processor, task.target_loyalty, f"{args.output_dir}/observations"))
    else:
        tuned = train_selection(dense, processor, train, model, selection, features, args)
        tuned.config.use_cache = True  # Trainer turned it off
    if task.task != "evaluate" and args.should_save:
        tuned.save_pretrained(args.output_dir)
        processor.save_pretrained(args.output_dir)
    untrained = to_qgsa(dense, processor, selection).to(tuned.device)
    systems = choose_systems(evaluation.systems, untrained, tuned)
    size, length = evaluation.test_batch_size, evaluation.max_new_tokens
    rows = evaluate_systems(systems, test, processor, size, length, args.seed, data.dataset)
    if args.should_save:  # all processes have answered; only the first one reports
        questions = 1 if model.random_weights else 8
        add_flops(rows, systems, test, processor, length, questions)
        write_report(preset, command, model, data, args, rows, tuned, processor, test)


def recorded_task(folder: str) -> dict:
    """How the model in an output folder was calibrated, of its `run.json`; empty if it was trained."""
    path = Path(folder) / "run.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return {each.name: found[each.name] for each in fields(TaskArguments) if each.name in found}


def asks_for_answers(arguments: list[str]) -> bool:
    """Whether the task of a command line is `answer`, which has options of its own."""
    return "--task=answer" in arguments or ("--task", "answer") in zip(arguments, arguments[1:])


def main():
    if asks_for_answers(sys.argv[1:]):
        answer_questions()
        return
    with errors_in_one_line():
        preset, task, model, data, selection, evaluation, features, args = parse(sys.argv[1:])
        if args.resume_from_checkpoint is None:
            args.resume_from_checkpoint = last_checkpoint(args.output_dir)
        set_seed(args.seed)
        given = " ".join(sys.argv)
        if task.task == "calibrate" and "--systems" not in given:  # compare with the attention as it comes
            evaluation.systems = [*(set(evaluation.systems) - {"dense-finetuned"}), "qgsa-attention"]
        chosen = choose_systems(evaluation.systems, None, None)  # a wrong name is found before anything is trained
        evaluation.systems = [system.name for system in chosen]
        check_training(selection, features, args)
        wanted = identity([model, data, selection, features], args)
        if task.task == "calibrate":
            wanted |= asdict(task)
            args.output_dir += "" if "--output_dir" in given else "_calibrated"
        elif task.task == "evaluate":
            wanted |= recorded_task(args.output_dir)
        former = field_names(StandInArguments)
        command = " ".join(["python training/run_qgsa.py", *sys.argv[1:]])
        with claimed(args.output_dir, wanted, args.process_index == 0, former, ADDED):
            run(preset, command, task, model, data, selection, evaluation, features, args)


if __name__ == "__main__":
    main()
