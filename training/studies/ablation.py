"""Which losses of selection help, on cards: each variant trained with the same seeds, all asked the same questions.

    python training/studies/ablation.py --max_steps 100

Takes about an hour and a half on two cores. What is trained is kept: a run that was stopped goes on where it was, and
several processes started alike share the work.
Writes `ablation_cards.json` (one row a variant, with those of its seeds) and prints the table.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from transformers import set_seed

from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from training.cli.presets import parse_arguments
from training.data.load import load_data
from training.evaluation.grading import score_rows
from training.evaluation.report import write_results
from training.evaluation.systems import DENSE, System, answer, bootstrap_interval, make_row
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
    """Train the model of a variant and a seed into its folder, unless it is there or another process is at it."""
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
        differences: `(seeds, n)`, right or wrong less that of dense; the interval is that of the mean over seeds, by
            questions.
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
        low, high = row["delta_ci95"]
        seeds = ", ".join(f"{delta:+.1f}" for delta in row["by_seed_pp"])
        pointing = row["grounding"]["pointing_accuracy_one_tile"]
        lines.append(
            f"| {row['variant']} | {row['delta_vs_dense_pp']:+.1f} [{low:+.1f}, {high:+.1f}] | {seeds} "
            f"| {row['visual_tokens_mean']:.1f} | {row['tiles_mean']:.2f} "
            f"| {'–' if pointing is None else f'{pointing:.1%}'} |"
        )
    return "\n".join(lines)


def main():
    arguments = ["--output_dir", "outputs/ablation", *sys.argv[1:]]
    _, *groups, args = parse_arguments(
        arguments, __doc__, (*GROUPS, QGSATrainingArguments), shown=(*GROUPS, LossArguments)
    )
    model_arguments, data, _, evaluation, _ = groups
    output = Path(args.output_dir)
    variants = [(name, seed) for name in VARIANTS for seed in SEEDS]
    for name, seed in variants:
        train_variant(groups, args, name, seed)
    missing = [str(folder_of(output, *variant)) for variant in variants if not trained(folder_of(output, *variant))]
    if missing:
        raise SystemExit(f"{len(missing)} of {len(variants)} models are still to come: {', '.join(missing)}")
    dense, processor = load_base(model_arguments)
    dense = QGSASmolVLMForConditionalGeneration.from_dense(dense, processor.tokenizer).to(args.device)
    _, test = load_data(data, args.seed)
    systems = [System("dense", dense, DENSE)]
    for name, seed in variants:
        model = QGSASmolVLMForConditionalGeneration.from_pretrained(folder_of(output, name, seed)).to(args.device)
        systems.append(System(f"{name}, seed {seed}", model))
    everything, samples = answer(systems, test, processor, evaluation.test_batch_size, evaluation.max_new_tokens)
    right = [score_rows(data.dataset, answers.predictions, samples) for answers in everything]
    rows = [
        make_row(system.name, answers, samples, one, right[0])
        for system, answers, one in zip(systems, everything, right)
    ]
    summary = []
    for number, name in enumerate(VARIANTS):
        of_seeds = slice(1 + number * len(SEEDS), 1 + (number + 1) * len(SEEDS))
        row = mean_row(rows[of_seeds], np.array(right[of_seeds]) - right[0])
        summary.append({"system": "qgsa", "variant": name, **row, "seeds": rows[of_seeds]})
    name = "ablation_cards.json" if data.eval_split == "test" else f"ablation_cards_{data.eval_split}.json"
    write_results(output / name, "demo", data.dataset, len(test), list(SEEDS), summary, data.eval_split)
    print(format_ablation(summary))


if __name__ == "__main__":
    main()
