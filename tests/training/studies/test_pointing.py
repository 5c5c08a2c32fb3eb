"""The table of pointers: every one at the same numbers of tiles, which it keeps whole."""

import json
import sys

import pytest

from modeling_qgsa.calibration_qgsa import EVERY_TILE
from training.data.cards import Cards
from training.evaluation.rows import evaluate_systems
from training.evaluation.systems import whole_tiles
from training.studies import pointing
from training.studies.pointing import TILES, PointingArguments, format_pointing, make_systems


@pytest.fixture(scope="module")
def systems(make_model):
    dense = make_model(pointer="attention")
    fields = {"pointer": "attention", "attention_weights": [[1.0, 0.0]], "attention_coverage": 0.5}
    fields |= {"calibration": {"target_loyalty": 0.9}}
    calibrated = make_model(**fields, max_tiles=EVERY_TILE, max_visual_tokens=16 * (1 + EVERY_TILE))
    return make_systems(dense, calibrated, make_model())


@pytest.fixture(scope="module")
def rows(systems, processor):
    return evaluate_systems(systems, Cards("validation", 3), processor, 3, max_new_tokens=2, share_features=True)


def test_every_pointer_is_asked_at_every_number_of_tiles(rows):
    found = {row["system"]: row for row in rows}
    for tiles in TILES:
        for name in ("qgsa-attention", "qgsa-calibrated", "random", "centre", "qgsa"):
            row = found[f"{name}, m = {tiles}"]
            assert row["tiles_mean"] == tiles and row["visual_tokens_mean"] == 16 * (1 + tiles)
    assert {"dense", "dense-global-only", "blank-image", "qgsa-calibrated", "qgsa"} <= found.keys()


def test_without_a_trained_model_there_are_no_rows_of_it(systems):
    names = [system.name for system in make_systems(systems[0].model, systems[3].model, None)]
    assert not [name for name in names if name.split(",")[0] == "qgsa"] and len(names) == 4 + 4 * len(TILES)


def test_the_table_has_a_line_per_row(rows):
    lines = format_pointing(rows).splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == [row["system"] for row in rows]


def test_whole_tiles_keep_the_glance_too(model):
    assert whole_tiles(model.config, 2) == {
        "min_tiles": 2,
        "max_tiles": 2,
        "min_visual_tokens": 48,
        "max_visual_tokens": 48,
    }


def test_the_base_model_is_required():
    with pytest.raises(ValueError, match="base_model"):
        PointingArguments()


def test_the_script_writes_its_results(systems, processor, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pointing, "load_dense", lambda source: (systems[0].model, processor))
    monkeypatch.setattr(pointing, "load_model", lambda source: systems[3].model)
    arguments = ["--base_model", "here", "--test_size", "2", "--flops_questions", "1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["pointing.py", *arguments, "--eval_split", "validation"])
    pointing.main()
    results = json.loads((tmp_path / "pointing_cards_validation.json").read_text())
    assert results["n"] == 2 and results["split"] == "validation"
    assert all(row["flops"]["total"] > 0 for row in results["rows"])
    shown = capsys.readouterr().out
    assert format_pointing(results["rows"]) in shown and "`qgsa-calibrated` promised to keep 90.0%" in shown
    assert results["rows"][3]["promise"]["held_out_samples"] == 2
