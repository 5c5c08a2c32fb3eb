"""What the benchmark leaves behind: `results.json`, `table.md` and the plots of seconds."""

import json
from pathlib import Path

from training.costs.meter import PARTS
from training.evaluation.report import environment, plt


def write_speed(folder: Path, settings: dict, tuning: dict | None, rows: list[dict]) -> str:
    """Write everything to `folder`; returns the table.

    Args:
        settings: arguments of the run, without paths of this machine.
        tuning: what was tried for the tuned systems; None where there was none.
        rows: of `training/benchmark.py`.
    """
    add_speedups(rows)
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "preset": "speed",
        "dataset": settings["images"],
        "n": settings["repeats"] * settings["batch_size"],
        "seed": 0,
        "environment": environment(),
        "settings": settings,
        "tuning": tuning,
        "rows": rows,
    }
    part = folder / "results.part"
    part.write_text(json.dumps(results, indent=2) + "\n")
    part.replace(folder / "results.json")
    table = "\n\n".join(format_speed(rows, edge) for edge in settings["longest_edges"])
    (folder / "table.md").write_text(table + "\n")
    plot_breakdown(rows, max(settings["longest_edges"]), folder / "breakdown.png")
    plot_against(rows, "tiles_mean", "high-resolution tiles encoded", folder / "seconds_by_tiles.png")
    if len(settings["longest_edges"]) > 1:
        plot_against(rows, "longest_edge", "longest edge, px", folder / "seconds_by_size.png")
    return table


def add_speedups(rows: list[dict]):
    """Put into every row how many times faster it is than stock, and than tuned stock, at the same image size."""
    for row in rows:
        for name, key in (("dense", "speedup_vs_dense"), ("dense-tuned", "speedup_vs_tuned")):
            base = [r for r in rows if r["system"] == name and r["longest_edge"] == row["longest_edge"]]
            row[key] = base[0]["seconds_median"] / row["seconds_median"] if base else None


def format_speed(rows: list[dict], edge: int) -> str:
    """The rows of one image size as a Markdown table; what was not measured is a dash."""
    lines = [
        f"Longest edge {edge} px:",
        "",
        "| system | tokens k | tiles m | processing | vision | prefill | decode | total, s [range] | × stock "
        "| × tuned | TFLOPs | memory, GB | KV-cache, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["longest_edge"] != edge:
            continue
        parts = " | ".join(f"{row['seconds'][part]:.2f}" for part in PARTS)
        low, high = row["seconds_range"]
        lines.append(
            f"| {row['system']} | {row['visual_tokens_mean']:.0f} | {row['tiles_mean']:.1f} | {parts} "
            f"| {row['seconds_median']:.2f} [{low:.2f}, {high:.2f}] | {_times(row['speedup_vs_dense'])} "
            f"| {_times(row['speedup_vs_tuned'])} | {row['flops']['total'] / 1e12:.2f} "
            f"| {row['memory_bytes'] / 1e9:.2f} + {row['weight_bytes'] / 1e9:.2f} "
            f"| {row['kv_cache_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def _times(speedup: float | None) -> str:
    return "–" if speedup is None else f"{speedup:.1f}"


def plot_breakdown(rows: list[dict], edge: int, path: Path):
    """A bar a system of its seconds by part, at one image size."""
    shown = [row for row in rows if row["longest_edge"] == edge][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(shown) + 1.2))
    left = [0.0] * len(shown)
    for part in PARTS:
        widths = [row["seconds"][part] for row in shown]
        axes.barh([row["system"] for row in shown], widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths)]
    for number, (row, end) in enumerate(zip(shown, left)):
        axes.text(end, number, f" {row['seconds_median']:.1f} s", va="center", fontsize=8)
    axes.set_xlabel(f"seconds a question, longest edge {edge} px (medians)")
    axes.margins(x=0.08)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def plot_against(rows: list[dict], key: str, label: str, path: Path):
    """Seconds against `key` of the rows, a line a system."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    axes.set_prop_cycle(color=plt.cm.tab20.colors)
    for name in dict.fromkeys(row["system"] for row in rows):
        of = sorted((row[key], row["seconds_median"]) for row in rows if row["system"] == name)
        axes.plot(*zip(*of), marker="o", label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(label)
    axes.set_ylabel("seconds a question")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def format_headline(speed: list[dict], cards: list[dict], edge: int) -> str:
    """Seconds, memory and accuracy of every system in one Markdown table; what was not measured is a dash.

    Args:
        speed: rows of the benchmark, of which those at `edge` px are shown.
        cards: rows of `training/studies/pareto.py`. Of methods with a fixed k the one at the benchmark's k is taken,
            of QGSA that with its own budgets.
    """
    lines = [
        "| system | tokens k | tiles m | TFLOPs | seconds | × stock | × tuned | memory, GB "
        "| Δ on cards, pp [95 %], at |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_name = {row["system"]: row for row in cards}
    for row in speed:
        if row["longest_edge"] != edge:
            continue
        of = by_name.get(row["system"]) or by_name.get(f"{row['system']}, k = {row['visual_tokens_mean']:.0f}")
        delta = "–"
        if of is not None:
            delta = "{:+.1f} [{:+.1f}, {:+.1f}]".format(of["delta_vs_dense_pp"], *of["delta_ci95"])
            delta += f", k {of['visual_tokens_mean']:.1f}, m {of['tiles_mean']:.2f}"
        lines.append(
            f"| {row['system']} | {row['visual_tokens_mean']:.0f} | {row['tiles_mean']:.1f} "
            f"| {row['flops']['total'] / 1e12:.2f} | {row['seconds_median']:.1f} | {_times(row['speedup_vs_dense'])} "
            f"| {_times(row['speedup_vs_tuned'])} | {row['memory_bytes'] / 1e9:.2f} | {delta} |"
        )
    return "\n".join(lines)
