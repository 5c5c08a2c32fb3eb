"""Tables and plot of engines beside each other, from the rows of `training/studies/engines.py`."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from training.costs.meter import PARTS
from training.evaluation.report import delta_cell, on_front


# Title, system, engine and precision of each row of README's first table.
FIRST_TABLE = (
    ("stock SmolVLM", "dense", "torch", "float32"),
    ("stock SmolVLM", "dense", "onnxruntime", "int8"),
    ("stock SmolVLM, thumbnail only", "dense-global-only", "onnxruntime", "int8"),
    ("QGSA", "qgsa", "onnxruntime", "int8"),
    ("QGSA, half of the glance", "qgsa-half-glance", "onnxruntime", "int8"),
    ("QGSA, blocks and half of the glance", "qgsa-blocks-half-glance", "onnxruntime", "int8"),
)
ENGINES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}
# File and row of the accuracy of each system on cards, below the folder of results.
ACCURACY = {
    **{name: ("pareto_cards", name) for name in ("dense", "dense-global-only", "qgsa", "qgsa-blocks")},
    "dense-fast": ("pareto_cards", "dense"),
    "dense-global-only-fast": ("pareto_cards", "dense-global-only"),
    "qgsa-half-glance": ("half_glance_cards", "qgsa"),
    "qgsa-blocks-half-glance": ("half_glance_blocks_cards", "qgsa"),
    "qgsa-attention": ("pointing_cards", "qgsa-calibrated"),
    "qgsa-attention-half-glance": ("half_glance_calibrated_cards", "qgsa"),
}


def read_accuracy(folder: Path) -> dict[str, dict]:
    """Row of an evaluation on cards, by system.

    Args:
        folder: with the results of the evaluations that `ACCURACY` names.

    Raises ValueError, naming the file, if one is missing.
    """
    rows = {}
    for name in dict.fromkeys(name for name, _ in ACCURACY.values()):
        path = folder / f"{name}.json"
        if not path.is_file():
            raise ValueError(f"accuracy ({folder}): has no {path.name}")
        rows |= {(name, row["system"]): row for row in json.loads(path.read_text())["rows"]}
    return {system: rows[place] for system, place in ACCURACY.items()}


def rows_of(rows: list[dict], architecture: str) -> list[dict]:
    """The rows of one architecture."""
    return [row for row in rows if row["architecture"] == architecture]


def format_engines(rows: list[dict], architecture: str, accuracy: dict[str, dict]) -> str:
    """The rows of one architecture as a Markdown table; a dash where nothing was measured.

    A row is bold if no other one is as accurate on cards in less time.

    Args:
        accuracy: see `read_accuracy`.
    """
    shown = rows_of(rows, architecture)
    lines = [
        "| system | engine | precision | processing | vision | prefill | decode | total, s [range] | × stock "
        "| later question, s | TFLOPs | memory, GB (weights included) | Δ on cards, pp [95 %], m |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, unbeaten in zip(shown, fastest_for_their_accuracy(shown, accuracy)):
        name, measured = f"**{row['system']}**" if unbeaten else row["system"], accuracy.get(row["system"])
        head = f"| {name} | {row['engine']} | {row['precision']} |"
        if "skipped" in row:
            lines.append(f"{head} – | – | – | – | skipped: {row['skipped']} | – | – | – | – | – |")
            continue
        delta = "–" if measured is None else f"{delta_cell(measured)}, {measured['tiles_mean']:.2f}"
        parts = " | ".join(number(row["seconds"].get(part), 2) for part in PARTS)
        low, high = row["seconds_range"]
        lines.append(
            f"{head} {parts} | {row['seconds_median']:.2f} [{low:.2f}, {high:.2f}] "
            f"| {number(row['speedup_vs_dense'], 1)} | {number(row.get('seconds_later'), 2)} "
            f"| {row['flops']['total'] / 1e12:.2f} | {gigabytes(row):.2f} | {delta} |"
        )
    return "\n".join(lines)


def fastest_for_their_accuracy(rows: list[dict], accuracy: dict[str, dict]) -> list[bool]:
    """Whether each row is on the Pareto front of seconds and accuracy; those without either are not."""
    known = ["skipped" not in row and row["system"] in accuracy for row in rows]
    points = [(row["seconds_median"], accuracy[row["system"]]["accuracy"]) for row, both in zip(rows, known) if both]
    front = iter(on_front(points))
    return [both and next(front) for both in known]


def format_own_budgets(rows: list[dict], architecture: str, accuracy: dict[str, dict]) -> str:
    """Seconds with whole tiles at the mean m that their accuracy was measured with, as a Markdown table.

    They lie on the line through the rows with the fewest and the most tiles. Systems that were timed with one m, or
    whose mean is not between those, are left out. The thumbnail is the fastest one of the same engine.

    Args:
        accuracy: see `read_accuracy`.

    Returns an empty string if no system is left.
    """
    lines = [
        "| system | engine | precision | fewest tiles, s | most tiles, s | m on cards | s at that m | × thumbnail |",
        "|---|---|---|---|---|---|---|---|",
    ]
    timed = [row for row in rows_of(rows, architecture) if "skipped" not in row]
    for row in (row for row in timed if row["system"] in accuracy):
        place = (row["engine"], row["precision"])
        beside = {each["system"]: each for each in timed if (each["engine"], each["precision"]) == place}
        alike = [each for name, each in beside.items() if name.partition(", m = ")[0] == row["system"]]
        points = sorted((each["tiles_mean"], each["seconds_median"]) for each in alike)
        (fewest, short), (most, long) = points[0], points[-1]
        tiles = accuracy[row["system"]]["tiles_mean"]
        if fewest == most or not fewest <= tiles <= most:
            continue
        spent = short + (long - short) * (tiles - fewest) / (most - fewest)
        thumbnails = [each["seconds_median"] for name, each in beside.items() if name.startswith("dense-global-only")]
        cells = [f"m {fewest:.0f}: {short:.2f}", f"m {most:.0f}: {long:.2f}", f"{tiles:.2f}", f"{spent:.2f}"]
        cells.append(f"{spent / min(thumbnails):.2f}" if thumbnails else "–")
        lines.append(f"| {row['system']} | {' | '.join([*place, *cells])} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def format_first_table(rows: list[dict], accuracy: dict[str, dict]) -> str:
    """The rows that `FIRST_TABLE` names as a Markdown table, of 256M; a dash where accuracy was not measured.

    Args:
        accuracy: see `read_accuracy`.
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


