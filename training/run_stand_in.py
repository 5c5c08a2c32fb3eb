"""Train a dense stand-in for SmolVLM from scratch, and write its checkpoint, test results and card.

The tiny one on cards, as it is shipped (half an hour on two cores), or on VQA-RAD; and the small one, four times its
size, on cards of all shapes with relations:

    python training/run_stand_in.py --preset tiny_dense
    python training/run_stand_in.py --preset tiny_dense_vqa_rad
    python training/run_stand_in.py --preset small_dense

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
from training.data.cards import TILES_NEEDED, Cards
from training.data.sets import load_data
from training.evaluation.card import write_dense_card
from training.evaluation.report import format_by_canvas, write_results
from training.evaluation.rows import evaluate_systems
from training.evaluation.systems import DENSE, System
from training.learning.output import claimed, field_names, identity, last_checkpoint
from training.learning.training_arguments import LossArguments
from training.standins.dense import train_dense, train_on_questions
from training.standins.small import CANVASES, train_small
from training.standins.tiny import build_stand_in, save_processor


FORMER = field_names(ModelArguments, SelectionArguments, FeatureArguments, LossArguments)
ADDED = {"size": StandInArguments.size, "glimpses": StandInArguments.glimpses}


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
    """Train the stand-in; save it as a complete checkpoint with its test results and card.

    The small one has results per canvas in place of a card.
    """
    train, test = load_data(data, args.seed)
    if data.dataset == "cards":
        model, processor = build_stand_in(longest_edge=stand_in.longest_edge, size=stand_in.size)
        train_it = train_small if stand_in.size == "small" else train_dense
        model = train_it(model, processor, args, stand_in)
    else:
        texts = [f"User: {sample['question']}\nAssistant: {sample['answer']}" for sample in tqdm(train, desc="words")]
        model, processor = build_stand_in(texts, stand_in.longest_edge)
        model = train_on_questions(model, processor, args, train)

    output = Path(args.output_dir)
    model.config.use_cache = True  # Trainer turned it off
    model.save_pretrained(output)
    save_processor(processor, output)
    system = System("dense", QGSASmolVLMForConditionalGeneration.from_dense(model, processor.tokenizer), DENSE)

    def row_of(questions):
        batch, longest = answers.test_batch_size, answers.max_new_tokens
        return evaluate_systems([system], questions, processor, batch, longest, args.seed, data.dataset)[0]

    row = row_of(test)
    if stand_in.size == "small":
        rows = [{"canvas": "4x4"} | row]
        for canvas in dict.fromkeys(CANVASES):
            questions = Cards(data.eval_split, data.test_size, canvases=[canvas], families=list(TILES_NEEDED))
            rows.append({"canvas": "{}x{}".format(*canvas), "families": "all"} | row_of(questions))
        print(format_by_canvas(rows[1:]))
        write_results(output / "results.json", preset, data.dataset, len(test), args.seed, rows, data.eval_split)
        return
    write_results(output / "results.json", preset, data.dataset, len(test), args.seed, [row], data.eval_split)
    needed = {family: TILES_NEEDED[family] if data.dataset == "cards" else "unknown" for family in row["by_family"]}
    print(write_dense_card(output, output.name, model.num_parameters(), len(test), row, needed, command))


def main():
    with errors_in_one_line():
        preset, stand_in, data, answers, args = parse(sys.argv[1:])
        if args.resume_from_checkpoint is None:
            args.resume_from_checkpoint = last_checkpoint(args.output_dir)
        set_seed(args.seed)
        command = " ".join(["python training/run_stand_in.py", *sys.argv[1:]])
        with claimed(args.output_dir, identity([stand_in, data], args), args.process_index == 0, FORMER, ADDED):
            run(preset, command, stand_in, data, answers, args)


if __name__ == "__main__":
    main()
