"""The results, figures and model card that a run leaves in its output folder."""

from pathlib import Path

from transformers import TrainingArguments

from training.cli.groups import ModelArguments
from training.data.arguments import DataArguments
from training.data.collator import QuestionCollator
from training.evaluation.card import run_content, write_card
from training.evaluation.report import (
    format_families,
    format_table,
    plot_accuracy,
    plot_selections,
    write_results,
)


def write_report(
    preset: str,
    command: str,
    model: ModelArguments,
    data: DataArguments,
    args: TrainingArguments,
    rows: list[dict],
    tuned,
    processor,
    test,
):
    """Write `results.json`, the figures and the card of a trained selection, and print the tables.

    Args:
        preset, command: name of the preset, for the results; command line of the run, for the card.
        rows: of `results.json`, FLOPs included.
        tuned: the trained QGSA model.
        test: the questions that were evaluated.
    """
    output = Path(args.output_dir)
    (output / "figures").mkdir(parents=True, exist_ok=True)
    results = write_results(output / "results.json", preset, data.dataset, len(test), args.seed, rows, data.eval_split)
    plot_accuracy(rows, output / "figures" / "accuracy.png")
    samples = one_per_family(test)
    collate = QuestionCollator(processor, with_answer=False)
    plot_selections(tuned, processor, samples, collate, output / "figures" / "selections.png")
    write_card(output, run_content(output, tuned.config, results, model.base_model, command))
    print(f"\n{format_table(rows)}\n\n{format_families(rows)}\n\nCheckpoint, card and figures: {output}")


def one_per_family(dataset, limit: int = 6) -> list[dict]:
    """The first question of each family, `limit` at most, among the first 200 questions."""
    found = {}
    for index in range(min(len(dataset), 200)):
        sample = dataset[index]
        found.setdefault(sample["family"], sample)
    return list(found.values())[:limit]
