"""Tables by canvas: every system is asked the questions of each canvas, and paired with dense on them."""

import json
import sys

import numpy as np
import pytest

from training.cli.presets import load_presets
from training.data.cards import FAMILIES, Cards, parse_canvas
from training.evaluation.systems import choose_systems
from training.studies import canvases
from training.studies.canvases import CanvasesArguments, format_canvas_families, format_canvases, rows_by_canvas


SYSTEMS = ["dense", "random", "qgsa"]
ASKED = {name: Cards("validation", 3, canvases=[parse_canvas(name)]) for name in ("2x4", "4x3")}


@pytest.fixture(scope="module")
def rows(model, processor):
    return rows_by_canvas(choose_systems(SYSTEMS, model, model), ASKED, processor)


def test_every_system_is_asked_the_questions_of_every_canvas(rows):
    assert [(row["canvas"], row["system"]) for row in rows] == [(name, each) for name in ASKED for each in SYSTEMS]
    assert [row["tiles_mean"] for row in rows if row["system"] == "dense"] == [8, 12]
    for row in rows:
        families = [sample["family"] for sample in (ASKED[row["canvas"]][index] for index in range(3))]
        assert {family: found["n"] for family, found in row["by_family"].items()} == {
            family: families.count(family) for family in families
        }


def test_rows_are_paired_with_dense_on_the_same_canvas(rows):
    dense = {row["canvas"]: row["accuracy"] for row in rows if row["system"] == "dense"}
    for row in rows:
        assert row["delta_vs_dense_pp"] == pytest.approx(100 * (row["accuracy"] - dense[row["canvas"]]))


def test_the_tables_hold_every_canvas_and_family(rows):
    table, families = format_canvases(rows).splitlines(), format_canvas_families(rows).splitlines()
    assert len(table) == 2 + len(rows) and all(line.count("|") == 8 for line in table)
    assert [line.split(" | ")[:2] for line in table[2:]] == [[f"| {row['canvas']}", row["system"]] for row in rows]
    assert families[0] == "| family: dense → qgsa | 2x4 | 4x3 |"
    assert [line.split(" | ")[0][2:] for line in families[2:]] == list(FAMILIES)
    assert "| – → – |" in "\n".join(families), "six questions do not have eight families on each canvas"


def test_one_canvas_is_measured_that_the_preset_is_not_trained_on():
    measured, trained = CanvasesArguments().canvases, load_presets()["canvases"]["train_canvases"]
    assert set(trained) < set(measured) and len(measured) == len(trained) + 1
    assert "4x4" in trained
    sides = [parse_canvas(canvas) for canvas in measured]
    assert all(max(side) == 4 and np.prod(side) >= 8 for side in sides), "not enlarged, and split by layout"


def test_a_run_writes_its_rows_and_prints_the_tables(model, processor, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(canvases, "load_model", lambda source: model)
    monkeypatch.setattr(canvases, "load_dense", lambda source: (model, processor))
    options = ["--base_model", "any/dense", "--canvases", "2x4", "--eval_split", "validation", "--test_size", "2"]
    options += ["--systems", "dense", "qgsa", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["canvases.py", *options])
    canvases.main()
    results = json.loads((tmp_path / "canvases_cards_validation.json").read_text())
    assert (results["dataset"], results["split"], results["n"]) == ("cards", "validation", 2)
    assert format_canvases(results["rows"]) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--canvases", "4x4", "wide"], "canvas ('wide'): must be rows x columns in tiles. Write it like 2x4"),
        (["--canvases", "5x4"], "canvas (5 x 4 tiles): each side must have 1 to 4 tiles"),
        (["--systems", "qgsa"], "must include dense and qgsa"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(options, complaint, model, processor, monkeypatch):
    monkeypatch.setattr(canvases, "load_model", lambda source: model)
    monkeypatch.setattr(canvases, "load_dense", lambda source: (model, processor))
    monkeypatch.setattr(sys, "argv", ["canvases.py", "--base_model", "any/dense", *options])
    with pytest.raises(SystemExit) as stopped:
        canvases.main()
    assert stopped.value.code.startswith("error: ") and complaint in stopped.value.code
