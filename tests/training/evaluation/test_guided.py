"""The systems of a pair: names, equal costs, and the curve of the exit."""

import numpy as np
import pytest

from modeling_qgsa import GuidedVLM
from training.data.cards import Cards
from training.evaluation.answers import Answers
from training.evaluation.guided import (
    RETENTIONS,
    exit_curve,
    exit_pairs,
    guided_systems,
    pruning_systems,
    retention_behind,
)
from training.evaluation.rows import add_flops, evaluate_systems
from training.evaluation.systems import DENSE, System


@pytest.fixture(scope="module")
def models(make_dense, make_model):
    """A guide and a target of twelve layers."""
    dense = make_dense()
    config = dense.config
    config.text_config.num_hidden_layers = 12
    target = make_model(type(dense)._from_config(config, attn_implementation="sdpa").eval(), pointer="attention")
    return make_model(pointer="attention"), target


@pytest.fixture(scope="module")
def systems(models, processor, make_model):
    pointing = make_model(pointer="attention", attention_weights=[[1.0, 0.0]], attention_coverage=0.5)
    return guided_systems(*models, processor, 0.5, pointing, models[1])


@pytest.fixture(scope="module")
def rows(systems, processor):
    return evaluate_systems(systems, Cards("validation", 3), processor, 3, max_new_tokens=2, share_features=True)


def test_all_ways_are_in_the_table(rows):
    names = [row["system"] for row in rows]
    assert len(names) == len(set(names)) and names[:3] == ["dense", "guide", "guide, glance"]
    for share in ("64%", "35%", "9%"):
        assert {f"{name}, {share}" for name in ("sgl", "fastv", "divprune", "random")} <= set(names)
    for view in ("selection", "glance", "pointer"):
        assert f"sgl-before-encoder, {view}, m = 3" in names


def test_average_retention_is_that_of_the_name(systems):
    layers, tokens = 12, 272
    pairs = {system.name: system.model for system in systems if isinstance(system.model, GuidedVLM)}
    for average in RETENTIONS:
        guidance = pairs[f"sgl, {average:.0%}"].guidance
        shown = guidance.prune_layer / layers
        assert shown + (1 - shown) * guidance.retention == pytest.approx(average)
        fast = next(system for system in systems if system.name == f"fastv, {average:.0%}")
        shown = fast.method.prune_layer / layers
        kept = shown + (1 - shown) * fast.options["max_visual_tokens"] / tokens
        assert average <= kept < average + 1 / tokens
    with pytest.raises(ValueError, match=r"average \(0.09\): 2 of 12 layers see more"):
        retention_behind(0.09, 2, 12)


def test_rows_count_what_the_target_keeps(rows):
    found = {row["system"]: row for row in rows}
    assert found["random, 9%"]["visual_tokens_mean"] == 25 and found["sgl, 9%"]["visual_tokens_mean"] == 25
    assert found["sgl-before-encoder, m = 3"]["tiles_mean"] == 3
    assert found["sgl, 64%"]["tiles_mean"] == 16


def test_flops_of_a_pair_include_the_guide(systems, processor):
    chosen = [system for system in systems if system.name in ("dense", "guide", "sgl-before-encoder, m = 1")]
    rows = [{"system": system.name} for system in chosen]
    add_flops(rows, chosen, Cards("validation", 1), processor, 2, 1)
    dense, guide, pair = (row["flops"] for row in rows)
    assert pair["vision"] > guide["vision"] and pair["total"] > guide["total"]
    assert pair["vision"] == pytest.approx(guide["vision"] + 2 / 17 * dense["vision"], rel=1e-3)


def test_flops_of_a_guide_that_answers_alone(models, processor):
    pair = System("pair", GuidedVLM(*models, processor, exit_threshold=-1.0))
    rows = [{}]
    add_flops(rows, [pair], Cards("validation", 1), processor, 2, 1)
    assert rows[0]["flops"]["decode"] == 0 and rows[0]["flops"]["total"] > 0


def test_exits_are_counted(models, processor):
    pair = exit_pairs(*models, processor, 0.5)["sgl-exit"]
    systems = [System("dense", models[1], DENSE)]
    for threshold in (-1.0, 1.5):
        calibrated = GuidedVLM(*models, processor, prune_layer=12, exit_threshold=threshold)
        systems.append(System(f"at {threshold}", calibrated))
    rows = evaluate_systems(systems, Cards("validation", 3), processor, 3, max_new_tokens=2)
    assert rows[1]["answered_by_guide"] == 1 and rows[1]["tiles_mean"] == 0
    assert "answered_by_guide" not in rows[2] and rows[2]["accuracy"] == rows[0]["accuracy"]
    assert pair.guidance.prune_layer == 12 and pair.guidance.exit_threshold is None


def test_the_curve_goes_from_the_target_to_the_guide():
    answers = Answers(sureness=[0.9, 0.1, 0.5, 0.7])
    guide, target = np.array([1.0, 0, 0, 1]), np.array([1.0, 1, 1, 0])
    curve = exit_curve(answers, guide, target, points=5)
    assert [point["accuracy"] for point in curve] == [0.75, 0.75, 1.0, 0.75, 0.5]
    assert [point["threshold"] for point in curve] == [None, 0.9, 0.7, 0.5, 0.1]


def test_pruning_needs_enough_layers(make_model, processor):
    shallow = make_model(pointer="attention")
    with pytest.raises(ValueError, match="see more already"):
        pruning_systems(shallow, shallow, processor)
