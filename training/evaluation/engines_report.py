"""Tables and plot of engines beside each other, from the rows of `training/studies/engines.py`."""

from pathlib import Path

from matplotlib.figure import Figure

from training.costs.meter import PARTS
from training.evaluation.report import delta_cell


# Title, system, engine and precision of each row of README's first table.
FIRST_TABLE = (
    ("stock SmolVLM", "dense", "torch", "float32"),
    ("stock SmolVLM", "dense", "onnxruntime", "int8"),
    ("stock SmolVLM, thumbnail only", "dense-global-only", "onnxruntime", "int8"),
    ("QGSA", "qgsa", "onnxruntime", "int8"),
    ("QGSA, blocks and half of the glance", "qgsa-blocks-half-glance", "onnxruntime", "int8"),
)
ENGINES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}


def rows_of(rows: list[dict], architecture: str) -> list[dict]:
    """The rows of one architecture."""
    return [row for row in rows if row["architecture"] == architecture]


def format_engines(rows: list[dict], architecture: str) -> str:
    """The rows of one architecture as a Markdown table; a dash where nothing was measured."""
    lines = [
        "| system | engine | precision | processing | vision | prefill | decode | total, s [range] | × stock "
        "| later question, s | TFLOPs | memory, GB (weights included) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows_of(rows, architecture):
        head = f"| {row['system']} | {row['engine']} | {row['precision']} |"
        if "skipped" in row:
            lines.append(f"{head} – | – | – | – | skipped: {row['skipped']} | – | – | – | – |")
            continue
        parts = " | ".join(number(row["seconds"].get(part), 2) for part in PARTS)
        low, high = row["seconds_range"]
        lines.append(
            f"{head} {parts} | {row['seconds_median']:.2f} [{low:.2f}, {high:.2f}] "
            f"| {number(row['speedup_vs_dense'], 1)} | {number(row.get('seconds_later'), 2)} "
            f"| {row['flops']['total'] / 1e12:.2f} | {gigabytes(row):.2f} |"
        )
    return "\n".join(lines)


def format_first_table(rows: list[dict], accuracy: dict[str, dict]) -> str:
    """The rows that `FIRST_TABLE` names as a Markdown table, of 256M; a dash where accuracy was not measured.

    Args:
        accuracy: row of an evaluation on cards, by system.
    """
    lines = [
        "| system | runs in | seconds per question | times faster | memory, GB (weights included) "
        "| accuracy on cards, Δ pp [95 %] |",
        "|---|---|---|---|---|---|",
    ]
    for title, system, engine, precision in FIRST_TABLE:
        (row,) = (
            row
            for row in rows_of(rows, "256m")
            if (row["system"], row["engine"].split()[0], row["precision"]) == (system, engine, precision)
        )
        delta = delta_cell(accuracy[system]) if system in accuracy else "–"
        lines.append(
            f"| {title} | {ENGINES[engine]}, {precision} | {row['seconds_median']:.2f} "
            f"| {row['speedup_vs_dense']:.1f} | {gigabytes(row):.2f} | {delta} |"
        )
    return "\n".join(lines)


def gigabytes(row: dict) -> float:
    """Peak memory of an answer with the weights, in GB."""
    return (row["memory_bytes"] + row["weight_bytes"]) / 1e9


def number(value: float | None, digits: int) -> str:
    """A number for a table; a dash if there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def plot_engines(rows: list[dict], architecture: str, path: Path):
    """Draw the seconds of every row of one architecture that was measured, one bar each, on a logarithmic axis."""
    shown = [row for row in rows_of(rows, architecture) if "skipped" not in row]
    shown.sort(key=lambda row: row["seconds_median"])
    figure = Figure(figsize=(8, 0.28 * len(shown) + 1))
    axes = figure.subplots()
    for place, row in enumerate(shown):
        ours = not row["system"].startswith("dense")
        axes.barh(place, row["seconds_median"], color="tab:blue" if ours else "tab:grey")
        axes.text(row["seconds_median"], place, f" {row['seconds_median']:.2f}", va="center", fontsize=8)
    names = [f"{row['system']}, {row['engine'].split()[0]} {row['precision']}" for row in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.1, y=0.01)
    axes.set_xlabel(f"seconds per question, {architecture.upper()}, 2048 px (medians)")
    figure.savefig(path, dpi=130, bbox_inches="tight")
