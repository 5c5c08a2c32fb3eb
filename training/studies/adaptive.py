"""Does it pay to choose the budget by the question? Adaptive selection against fixed budgets (m, k), on cards.

    python training/studies/adaptive.py --checkpoint outputs/demo --output_dir outputs/adaptive

A few minutes on two cores after the demo. Every fixed budget is the same checkpoint with the same selector, told to
spend the same on every question. Writes `adaptive_cards.json`, a table and a figure of tokens against complexity.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.cli.arguments import check_source, parse
from training.data.cards import FAMILIES, Cards
from training.data.collator import QuestionCollator
from training.evaluation.report import write_results
from training.evaluation.systems import DENSE, System, add_flops, evaluate_systems


FIXED = [(0, 8), (0, 16), (1, 8), (1, 16), (1, 32), (2, 16), (2, 32), (2, 48), (3, 32), (3, 60)]


@dataclass
class AdaptiveArguments:
    """What to compare, and on how many questions."""

    checkpoint: str = field(default="outputs/demo", metadata={"help": "QGSA checkpoint, trained on cards."})
    base_model: str = field(default="hub_cards/tiny-dense", metadata={"help": "The dense model it was made from."})
    split: str = field(default="test", metadata={"help": "Questions to ask: test or validation."})
    size: int = field(default=2000, metadata={"help": "How many of them."})
    output_dir: str = field(default="outputs/adaptive", metadata={"help": "Where results and figure go."})


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
    """What each family needs, gets and answers, adaptive beside the best fixed budget, as a Markdown table."""
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
    """Visual tokens kept against the estimated complexity, one point a question, coloured and moved by its family."""
    tokens, samples, complexity = spend(model, processor, questions)
    families, tokens = np.array([sample["family"] for sample in samples]), np.array(tokens)
    figure, axes = plt.subplots(figsize=(7, 4.5))
    rng = np.random.default_rng(0)
    for number, family in enumerate(FAMILIES):
        of = families == family
        # Side by side: most questions of a family share one complexity, and several families the same.
        x = complexity[of] + 0.012 * (number - len(FAMILIES) / 2) + rng.uniform(-0.004, 0.004, of.sum())
        y = tokens[of] + rng.uniform(-0.8, 0.8, of.sum())
        axes.scatter(x, y, s=9, alpha=0.6, label=f"{family} ({FAMILIES[family][0]})")
    axes.set_xlabel("estimated complexity of the question (families moved apart a little)")
    axes.set_ylabel("visual tokens kept, k")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="family (tiles needed)")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def spend(model, processor, questions, batch_size: int = 50):
    """Visual tokens of every question, the samples, and the complexities `(n,)`."""
    collate, tokens, samples, complexity = QuestionCollator(processor, with_answer=False), [], [], []
    for start in range(0, len(questions), batch_size):
        batch = [questions[index] for index in range(start, min(start + batch_size, len(questions)))]
        selection = model.select(**{name: value.to(model.device) for name, value in collate(batch).items()})
        tokens += selection.visual_tokens.tolist()
        complexity += selection.complexity.tolist()
        samples += batch
    return tokens, samples, np.array(complexity)


def main():
    run = parse(AdaptiveArguments, __doc__)
    check_source(run.checkpoint)
    check_source(run.base_model)
    output = Path(run.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    processor = QGSAProcessor.from_pretrained(run.base_model, backend="pil")
    dense = QGSASmolVLMForConditionalGeneration.from_dense(run.base_model)
    model = QGSASmolVLMForConditionalGeneration.from_pretrained(run.checkpoint).eval()
    questions = Cards(run.split, run.size)
    systems = [System("dense", dense, DENSE), System("qgsa", model), *(fixed(model, *budget) for budget in FIXED)]
    rows = evaluate_systems(systems, questions, processor, batch_size=50, max_new_tokens=8)
    # What an adaptive budget costs is different for every question, a fixed one but for the length of the prompt.
    add_flops(rows, systems, questions, processor, max_new_tokens=8, questions=100)
    add_flops(rows[1:2], systems[1:2], questions, processor, max_new_tokens=8, questions=len(questions))
    write_results(output / "adaptive_cards.json", "demo", "cards", len(questions), 0, rows, run.split)
    plot_spending(model, processor, Cards(run.split, min(run.size, 500)), output / "adaptive_cards.png")
    best = best_fixed(rows[2:], rows[1])
    print(f"{format_adaptive(rows)}\n\nThe best fixed budget at its cost: {best['system']}\n")
    print(format_spending(rows[1], best))


if __name__ == "__main__":
    main()
