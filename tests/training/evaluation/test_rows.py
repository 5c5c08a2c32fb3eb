"""Rows: intervals, grades and grounding by hand, and the keys that the contract names."""

import json

import numpy as np
import pytest

from training.data.cards import FAMILIES
from training.evaluation.answers import Answers
from training.evaluation.rows import bootstrap_interval, make_row


ROW_KEYS = {
    "system",
    "visual_tokens_mean",
    "tiles_mean",
    "visual_tokens_counts",
    "accuracy",
    "accuracy_ci95",
    "delta_vs_dense_pp",
    "delta_ci95",
    "by_family",
    "grounding",
    "flops",
    "seconds_median",
    "vision_share_mean",
    "speedup_vs_dense",
    "scores",
    "loyalty",
}
FLOPS_KEYS = {"vision", "prefill", "decode", "total", "cross_modal_attention"}


def test_an_interval_contains_the_mean_and_narrows():
    rng = np.random.default_rng(0)
    values = (rng.random(200) < 0.7).astype(float)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    # The normal approximation is close at this size.
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 200**0.5, rel=0.15)
    closer = bootstrap_interval(np.tile(values, 16))
    assert closer[1] - closer[0] == pytest.approx((high - low) / 4, rel=0.15)
    assert bootstrap_interval(values) == [low, high]


def test_the_interval_of_no_difference_is_zero():
    right = (np.arange(50) % 3 == 0).astype(float)
    assert bootstrap_interval(right - right) == [0, 0]


def test_rows_carry_what_the_contract_says(rows, systems):
    assert [row["system"] for row in rows] == [system.name for system in systems]
    for row in rows:
        assert set(row) == ROW_KEYS
        assert set(row["flops"]) == FLOPS_KEYS
        assert row["accuracy_ci95"][0] <= row["accuracy"] <= row["accuracy_ci95"][1]
        assert row["delta_ci95"][0] <= row["delta_vs_dense_pp"] <= row["delta_ci95"][1]
        assert set(row["by_family"]) <= set(FAMILIES)
        assert sum(family["n"] for family in row["by_family"].values()) == 8
        for name in ("accuracy", "visual_tokens_mean", "tiles_mean"):
            mean = sum(family["n"] * family[name] for family in row["by_family"].values()) / 8
            assert mean == pytest.approx(row["accuracy" if name == "accuracy" else name])
        flops = row["flops"]
        assert flops["total"] == pytest.approx(flops["vision"] + flops["prefill"] + flops["decode"])
    json.dumps(rows)


def test_a_row_by_hand():
    answers = Answers(
        predictions=["a"] * 4,
        visual_tokens=[10, 20, 30, 40],
        tiles=[0, 1, 2, 3],
        relevance=[[[1, 0]], [[0, 1]], [[1, 0]], [[1, 0]]],
        kept=[[]] * 4,
        seconds=[0.1, 0.2, 0.3, 0.9],
    )
    left = [0.1, 0.1, 0.4, 0.9]
    samples = [
        {"family": "open", "tiles_needed": "one", "boxes": [left]},
        {"family": "find", "tiles_needed": "one", "boxes": [left]},
        {"family": "count", "tiles_needed": "none", "boxes": []},
        {"family": "open", "tiles_needed": "many", "boxes": [left]},
    ]
    right, dense = np.array([1.0, 0, 1, 1]), np.array([1.0, 1, 0, 0])
    row = make_row("qgsa", answers, samples, right, dense)
    assert (row["accuracy"], row["delta_vs_dense_pp"]) == (0.75, 25)
    assert (row["visual_tokens_mean"], row["tiles_mean"]) == (25, 1.5)
    assert row["seconds_median"] == pytest.approx(0.25)
    assert row["by_family"]["open"] == {"n": 2, "accuracy": 1, "visual_tokens_mean": 25, "tiles_mean": 1.5}
    assert row["by_family"]["find"]["accuracy"] == 0
    grounding = row["grounding"]
    assert (grounding["pointing_accuracy_one_tile"], grounding["n"]) == (0.5, 2)
    assert (grounding["pointing_accuracy"], grounding["n_pointed"]) == (pytest.approx(2 / 3), 3)
    assert grounding["relevance_in_boxes"] == pytest.approx(2 / 3 * 0.6 * 0.8)
    assert row["delta_ci95"][0] < 25 < row["delta_ci95"][1]


def test_rows_count_what_was_looked_at(rows):
    by_name = {row["system"]: row for row in rows}
    for name in ("dense", "dense-finetuned", "blank-image"):
        assert (by_name[name]["visual_tokens_mean"], by_name[name]["tiles_mean"]) == (272, 16)
    only = by_name["dense-global-only"]
    assert (only["visual_tokens_mean"], only["tiles_mean"]) == (16, 0)
    for name in ("random", "centre", "random-tiles", "qgsa"):
        assert by_name[name]["visual_tokens_mean"] == by_name["qgsa"]["visual_tokens_mean"] <= 48
        assert by_name[name]["tiles_mean"] == by_name["qgsa"]["tiles_mean"] <= 4
    for name in ("qgsa-after-encoder", "fastv", "visionzip", "divprune", "cdpruner", "vispruner"):
        assert by_name[name]["visual_tokens_mean"] == by_name["qgsa"]["visual_tokens_mean"]
        assert by_name[name]["tiles_mean"] == 16
    assert by_name["dense"]["delta_ci95"] == by_name["dense-finetuned"]["delta_ci95"] == [0, 0]
    assert by_name["dense"]["speedup_vs_dense"] == 1


def test_controls_do_not_claim_the_selectors_pointing(rows):
    for row in rows:
        assert bool(row["grounding"]) == row["system"].startswith("qgsa")
