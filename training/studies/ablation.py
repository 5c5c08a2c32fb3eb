"""Which selection losses help, on cards: each variant trained with the same seeds and asked the same questions.

    python training/studies/ablation.py --max_steps 100

Takes about an hour and a half on two cores. Trained models are kept: a stopped run resumes where it left off, and
several processes with the same arguments share the work. Further arguments are those of `training/run_qgsa.py`.
Writes `ablation_cards.json` (one row per variant, with the rows of its seeds) and prints the table.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from transformers import set_seed

from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from training.cli.arguments import errors_in_one_line
from training.cli.presets import parse_arguments
from training.data.sets import load_data
from training.evaluation.answers import answer
from training.evaluation.report import delta_cell, pointing_cell, write_results
from training.evaluation.rows import bootstrap_interval, grade_answers, make_row
from training.evaluation.systems import DENSE, System
from training.learning.output import last_checkpoint
from training.learning.train import train_selection
from training.learning.training_arguments import GROUPS, LossArguments, QGSATrainingArguments
from training.standins.loading import load_base


SEEDS = (1, 2, 3)
WEIGHTS = {"utility_weight": 1.0, "attention_weight": 1.0, "contrastive_weight": 0.1, "patch_word_weight": 0.1}
VARIANTS = {
    "answer only": (),
    "+ utility": ("utility_weight",),
    "+ attention": ("attention_weight",),
    "+ contrastive": ("contrastive_weight",),
    "+ patch-word": ("patch_word_weight",),
    "all": tuple(WEIGHTS),
    "+ utility + attention": ("utility_weight", "attention_weight"),
}


def folder_of(output: Path, name: str, seed: int) -> Path:
    return output / f"{name.replace('+ ', '').replace(' ', '-')}-{seed}"


def trained(folder: Path) -> bool:
    return (folder / "model.safetensors").exists()


def train_variant(groups: list, args, name: str, seed: int):
    """Train the model of a variant and a seed into its folder, unless it exists or another process is training it."""
    folder = folder_of(Path(args.output_dir), name, seed)
    if trained(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            print(f"training {name}, seed {seed}", flush=True)
            weights = {weight: value if weight in VARIANTS[name] else 0.0 for weight, value in WEIGHTS.items()}
            args = replace(args, output_dir=str(folder), seed=seed, **weights)
            args.resume_from_checkpoint = last_checkpoint(folder)
            set_seed(seed)
            model, data, selection, _, features = groups
            dense, processor = load_base(model)
            train, _ = load_data(data, seed)
            tuned = train_selection(dense, processor, train, model, selection, features, args)
            tuned.save_pretrained(folder)
    except Timeout:
        print(f"{name}, seed {seed} is being trained by another process", flush=True)


def mean_row(rows: list[dict], differences: np.ndarray) -> dict:
    """The row of a variant from those of its seeds.

    Args:
        differences: `(seeds, n)`, grades minus those of dense; the interval is over questions, for the mean of seeds.
    """
    row = {
        name: float(np.mean([each[name] for each in rows]))
        for name in ("accuracy", "visual_tokens_mean", "tiles_mean", "delta_vs_dense_pp")
    }
    row["delta_ci95"] = bootstrap_interval(100 * differences.mean(0))
    row["by_seed_pp"] = [each["delta_vs_dense_pp"] for each in rows]
    pointing = [each["grounding"].get("pointing_accuracy_one_tile") for each in rows]
    row["grounding"] = {"pointing_accuracy_one_tile": None if None in pointing else float(np.mean(pointing))}
    return row


def format_ablation(rows: list[dict]) -> str:
    """The variants as a Markdown table."""
    lines = [
        "| losses | Δ to dense, pp [95 %] | seeds | tokens k | tiles m | pointing |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        seeds = ", ".join(f"{delta:+.1f}" for delta in row["by_seed_pp"])
        lines.append(
            f"| {row['variant']} | {delta_cell(row)} | {seeds} "
            f"| {row['visual_tokens_mean']:.1f} | {row['tiles_mean']:.2f} | {pointing_cell(row)} |"
        )
    return "\n".join(lines)


def evaluate_variants(dataset: str, evaluation, args, dense, processor, test) -> list[dict]:
    """One row per variant: the trained models in the output folder, asked `test`, paired with `dense`."""
    output = Path(args.output_dir)
    dense = QGSASmolVLMForConditionalGeneration.from_dense(dense, processor.tokenizer).to(args.device)
    systems = [System("dense", dense, DENSE)]
    for name in VARIANTS:
        for seed in SEEDS:
            model = QGSASmolVLMForConditionalGeneration.from_pretrained(folder_of(output, name, seed)).to(args.device)
            systems.append(System(f"{name}, seed {seed}", model))
    everything, samples = answer(systems, test, processor, evaluation.test_batch_size, evaluation.max_new_tokens)
    grades = grade_answers(dataset, everything, samples)
    rows = [
        make_row(system.name, answers, samples, own, grades[0])
        for system, answers, own in zip(systems, everything, grades)
    ]
    summary = []
    for number, name in enumerate(VARIANTS):
        seeds = slice(1 + number * len(SEEDS), 1 + (number + 1) * len(SEEDS))
        row = mean_row(rows[seeds], grades[seeds] - grades[0])
        summary.append({"system": "qgsa", "variant": name, **row, "seeds": rows[seeds]})
    return summary


def main():
    kinds, shown = (*GROUPS, QGSATrainingArguments), (*GROUPS, LossArguments)
    with errors_in_one_line():
        arguments = ["--output_dir", "outputs/ablation", *sys.argv[1:]]
        _, *groups, args = parse_arguments(arguments, __doc__, kinds, shown)
        model, data, _, evaluation, _ = groups
        dense, processor = load_base(model)
        _, test = load_data(data, args.seed)
    output = Path(args.output_dir)
    variants = [(name, seed) for name in VARIANTS for seed in SEEDS]
    for name, seed in variants:
        train_variant(groups, args, name, seed)
    folders = [folder_of(output, *variant) for variant in variants]
    missing = [str(folder) for folder in folders if not trained(folder)]
    if missing:
        sys.exit(f"{len(missing)} of {len(variants)} models are not trained yet: {', '.join(missing)}")
    summary = evaluate_variants(data.dataset, evaluation, args, dense, processor, test)
    name = "ablation_cards.json" if data.eval_split == "test" else f"ablation_cards_{data.eval_split}.json"
    write_results(output / name, "demo", data.dataset, len(test), list(SEEDS), summary, data.eval_split)
    print(format_ablation(summary))


if __name__ == "__main__":
    main()
