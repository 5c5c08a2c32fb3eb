"""Output of an evaluation: `results.json`, tables and figures."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from training.costs.environment import environment


def write_results(
    path: Path, preset: str, dataset: str, n: int, seed: int, rows: list[dict], split: str = "test"
) -> dict:
    """Write a results file in one step; returns its content.

    Args:
        path: file to write.
        preset: preset of the run.
        dataset, split: questions that were asked.
        n: number of questions.
        seed: seed of the run.
        rows: one row per system.
    """
    results = {"preset": preset, "dataset": dataset, "split": split, "n": n, "seed": seed}
    results |= {"environment": environment(), "rows": rows}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=2) + "\n")
    part.replace(path)
    return results


def delta_cell(row: dict) -> str:
    """A row's difference to dense with its interval, for a table."""
    low, high = row["delta_ci95"]
    return f"{row['delta_vs_dense_pp']:+.1f} [{low:+.1f}, {high:+.1f}]"


def on_front(points: list[tuple[float, float]]) -> list[bool]:
    """Whether each (cost, gain) is on the Pareto front: no other gains more for as much, or as much for less."""
    return [not any((c <= cost and g > gain) or (c < cost and g >= gain) for c, g in points) for cost, gain in points]


def pointing_cell(row: dict) -> str:
    """A row's pointing accuracy on one-tile questions, for a table; a dash if it does not point."""
    pointing = row["grounding"].get("pointing_accuracy_one_tile")
    return "–" if pointing is None else f"{pointing:.1%}"


def format_table(rows: list[dict]) -> str:
    """The rows as a Markdown table; a dash where nothing was measured."""
    lines = [
        "| system | accuracy | Δ to dense, pp [95 %] | tokens k | tiles m | pointing | GFLOPs | ms per question |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        flops = row.get("flops", {}).get("total")
        lines.append(
            f"| {row['system']} | {row['accuracy']:.1%} | {delta_cell(row)} "
            f"| {row['visual_tokens_mean']:.1f} | {row['tiles_mean']:.2f} | {pointing_cell(row)} "
            f"| {'–' if flops is None else f'{flops / 1e9:.2f}'} | {1000 * row['seconds_median']:.1f} |"
        )
    return "\n".join(lines)


def format_families(rows: list[dict]) -> str:
    """Accuracy of dense and QGSA, and QGSA's visual tokens and tiles, by family, as a Markdown table."""
    by_name = {row["system"]: row["by_family"] for row in rows}
    lines = ["| family | n | dense | qgsa | tokens k | tiles m |", "|---|---|---|---|---|---|"]
    for family, dense in by_name["dense"].items():
        qgsa = by_name["qgsa"][family]
        lines.append(
            f"| {family} | {dense['n']} | {dense['accuracy']:.1%} | {qgsa['accuracy']:.1%} "
            f"| {qgsa['visual_tokens_mean']:.1f} | {qgsa['tiles_mean']:.2f} |"
        )
    return "\n".join(lines)


def format_by_family(rows: list[dict]) -> str:
    """Accuracy of every system by family, a column each, as a Markdown table."""
    families = list(rows[0]["by_family"])
    lines = [f"| system | {' | '.join(families)} |", "|---|" + "---|" * len(families)]
    for row in rows:
        cells = " | ".join(f"{row['by_family'][family]['accuracy']:.1%}" for family in families)
        lines.append(f"| {row['system']} | {cells} |")
    return "\n".join(lines)


def format_by_canvas(rows: list[dict]) -> str:
    """Accuracy of one system by family, a column per row, which names its `canvas`, as a Markdown table."""
    lines = [f"| family | {' | '.join(row['canvas'] for row in rows)} |", "|---|" + "---|" * len(rows)]
    for family in rows[0]["by_family"]:
        found = [row["by_family"].get(family) for row in rows]
        cells = ["–" if each is None else f"{each['accuracy']:.1%}" for each in found]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    overall = [f"{row['accuracy']:.1%}" for row in rows]
    lines.append(f"| all | {' | '.join(overall)} |")
    return "\n".join(lines)


def plot_accuracy(rows: list[dict], path: Path):
    """Draw accuracy, with 95 % intervals, against the mean number of visual tokens kept, one point per system."""
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for row in rows:
        low, high = row["accuracy_ci95"]
        accuracy = 100 * row["accuracy"]
        axes.errorbar(
            row["visual_tokens_mean"],
            accuracy,
            yerr=[[accuracy - 100 * low], [100 * high - accuracy]],
            marker="o",
            linestyle="none",
            capsize=3,
            label=f"{row['system']} (m = {row['tiles_mean']:.1f})",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("visual tokens kept, mean")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="system (tiles encoded)")
    figure.savefig(path, dpi=130, bbox_inches="tight")


def plot_selections(model, processor, samples: list[dict], collate, path: Path):
    """Draw the selection for some questions: image, relevance and the kept regions, one row per sample.

    Args:
        collate: makes a batch from a list of samples, see [`QuestionCollator`].
    """
    figure = Figure(figsize=(9, 3.2 * len(samples)))
    for axes, sample in zip(figure.subplots(len(samples), 3, squeeze=False), samples):
        inputs = {name: value.to(model.device) for name, value in collate([sample]).items()}
        selection = model.eval().select(**inputs)
        width, height = sample["image"].size
        relevance = selection.relevance[0].float().cpu().numpy()
        axes[0].imshow(sample["image"])
        axes[0].set_title(f"{sample['question']}", fontsize=8, wrap=True)
        axes[1].imshow(sample["image"], alpha=0.5)
        axes[1].imshow(relevance, extent=(0, width, height, 0), alpha=0.6, cmap="magma", vmin=0)
        axes[1].set_title("relevance", fontsize=8)
        axes[2].imshow(processor.draw_selection(sample["image"], selection))
        axes[2].set_title(
            f"kept for this question: {int(selection.visual_tokens[0])} of {selection.kept_tokens.shape[1]} tokens, "
            f"{int(selection.tiles[0])} of {selection.kept_tiles.shape[1] - 1} tiles",
            fontsize=8,
        )
        for each in axes:
            each.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