def plot_accuracy(rows: list[dict], architecture: str, accuracy: dict[str, dict], path: Path):
    """Draw accuracy on cards against the seconds of one architecture: stock in every engine, ours where it is fastest.

    Args:
        accuracy: see `read_accuracy`.
    """
    shown = [row for row in rows_of(rows, architecture) if "skipped" not in row and row["system"] in accuracy]
    fastest = min(shown, key=lambda row: row["seconds_median"], default={"engine": ""})["engine"]
    figure = Figure(figsize=(8, 4.2))
    axes = figure.subplots()
    for row in shown:
        name, ours = row["system"], not row["system"].startswith("dense")
        if name.endswith("-fast") or "attention" in name or (ours and row["engine"] != fastest):
            continue
        place = row["seconds_median"], accuracy[name]["delta_vs_dense_pp"]
        axes.plot(*place, "o", color="tab:blue" if ours else "tab:grey")
        label = f" {name}, {row['engine'].split()[0]} {row['precision']}"
        axes.annotate(label, place, rotation=40, fontsize=8, xytext=(2, 2), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axes.xaxis.set_minor_formatter("")
    axes.set_ylim(top=45)
    axes.set_yticks(range(-50, 1, 10))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    axes.set_xlabel(f"seconds per question, {architecture.upper()}, 2048 px (medians)")
    axes.set_ylabel("Δ to dense on cards, tiny stand-in, pp")
    figure.savefig(path, dpi=130, bbox_inches="tight")
