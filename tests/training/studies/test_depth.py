"""The study of depth: which systems it asks, at what FLOPs, and its table."""

import json
import sys
from pathlib import Path

import pytest

from training.learning.depth import keep_everything
from training.studies import depth
from training.studies.checkpoints import load_dense


TINY = Path(__file__).resolve().parents[3] / "hub_cards" / "tiny-dense"
SCHEDULES = ["CCCCTT", "FFCCCC", "FFFFFF"]


@pytest.fixture(scope="module")
def visor(tmp_path_factory):
    """A checkpoint that serves several schedules; the weights are those of the dense one."""
    folder = tmp_path_factory.mktemp("visor")
    model, processor = load_dense(str(TINY))
    keep_everything(model)
    model.config.vision_schedules, model.config.vision_policy = SCHEDULES, True
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def study(visor, tmp_path_factory):
    """Rows and printed tables of the study over a few questions."""
    output = tmp_path_factory.mktemp("depth")

    def run(*arguments):
        given = ["--base_model", str(TINY), "--visor", str(visor), "--test_size", "3", "--eval_split", "validation"]
        sys.argv = ["depth.py", *given, "--ranking_size", "2", "--flops_questions", "1", *arguments]
        sys.argv += ["--output_dir", str(output)]
        depth.main()
        return {row["system"]: row for row in json.loads((output / "visor_cards_validation.json").read_text())["rows"]}

    before = sys.argv
    yield run
    sys.argv = before


@pytest.fixture(scope="module")
def rows(study, visor):
    return study("--visor_calibrated", str(visor), "--calibrated", str(visor), "--vica", str(visor))


def test_every_budget_has_its_rivals_and_controls(rows):
    for share in ("10.3%", "43.6%"):
        for name in ("ranked", "evenly spaced", "shortv", "random layers", "visor"):
            assert f"{name}, {share}" in rows
        done = {name: rows[f"{name}, {share}"]["visual_flops"] for name in ("ranked", "evenly spaced", "shortv")}
        assert done["ranked"] <= min(done["evenly spaced"], done["shortv"])
    others = {"dense", "dense-global-only", "blank-image", "visor", "vica", "qgsa-calibrated", "qgsa+visor"}
    assert others <= rows.keys() and not any("100.0%" in name for name in rows)
    for name in ("untrained", "trained"):
        assert {f"{name}, {count} full" for count in (0, 1, 2, 6)} <= rows.keys()


def test_flops_are_those_of_the_schedules(rows):
    dense = rows["dense"]["visual_flops"]
    assert rows["untrained, 6 full"]["visual_flops"] == pytest.approx(dense)
    assert rows["visor, 10.3%"]["visual_flops"] == pytest.approx(0.104 * dense, rel=0.02)
    pruned = next(row for name, row in rows.items() if name.startswith("visionzip"))
    assert 0.9 * rows["visor, 43.6%"]["visual_flops"] < pruned["visual_flops"] <= rows["visor, 43.6%"]["visual_flops"]


def test_with_everything_full_answers_are_those_of_the_dense_model(rows):
    assert rows["untrained, 6 full"]["delta_ci95"] == rows["trained, 6 full"]["delta_ci95"] == [0, 0]


def test_some_systems_can_be_asked_alone(study):
    assert list(study("--systems", "visor, 4")) == ["dense", "dense-global-only", "visor, 43.6%"]


def test_the_dense_checkpoint_is_required(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["depth.py"])
    with pytest.raises(SystemExit, match="error: base_model"):
        depth.main()
