"""What a run leaves behind: `results.json`, the table, the figures and the card."""

import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt

from training.costs.environment import describe_environment, environment


TEMPLATES = Path(__file__).parents[2] / "hub_cards"


def write_results(
    path: Path, preset: str, dataset: str, n: int, seed: int, rows: list[dict], split: str = "test"
) -> dict:
    """Write `results.json` in the form of the public contract, and `split`, in one step; returns what is written."""
    results = {"preset": preset, "dataset": dataset, "split": split, "n": n, "seed": seed}
    results |= {"environment": environment(), "rows": rows}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=2) + "\n")
    part.replace(path)
    return results


def format_table(rows: list[dict]) -> str:
    """The rows as a Markdown table; what was not measured is a dash."""
    lines = [
        "| system | accuracy | Δ to dense, pp [95 %] | tokens k | tiles m | pointing | GFLOPs | ms a question |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["delta_ci95"]
        pointing = row["grounding"].get("pointing_accuracy_one_tile")
        flops = row.get("flops", {}).get("total")
        lines.append(
            f"| {row['system']} | {row['accuracy']:.1%} | {row['delta_vs_dense_pp']:+.1f} [{low:+.1f}, {high:+.1f}] "
            f"| {row['visual_tokens_mean']:.1f} | {row['tiles_mean']:.2f} "
            f"| {'–' if pointing is None else f'{pointing:.1%}'} "
            f"| {'–' if flops is None else f'{flops / 1e9:.2f}'} | {1000 * row['seconds_median']:.1f} |"
        )
    return "\n".join(lines)


def format_families(rows: list[dict]) -> str:
    """Accuracy, visual tokens and tiles of each family, for dense and QGSA, as a Markdown table."""
    by_name = {row["system"]: row["by_family"] for row in rows}
    lines = ["| family | n | dense | qgsa | tokens k | tiles m |", "|---|---|---|---|---|---|"]
    for family, dense in by_name["dense"].items():
        qgsa = by_name["qgsa"][family]
        lines.append(
            f"| {family} | {dense['n']} | {dense['accuracy']:.1%} | {qgsa['accuracy']:.1%} "
            f"| {qgsa['visual_tokens_mean']:.1f} | {qgsa['tiles_mean']:.2f} |"
        )
    return "\n".join(lines)


def plot_accuracy(rows: list[dict], path: Path):
    """Accuracy against visual tokens kept, with 95 % intervals, one point a system."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
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
    plt.close(figure)


def plot_selections(model, processor, samples: list[dict], collate, path: Path):
    """For some questions: the image, the relevance over it, and what was kept for this question."""
    figure, axes = plt.subplots(len(samples), 3, figsize=(9, 3.2 * len(samples)), squeeze=False)
    for row, sample in zip(axes, samples):
        inputs = {name: value.to(model.device) for name, value in collate([sample]).items()}
        selection = model.eval().select(**inputs)
        width, height = sample["image"].size
        row[0].imshow(sample["image"])
        row[0].set_title(f"{sample['question']}", fontsize=8, wrap=True)
        row[1].imshow(sample["image"], alpha=0.5)
        row[1].imshow(
            selection.relevance[0].float().cpu().numpy(), extent=(0, width, height, 0), alpha=0.6, cmap="magma", vmin=0
        )
        row[1].set_title("relevance", fontsize=8)
        row[2].imshow(processor.draw_selection(sample["image"], selection))
        row[2].set_title(
            f"kept for this question: {int(selection.visual_tokens[0])} of {selection.kept_tokens.shape[1]} tokens, "
            f"{int(selection.tiles[0])} of {selection.kept_tiles.shape[1] - 1} tiles",
            fontsize=8,
        )
        for axis in row:
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_dense_card(folder: Path, name: str, parameters: int, n: int, row: dict, needed: dict, command: str):
    """Write the card of the tiny dense model; `needed` says how many tiles each family of `row` needs."""
    lines = ["| family | tiles needed | n | accuracy |", "|---|---|---|---|"]
    for family, scores in row["by_family"].items():
        lines.append(f"| {family} | {needed[family]} | {scores['n']} | {scores['accuracy']:.1%} |")
    for tiles in ("none", "one", "many"):
        some = [scores for family, scores in row["by_family"].items() if needed[family] == tiles]
        if not some:
            continue
        count = sum(scores["n"] for scores in some)
        right = sum(scores["n"] * scores["accuracy"] for scores in some)
        lines.append(f"| **all that need {tiles}** | {tiles} | {count} | **{right / max(count, 1):.1%}** |")
    lines.append(f"| **all** | | {n} | **{row['accuracy']:.1%}** |")
    filled = (
        (TEMPLATES / "dense_card_template.md")
        .read_text()
        .format(
            name=name,
            parameters=parameters,
            n=n,
            families="\n".join(lines),
            command=command,
            environment=describe_environment(environment()),
        )
    )
    (folder / "README.md").write_text(filled)
    return "\n".join(lines)
