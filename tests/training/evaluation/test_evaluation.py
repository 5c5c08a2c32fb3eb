"""Evaluation: scores and intervals, the controls, rows as in the contract, and FLOPs that add up."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import training.evaluation.systems as evaluation
from training.costs.counter import count_flops
from training.data.cards import FAMILIES, Cards
from training.data.collator import QuestionCollator
from training.data.dataset import without_image
from training.evaluation.systems import (
    DENSE,
    Answers,
    System,
    add_flops,
    answer,
    bootstrap_interval,
    evaluate_systems,
    kept_regions,
    layout_of,
    make_row,
    standard_systems,
)
from training.methods.baselines import centre_scores, random_scores


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
    "speedup_vs_dense",
    "scores",
    "loyalty",
}
FLOPS_KEYS = {"vision", "prefill", "decode", "total", "cross_modal_attention"}


@pytest.fixture(scope="module")
def questions():
    return Cards("test", 8)


@pytest.fixture(scope="module")
def collate(processor):
    return QuestionCollator(processor, with_answer=False)


@pytest.fixture(scope="module")
def systems(model):
    return standard_systems(model, model)


@pytest.fixture(scope="module")
def rows(systems, questions, processor):
    rows = evaluate_systems(systems, questions, processor, batch_size=3, max_new_tokens=2)
    add_flops(rows, systems, questions, processor, max_new_tokens=2, questions=1)
    return rows


# Scores


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


def test_boxes_are_told_in_shares_of_the_image():
    sample = {"image": Image.new("RGB", (200, 50)), "question": "what?", "boxes": [[20, 5, 100, 50]]}
    assert without_image(sample) == {"question": "what?", "boxes": [[0.1, 0.1, 0.5, 1.0]]}


def test_regions_are_those_of_the_kept_tokens(model, batch):
    selection = model.select(**batch, min_tiles=1, max_tiles=1, min_visual_tokens=8, max_visual_tokens=8)
    for row, (rows, columns) in enumerate(selection.grids.tolist()):
        tile = int(selection.kept_tiles[row].nonzero()[0])
        tokens = selection.kept_tokens[row].view(-1, 16)[tile].nonzero()[:, 0].tolist()
        top, left = divmod(tile, columns)
        expected = {((left + (token % 4) / 4) / columns, (top + (token // 4) / 4) / rows) for token in tokens}
        found = kept_regions(selection, row, 16)
        assert {(round(x0, 9), round(y0, 9)) for x0, y0, *_ in found} == {
            (round(x, 9), round(y, 9)) for x, y in expected
        }
        assert all(x1 - x0 == pytest.approx(1 / 4 / columns) for x0, _, x1, _ in found)


# Controls


def test_scores_of_controls_have_a_place_for_every_visual_token(model, batch):
    layout = layout_of(model.config, batch["input_ids"])
    for make in (random_scores, centre_scores):
        scores = make(layout, torch.Generator().manual_seed(0))
        assert scores.shape == (3, 17 * 16)
        with torch.no_grad():
            model(**batch, visual_token_scores=scores)


def test_random_scores_differ_from_batch_to_batch_and_not_from_run_to_run(model, batch):
    layout = layout_of(model.config, batch["input_ids"])
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(4)
        runs.append([random_scores(layout, generator) for _ in range(2)])
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(*runs[0])


def test_centre_looks_at_the_tiles_in_the_middle(model, batch):
    layout = layout_of(model.config, batch["input_ids"])
    scores = centre_scores(layout, torch.Generator())
    tokens = 64
    selection = model.select(
        **batch,
        visual_token_scores=scores,
        min_tiles=4,
        max_tiles=4,
        min_visual_tokens=tokens,
        max_visual_tokens=tokens,
    )
    assert selection.kept_tiles[0].nonzero()[:, 0].tolist() == [5, 6, 9, 10, 16]
    assert selection.kept_tokens[0].view(17, 16)[[5, 6, 9, 10]].all()  # the glance comes last
    two = model.select(**batch, visual_token_scores=scores, min_tiles=2, max_tiles=2)
    assert two.kept_tiles[1].nonzero()[:, 0].tolist() == [1, 2, 4]  # of a row of four


def test_the_blank_image_replaces_the_image_and_nothing_else(model, processor, questions, monkeypatch):
    shown = []

    class Recorder(QuestionCollator):
        def __call__(self, samples):
            shown.append(samples)
            return super().__call__(samples)

    monkeypatch.setattr(evaluation, "QuestionCollator", Recorder)
    answer([System("dense", model, DENSE, blank=blank) for blank in (False, True)], questions, processor, 8, 1)
    seen, blank = shown
    for index in range(8):
        assert seen[index]["image"].tobytes() == questions[index]["image"].tobytes()
        assert np.unique(np.asarray(blank[index]["image"])).tolist() == [128]
        assert blank[index]["image"].size == questions[index]["image"].size
        assert blank[index]["question"] == questions[index]["question"]


# Answers and rows


def test_answers_are_those_of_generate_whatever_the_batch(model, processor, questions, collate):
    random = System("random", model, scores=random_scores)
    (beside, answers), samples = answer([random, System("qgsa", model)], questions, processor, 3, 4)
    assert [sample["question"] for sample in samples] == [questions[index]["question"] for index in range(8)]
    assert beside.predictions == answer([random], questions, processor, 3, 4)[0][0].predictions, (
        "company changes nothing"
    )
    for name in ("predictions", "visual_tokens", "tiles", "relevance", "kept", "seconds"):
        assert len(getattr(answers, name)) == 8
    for index in range(8):
        inputs = collate([questions[index]])
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        text = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        assert answers.predictions[index] == text.strip()
        selection = model.select(**inputs)
        assert answers.visual_tokens[index] == selection.visual_tokens.item()
        assert answers.tiles[index] == selection.tiles.item()
        assert np.allclose(answers.relevance[index], selection.relevance[0], atol=1e-6)
        assert answers.kept[index] == kept_regions(selection, 0, 16)


def test_rows_carry_what_the_contract_says(rows):
    assert [row["system"] for row in rows] == [
        "dense",
        "dense-tuned",
        "dense-global-only",
        "blank-image",
        "random",
        "centre",
        "qgsa",
        "qgsa-after-encoder",
    ]
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
    for name in ("dense", "dense-tuned", "blank-image"):
        assert (by_name[name]["visual_tokens_mean"], by_name[name]["tiles_mean"]) == (272, 16)
    only = by_name["dense-global-only"]
    assert (only["visual_tokens_mean"], only["tiles_mean"]) == (16, 0)
    for name in ("random", "centre", "qgsa"):
        assert by_name[name]["visual_tokens_mean"] == by_name["qgsa"]["visual_tokens_mean"] <= 48
        assert by_name[name]["tiles_mean"] == by_name["qgsa"]["tiles_mean"] <= 4
    assert by_name["qgsa-after-encoder"]["tiles_mean"] == 16
    assert by_name["dense"]["delta_ci95"] == by_name["dense-tuned"]["delta_ci95"] == [0, 0]
    assert by_name["dense"]["speedup_vs_dense"] == 1


def test_controls_do_not_claim_the_selectors_pointing(rows):
    for row in rows:
        assert bool(row["grounding"]) == row["system"].startswith("qgsa")


# FLOPs


@pytest.mark.parametrize("tiles", [0, 1, 4])
def test_vision_costs_its_tiles_and_parts_sum_to_the_total(tiles, model, single):
    dense = count_flops(model, single, 3, **DENSE)
    few = count_flops(model, single, 3, min_tiles=tiles, max_tiles=tiles)
    assert few["vision"] / dense["vision"] == pytest.approx((1 + tiles) / 17, rel=1e-6)
    for counts in (dense, few):
        assert counts["total"] == counts["vision"] + counts["prefill"] + counts["decode"]
        assert min(counts.values()) > 0
    assert few["prefill"] < dense["prefill"]


def test_vision_is_that_of_the_formula(model, single):
    config = model.config.vision_config
    patches, width, inner = 64, config.hidden_size, config.intermediate_size
    layer = 2 * patches * width * (4 * width + 2 * inner) + 2 * 2 * patches**2 * width
    embedding = 2 * patches * width * 3 * 8**2
    connector = 2 * 16 * 4 * width * model.config.text_config.hidden_size
    expected = 17 * (embedding + config.num_hidden_layers * layer + connector)
    assert count_flops(model, single, 1, **DENSE)["vision"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("options", [DENSE, {"min_tiles": 2, "max_tiles": 2}], ids=["dense", "before_encoder"])
def test_eager_and_sdpa_count_the_same(options, make_dense, make_model, single):
    eager, sdpa = (
        count_flops(make_model(make_dense("smolvlm", attention)), single, 3, **options)
        for attention in ("eager", "sdpa")
    )
    for part in ("vision", "prefill", "decode", "total"):
        assert sdpa[part] == pytest.approx(eager[part], rel=0.01), part


def test_counting_leaves_no_hooks_behind(model, single):
    count_flops(model, single, 1)
    for part in (model.model.vision_model, model.model.connector, model.lm_head):
        assert not part._forward_pre_hooks and not part._forward_hooks
