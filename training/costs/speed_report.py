"""Output of the benchmark: `results.json`, `table.md`, plots, and the tables of the pages."""

import json
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from training.costs.environment import environment
from training.costs.meter import PARTS


def write_speed(folder: Path, settings: dict, tuning: dict | None, rows: list[dict]) -> str:
    """Write results, table and plots to `folder`; returns the table.

    Args:
        settings: arguments of the run, without paths of this machine.
        tuning: output of `tune`; None if no system needed it.
        rows: output of `measure`; speedups are added in place.
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
    """Add to each row how many times faster it is than `dense` and `dense-fast` at the same image size, in place."""
    for row in rows:
        for name, key in (("dense", "speedup_vs_dense"), ("dense-fast", "speedup_vs_fast")):
            base = [r for r in rows if r["system"] == name and r["longest_edge"] == row["longest_edge"]]
            row[key] = base[0]["seconds_median"] / row["seconds_median"] if base else None


def format_speed(rows: list[dict], edge: int) -> str:
    """The rows of one image size (`edge` px) as a Markdown table; a dash where nothing was measured."""
    lines = [
        f"Longest edge {edge} px:",
        "",
        "| system | tokens k | tiles m | processing | vision | prefill | decode | total, s [range] | × stock "
        "| × fast | TFLOPs | memory, GB | KV-cache, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    shown = rows_at(rows, edge)
    digits = 2 if any(row["seconds_median"] >= 1 for row in shown) else 4
    for row in shown:
        parts = " | ".join(f"{row['seconds'][part]:.{digits}f}" for part in PARTS)
        low, high = (f"{seconds:.{digits}f}" for seconds in row["seconds_range"])
        lines.append(
            f"| {row['system']} | {row['visual_tokens_mean']:.0f} | {row['tiles_mean']:.1f} | {parts} "
            f"| {row['seconds_median']:.{digits}f} [{low}, {high}] | {_times(row['speedup_vs_dense'])} "
            f"| {_times(row['speedup_vs_fast'])} | {row['flops']['total'] / 1e12:.2f} "
            f"| {row['memory_bytes'] / 1e9:.2f} + {row['weight_bytes'] / 1e9:.2f} "
            f"| {row['kv_cache_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def format_headline(speed: list[dict], cards: list[dict], edge: int) -> str:
    """Seconds, memory and accuracy of every system in one Markdown table; a dash where nothing was measured.

    Args:
        speed: rows of the benchmark; those at `edge` px are shown.
        cards: rows of `training/studies/pareto.py`. For methods with a fixed k the row at the benchmark's k is used,
            for QGSA the one with its own budgets.
    """
    lines = [
        "| system | tokens k | tiles m | TFLOPs | seconds | × stock | × fast | memory, GB "
        "| Δ on cards, pp [95 %], at |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows_at(speed, edge):
        accuracy, delta = _accuracy_row(cards, row), "–"
        if accuracy is not None:
            delta = _delta(accuracy)
            delta += f", k {accuracy['visual_tokens_mean']:.1f}, m {accuracy['tiles_mean']:.2f}"
        lines.append(
            f"| {row['system']} | {row['visual_tokens_mean']:.0f} | {row['tiles_mean']:.1f} "
            f"| {row['flops']['total'] / 1e12:.2f} | {row['seconds_median']:.1f} | {_times(row['speedup_vs_dense'])} "
            f"| {_times(row['speedup_vs_fast'])} | {row['memory_bytes'] / 1e9:.2f} | {delta} |"
        )
    return "\n".join(lines)


def rows_at(rows: list[dict], edge: int) -> list[dict]:
    """The rows of one image size, `edge` px."""
    return [row for row in rows if row["longest_edge"] == edge]


def _accuracy_row(cards: list[dict], speed_row: dict) -> dict | None:
    """The accuracy row of a system: by its name, or else at the k of its speed row."""
    by_name = {row["system"]: row for row in cards}
    name = speed_row["system"]
    return by_name.get(name) or by_name.get(f"{name}, k = {speed_row['visual_tokens_mean']:.0f}")


def _delta(row: dict) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(row["delta_vs_dense_pp"], *row["delta_ci95"])


def _times(speedup: float | None) -> str:
    return "–" if speedup is None else f"{speedup:.1f}"


def plot_breakdown(rows: list[dict], edge: int, path: Path):
    """Draw the seconds of every system by part, one bar per system, at one image size (`edge` px)."""
    shown = rows_at(rows, edge)[::-1]
    figure = Figure(figsize=(8, 0.4 * len(shown) + 1.2))
    axes, left = figure.subplots(), [0.0] * len(shown)
    for part in PARTS:
        widths = [row["seconds"][part] for row in shown]
        axes.barh([row["system"] for row in shown], widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths)]
    for number, (row, end) in enumerate(zip(shown, left)):
        digits = 1 if row["seconds_median"] >= 1 else 3
        axes.text(end, number, f" {row['seconds_median']:.{digits}f} s", va="center", fontsize=8)
    axes.set_xlabel(f"seconds per question, longest edge {edge} px (medians)")
    axes.margins(x=0.08)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def plot_against(rows: list[dict], key: str, label: str, path: Path):
    """Draw seconds against the field `key` of the rows, one line per system."""
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"].colors)
    for name in dict.fromkeys(row["system"] for row in rows):
        points = sorted((row[key], row["seconds_median"]) for row in rows if row["system"] == name)
        axes.plot(*zip(*points), marker="o", label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(label)
    axes.set_ylabel("seconds per question")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130, bbox_inches="tight")
