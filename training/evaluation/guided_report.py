"""Tables and the figure of a pair of models, from its rows of results."""

from pathlib import Path

from matplotlib.figure import Figure

from training.evaluation.report import delta_cell, format_by_family


BY_FAMILY = (
    "dense",
    "guide",
    "guide, glance",
    "sgl, 9%",
    "sgl-before-encoder, m = 3",
    "sgl-before-encoder, coverage",
    "sgl-exit",
    "sgl-exit, coverage",
    "sgl-exit, glance, coverage",
    "fastv, 9%",
    "divprune, 9%",
    "random, 9%",
    "qgsa-attention, m = 3",
    "qgsa-calibrated",
    "random, m = 3",
)


def format_guided(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| system | accuracy | Δ to dense, pp [95 %] | tiles m | tokens k | guide alone | GFLOPs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        alone = row.get("answered_by_guide")
        lines.append(
            f"| {row['system']} | {row['accuracy']:.1%} | {delta_cell(row)} | {row['tiles_mean']:.2f} "
            f"| {row['visual_tokens_mean']:.1f} | {'–' if alone is None else f'{alone:.1%}'} "
            f"| {row['flops']['total'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def format_guided_families(rows: list[dict]) -> str:
    """Accuracy of some of the rows by family, as a Markdown table."""
    shown = [row for row in rows if row["system"] in BY_FAMILY]
    return format_by_family(sorted(shown, key=lambda row: BY_FAMILY.index(row["system"])))


def format_exits(rows: list[dict]) -> str:
    """What the calibration of each exit promised, on questions that its threshold was not chosen on, and its curve."""
    calibrated = [row for row in rows if "calibration" in row]
    shares = [point["exits"] for point in calibrated[0]["exit_curve"][::2]]
    lines = [
        "| system | threshold | target | loyalty, held out [95 %] | exits, held out |",
        "|---|---|---|---|---|",
    ]
    for row in calibrated:
        found = row["calibration"]
        low, high = found["loyalty_ci95"]
        lines.append(
            f"| {row['system']} | {found['exit_threshold']:.4f} | {found['target_loyalty']:.1%} "
            f"| {found['loyalty']:.1%} [{low:.1%}, {high:.1%}] | {found['exits']:.1%} |"
        )
    lines += [
        "",
        f"| guide alone | {' | '.join(f'{share:.0%}' for share in shares)} |",
        "|---|" + "---|" * len(shares),
    ]
    for row in calibrated:
        if "coverage" not in row["system"]:  # the curve is about who answers, not about tiles
            points = " | ".join(f"{point['accuracy']:.1%}" for point in row["exit_curve"][::2])
            lines.append(f"| {row['system']} | {points} |")
    return "\n".join(lines)


def plot_exits(rows: list[dict], path: Path):
    """Draw accuracy against the share of questions that the guide answers alone, with what was calibrated."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for row in rows:
        if "exit_curve" in row and "coverage" not in row["system"]:
            curve = row["exit_curve"]
            shares, accuracies = ([100 * point[name] for point in curve] for name in ("exits", "accuracy"))
            (line,) = axes.plot(shares, accuracies, label=f"{row['system']}: the surest answers first")
            alone = 100 * row.get("answered_by_guide", 0.0)
            axes.plot(alone, 100 * row["accuracy"], "o", color=line.get_color(), label="at its calibrated threshold")
    axes.set_xlabel("questions that the guide answers alone, %")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
