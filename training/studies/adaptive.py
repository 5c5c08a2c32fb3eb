"""Does a budget per question pay? Adaptive selection against fixed budgets (m, k), on cards.

    python training/studies/adaptive.py --model outputs/demo --output_dir outputs/adaptive

Takes a few minutes on two cores after the demo. Every fixed budget is the same checkpoint with the same selector, told
to spend the same on every question. Writes `adaptive_cards.json`, a table and a figure of tokens against complexity.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from training.cli.arguments import errors_in_one_line, parse
from training.data.cards import FAMILIES, Cards
from training.data.collator import QuestionCollator
from training.evaluation.report import write_results
from training.evaluation.rows import add_flops, evaluate_systems
from training.evaluation.systems import DENSE, System
from training.studies.checkpoints import RENAMED, base_model_of, load_dense, load_model


FIXED = [(0, 8), (0, 16), (1, 8), (1, 16), (1, 32), (2, 16), (2, 32), (2, 48), (3, 32), (3, 60)]


@dataclass
class AdaptiveArguments:
    """Model to study, and the number of questions."""

    model: str = field(default="outputs/demo", metadata={"help": "QGSA checkpoint, trained on cards."})
    base_model: str | None = field(
        default=None,
        metadata={"help": "Dense checkpoint that it is made from; by default as in its run.json."},
    )
    eval_split: str = field(default="test", metadata={"help": "Questions to ask: test or validation."})
    test_size: int = field(default=2000, metadata={"help": "Number of questions."})
    output_dir: str = field(default="outputs/adaptive", metadata={"help": "Folder for results and figure."})


def fixed(model, tiles: int, tokens: int) -> System:
    """The system that spends (m, k) on every question."""
    budget = {"min_tiles": tiles, "max_tiles": tiles, "min_visual_tokens": tokens, "max_visual_tokens": tokens}
    return System(f"qgsa, m = {tiles}, k = {tokens}", model, budget)


def best_fixed(rows: list[dict], adaptive: dict) -> dict:
    """The most accurate fixed budget that costs at most as many FLOPs as the adaptive one."""
    affordable = [row for row in rows if row["flops"]["total"] <= adaptive["flops"]["total"]]
    return max(affordable, key=lambda row: row["accuracy"])


def format_adaptive(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = ["| system | Δ to dense, pp [95 %] | tokens k | tiles m | GFLOPs |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["delta_ci95"]
        lines.append(
            f"| {row['system']} | {row['delta_vs_dense_pp']:+.1f} [{low:+.1f}, {high:+.1f}] "
            f"| {row['visual_tokens_mean']:.1f} | {row['tiles_mean']:.2f} | {row['flops']['total'] / 1e9:.3f} |"
        )
    return "\n".join(lines)


def format_spending(adaptive: dict, best: dict) -> str:
    """Per family, the tiles it needs, its budget and its accuracy, adaptive and best fixed, as a Markdown table."""
    lines = [
        f"| family | tiles needed | tokens k | tiles m | adaptive | {best['system'].removeprefix('qgsa, ')} |",
        "|---|---|---|---|---|---|",
    ]
    for family, spent in sorted(adaptive["by_family"].items(), key=lambda item: -item[1]["tiles_mean"]):
        lines.append(
            f"| {family} | {FAMILIES[family][0]} | {spent['visual_tokens_mean']:.1f} | {spent['tiles_mean']:.2f} "
            f"| {spent['accuracy']:.1%} | {best['by_family'][family]['accuracy']:.1%} |"
        )
    return "\n".join(lines)


def plot_spending(model, processor, questions, path: Path):
    """Plot visual tokens kept against estimated complexity, one point per question, coloured by family."""
    tokens, samples, complexity = spend(model, processor, questions)
    families, tokens = np.array([sample["family"] for sample in samples]), np.array(tokens)
    figure, axes = plt.subplots(figsize=(7, 4.5))
    rng = np.random.default_rng(0)
    for number, family in enumerate(FAMILIES):
        own = families == family
        # Families are moved apart: most questions of a family, and several families, share one complexity.
        x = complexity[own] + 0.012 * (number - len(FAMILIES) / 2) + rng.uniform(-0.004, 0.004, own.sum())
        y = tokens[own] + rng.uniform(-0.8, 0.8, own.sum())
        axes.scatter(x, y, s=9, alpha=0.6, label=f"{family} ({FAMILIES[family][0]})")
    axes.set_xlabel("estimated complexity of the question (families moved apart a little)")
    axes.set_ylabel("visual tokens kept, k")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="family (tiles needed)")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def spend(model, processor, questions, batch_size: int = 50):
    """Visual tokens per question, the samples, and the complexities `(n,)`."""
    collate, tokens, samples, complexity = QuestionCollator(processor, with_answer=False), [], [], []
    for start in range(0, len(questions), batch_size):
        batch = [questions[index] for index in range(start, min(start + batch_size, len(questions)))]
        selection = model.select(**{name: value.to(model.device) for name, value in collate(batch).items()})
        tokens += selection.visual_tokens.tolist()
        complexity += selection.complexity.tolist()
        samples += batch
    return tokens, samples, np.array(complexity)


def main():
    run = parse(AdaptiveArguments, __doc__, RENAMED)
    with errors_in_one_line():
        base_model = base_model_of(run.model, run.base_model)
        model = load_model(run.model)
        dense, processor = load_dense(base_model)
        questions, shown = (Cards(run.eval_split, size) for size in (run.test_size, min(run.test_size, 500)))
    output = Path(run.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    systems = [System("dense", dense, DENSE), System("qgsa", model), *(fixed(model, *budget) for budget in FIXED)]
    rows = evaluate_systems(systems, questions, processor, batch_size=50, max_new_tokens=8)
    add_flops(rows, systems, questions, processor, max_new_tokens=8, questions=100)
    # The cost of an adaptive budget differs per question; that of a fixed one only by the length of the prompt.
    add_flops(rows[1:2], systems[1:2], questions, processor, max_new_tokens=8, questions=len(questions))
    write_results(output / "adaptive_cards.json", "demo", "cards", len(questions), 0, rows, run.eval_split)
    plot_spending(model, processor, shown, output / "adaptive_cards.png")
    best = best_fixed(rows[2:], rows[1])
    print(f"{format_adaptive(rows)}\n\nThe best fixed budget at its cost: {best['system']}\n")
    print(format_spending(rows[1], best))


if __name__ == "__main__":
    main()
