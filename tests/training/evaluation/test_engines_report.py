"""Tables and plot of engines beside each other, on made-up rows."""

import pytest
from PIL import Image

from training.evaluation.engines_report import FIRST_TABLE, format_engines, format_first_table, plot_engines


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
            "memory_bytes": 10**9,
            "weight_bytes": 5 * 10**8,
        }
        for number, (_, system, engine, precision) in enumerate(FIRST_TABLE)
    ]
    absent = {"system": "dense", "engine": "openvino", "precision": "int8", "skipped": "no files: run make engines"}
    return [*made, {"architecture": "256m", **absent}, {**made[0], "architecture": "500m", "seconds_median": 99.0}]


def test_the_first_table_has_accuracy_beside_seconds(rows):
    accuracy = {"qgsa": {"delta_vs_dense_pp": -0.4, "delta_ci95": [-1.1, 0.3]}}
    lines = format_first_table(rows, accuracy).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [line[0] for line in cells] == [title for title, *_ in FIRST_TABLE]
    assert cells[0][1:] == ["PyTorch, float32", "16.00", "1.0", "1.50", "–"]
    assert cells[3][1:] == ["ONNX Runtime, int8", "2.00", "8.0", "1.50", "-0.4 [-1.1, +0.3]"]


def test_a_table_has_one_architecture_and_says_what_is_missing(rows):
    table = format_engines(rows, "256m")
    assert "99.00" not in table and "99.00" in format_engines(rows, "500m")
    assert "| dense | openvino | int8 | – | – | – | – | skipped: no files: run make engines | – | – | – | – |" in table


def test_the_plot_shows_what_was_measured(rows, tmp_path):
    plot_engines(rows, "256m", tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 300
