"""Train the tiny dense stand-in for SmolVLM from scratch, and write its checkpoint, test results and card.

On cards, as it is shipped (half an hour on two cores), or on VQA-RAD:

    python training/run_stand_in.py --preset tiny_dense
    python training/run_stand_in.py --preset tiny_dense_vqa_rad

A preset (training/presets/stand_in) sets options, which the command line overrides. A run that was interrupted
continues from its last checkpoint.
"""

import sys
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TrainingArguments, set_seed

from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from training.cli.arguments import errors_in_one_line
from training.cli.groups import AnswerArguments, FeatureArguments, ModelArguments, SelectionArguments, StandInArguments
from training.cli.presets import STAND_IN_PRESETS, parse_arguments
from training.data.arguments import DataArguments
from training.data.cards import FAMILIES
from training.data.sets import load_data
from training.evaluation.card import write_dense_card
from training.evaluation.report import write_results
from training.evaluation.rows import evaluate_systems
from training.evaluation.systems import DENSE, System
from training.learning.output import claimed, field_names, identity, last_checkpoint
from training.learning.training_arguments import LossArguments
from training.standins.dense import train_dense, train_on_questions
from training.standins.tiny import build_stand_in, save_processor


FORMER = field_names(ModelArguments, SelectionArguments, FeatureArguments, LossArguments)


def parse(arguments: list[str]) -> tuple:
    """The preset's name and the groups of a command line, see `parse_arguments`."""
    kinds = (StandInArguments, DataArguments, AnswerArguments, TrainingArguments)
    return parse_arguments(arguments, __doc__, kinds, folder=STAND_IN_PRESETS, default="tiny_dense")


def run(
    preset: str,
    command: str,
    stand_in: StandInArguments,
    data: DataArguments,
    answers: AnswerArguments,
    args: TrainingArguments,
):
    """Train the stand-in; save it as a complete checkpoint with its test results and card."""
    train, test = load_data(data, args.seed)
    if data.dataset == "cards":
        model, processor = build_stand_in(longest_edge=stand_in.longest_edge)
        model = train_dense(model, processor, args, stand_in)
    else:
        texts = [f"User: {sample['question']}\nAssistant: {sample['answer']}" for sample in tqdm(train, desc="words")]
        model, processor = build_stand_in(texts, stand_in.longest_edge)
        model = train_on_questions(model, processor, args, train)

    output = Path(args.output_dir)
    model.config.use_cache = True  # Trainer turned it off
    model.save_pretrained(output)
    save_processor(processor, output)
    system = System("dense", QGSASmolVLMForConditionalGeneration.from_dense(model, processor.tokenizer), DENSE)
    rows = evaluate_systems(
        [system], test, processor, answers.test_batch_size, answers.max_new_tokens, args.seed, data.dataset
    )
    write_results(output / "results.json", preset, data.dataset, len(test), args.seed, rows, data.eval_split)
    needed = {family: FAMILIES[family][0] if data.dataset == "cards" else "unknown" for family in rows[0]["by_family"]}
    print(write_dense_card(output, output.name, model.num_parameters(), len(test), rows[0], needed, command))


def main():
    with errors_in_one_line():
        preset, stand_in, data, answers, args = parse(sys.argv[1:])
        if args.resume_from_checkpoint is None:
            args.resume_from_checkpoint = last_checkpoint(args.output_dir)
        set_seed(args.seed)
        command = " ".join(["python training/run_stand_in.py", *sys.argv[1:]])
        with claimed(args.output_dir, identity([stand_in, data], args), args.process_index == 0, FORMER):
            run(preset, command, stand_in, data, answers, args)


if __name__ == "__main__":
    main()
