"""Tables and plot of engines beside each other, on made-up rows."""

from pathlib import Path

import pytest
from PIL import Image

from training.evaluation.engines_report import (
    FIRST_TABLE,
    format_engines,
    format_first_table,
    format_own_budgets,
    plot_accuracy,
    plot_engines,
    read_accuracy,
)


RESULTS = Path(__file__).parents[3] / "hub_cards" / "results"
QGSA = {"accuracy": 0.8, "delta_vs_dense_pp": -0.4, "delta_ci95": [-1.1, 0.3], "tiles_mean": 1.2}


@pytest.fixture
def rows():
    """One row per line of the first table, each twice as fast as the one before, and an engine that is missing."""
    made = [
        {
            "architecture": "256m",
            "system": system,
            "engine": f"{engine} 1.0",
            "precision": precision,
            "seconds": {"vision": 8 / 2**number},
            "seconds_median": 16 / 2**number,
            "seconds_range": [16 / 2**number, 17 / 2**number],
            "speedup_vs_dense": 2.0**number,
            "flops": {"total": 3e12},
            "tiles_mean": 2.0,
            "memory_bytes": 10**9,
            "weight_bytes": 5 * 10**8,
        }
        for number, (_, system, engine, precision) in enumerate(FIRST_TABLE)
    ]
    absent = {"system": "dense", "engine": "openvino", "precision": "int8", "skipped": "no files: run make engines"}
    return [*made, {"architecture": "256m", **absent}, {**made[0], "architecture": "500m", "seconds_median": 99.0}]


def test_the_first_table_has_accuracy_beside_seconds(rows):
    lines = format_first_table(rows, {"qgsa": QGSA}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [line[0] for line in cells] == [title for title, *_ in FIRST_TABLE]
    assert cells[0][1:] == ["PyTorch, float32", "16.00", "1.0", "1.50", "–"]
    assert cells[3][1:] == ["ONNX Runtime, int8", "2.00", "8.0", "1.50", "-0.4 [-1.1, +0.3]"]


def test_a_table_has_one_architecture_and_says_what_is_missing(rows):
    table = format_engines(rows, "256m", {"qgsa": QGSA}).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert "99.00" not in "".join(table) and "99.00" in format_engines(rows, "500m", {})
    missing = "| dense | openvino | int8 | – | – | – | – | skipped: no files: run make engines | – | – | – | – | – |"
    assert missing in table
    assert [line.endswith("| -0.4 [-1.1, +0.3], 1.20 |") for line in table] == [
        "| **qgsa** |" in line for line in table
    ]


def test_a_row_is_bold_if_no_other_is_as_accurate_in_less_time(rows):
    accuracy = {"dense": QGSA | {"accuracy": 0.9}, "dense-global-only": QGSA | {"accuracy": 0.3}, "qgsa": QGSA}
    table = format_engines(rows, "256m", accuracy).splitlines()
    bold = [line.split(" | ")[:2] for line in table if "**" in line]
    assert bold == [["| **dense**", "onnxruntime 1.0"], ["| **qgsa**", "onnxruntime 1.0"]]


def test_seconds_at_the_budget_of_the_accuracy_lie_between_those_of_the_fewest_and_the_most_tiles(rows):
    (two,) = (row for row in rows if row["system"] == "qgsa")  # 2 s, the thumbnail alone 4 s
    one = two | {"system": "qgsa, m = 1", "seconds_median": 1.0, "tiles_mean": 1.0}
    rows.append(one)
    _, _, row = format_own_budgets(rows, "256m", {"qgsa": QGSA}).splitlines()
    assert row == "| qgsa | onnxruntime 1.0 | int8 | m 1: 1.00 | m 2: 2.00 | 1.20 | 1.20 | 0.30 |"
    two["tiles_mean"] = 4.0
    assert " | m 4: 2.00 | 1.20 | 1.07 | 0.27 |" in format_own_budgets(rows, "256m", {"qgsa": QGSA})
    without = [row for row in rows if row["system"] != "dense-global-only"]
    assert format_own_budgets(without, "256m", {"qgsa": QGSA}).endswith("| 1.07 | – |")
    for left_out in ([one], [two], []):
        assert format_own_budgets(left_out, "256m", {"qgsa": QGSA}) == ""
    assert format_own_budgets(rows, "256m", {"qgsa": QGSA | {"tiles_mean": 4.1}}) == ""


def test_the_accuracy_of_every_system_is_that_of_cards():
    accuracy = read_accuracy(RESULTS)
    assert accuracy["dense-fast"]["delta_vs_dense_pp"] == 0 > accuracy["qgsa-blocks-half-glance"]["delta_vs_dense_pp"]
    assert accuracy["dense-global-only"]["tiles_mean"] == 0 < accuracy["qgsa-attention"]["tiles_mean"]


def test_the_plots_show_what_was_measured(rows, tmp_path):
    plot_engines(rows, "256m", tmp_path / "plot.png")
    for accuracy in ({}, {"qgsa": QGSA, "dense": QGSA}):
        plot_accuracy(rows, "256m", accuracy, tmp_path / "accuracy.png")
    for name in ("plot", "accuracy"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 300
