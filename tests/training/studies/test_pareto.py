import pytest
import torch

from training.data.cards import Cards
from training.evaluation.rows import evaluate_systems
from training.evaluation.systems import DENSE, System
from training.methods import METHODS
from training.studies.pareto import BUDGETS, check_same_encoder, format_pareto, make_systems, pareto_front, spend


def row(name, flops, accuracy):
    return {"system": name, "flops": {"total": flops}, "accuracy": accuracy}


def test_the_front_is_what_nothing_beats():
    rows = [row("a", 1, 0.5), row("b", 2, 0.5), row("c", 2, 0.7), row("d", 3, 0.6), row("e", 4, 0.9)]
    assert pareto_front(rows) == {"a", "c", "e"}
    assert pareto_front([row("a", 1, 0.5), row("twin", 1, 0.5)]) == {"a", "twin"}


def test_every_method_is_there_at_every_budget():
    systems = make_systems(None, None, None)
    names = [system.name for system in systems]
    for tokens in BUDGETS:
        for name in (
            "random",
            "centre",
            "fastv",
            "visionzip",
            "divprune",
            "cdpruner",
            "qgsa",
            "qgsa-blocks",
            *METHODS,
        ):
            assert names.count(f"{name}, k = {tokens}") == 1
            assert systems[names.index(f"{name}, k = {tokens}")].method is METHODS.get(name)
    assert {"random", "centre", "fastv", "visionzip", "divprune", "cdpruner"} <= set(METHODS)
    assert names[0] == "dense" and {"blank-image", "dense-half-resolution"} <= set(names)
    assert list(BUDGETS) == [8, 17, 32, 64]


def test_shared_features_change_no_answer(model, processor):
    """Of systems that encode whole tiles; blocks and dense encode for themselves."""
    dense = System("dense", model, DENSE)
    few = [System(name, model, spend(2, 12, name)) for name in ("before_encoder", "after_encoder", "blocks")]
    questions = Cards("validation", 6)
    runs = [evaluate_systems([dense, *few], questions, processor, 3, 3, share_features=shared) for shared in (0, 1)]
    for one, other in zip(*runs):
        for timed in ("seconds_median", "speedup_vs_dense"):
            del one[timed], other[timed]
        assert one == other


def test_the_table_marks_the_front():
    rows = [
        {
            "system": name,
            "accuracy": accuracy,
            "delta_vs_dense_pp": 100 * accuracy - 90,
            "delta_ci95": [-1.0, 1.0],
            "visual_tokens_mean": 17,
            "tiles_mean": 1,
            "flops": {"vision": 1e9, "prefill": 1e9, "total": total, "cross_modal_attention": None},
        }
        for name, accuracy, total in (("dense", 0.9, 4e9), ("qgsa", 0.9, 2e9))
    ]
    table = format_pareto(rows)
    assert "| **qgsa** | +0.0 [-1.0, +1.0] | 17.0 | 1.00 | 1.000 | 1.000 | 2.000 |" in table and "| dense |" in table


def test_another_encoder_cannot_share_features(make_model, model):
    other = make_model()
    check_same_encoder(model, other, ("a", "b"))
    with torch.no_grad():
        other.model.vision_model.post_layernorm.weight[0] += 1
    with pytest.raises(
        ValueError, match=r"base_model \(a\): its encoder differs from that of model b in post_layernorm"
    ):
        check_same_encoder(model, other, ("a", "b"))
