"""The systems that `--systems` can name."""

import pytest

from training.evaluation.systems import choose_systems, standard_systems
from training.methods import METHODS


DEFAULT = [
    "dense",
    "dense-finetuned",
    "dense-global-only",
    "blank-image",
    "random",
    "centre",
    "qgsa",
    "qgsa-after-encoder",
]


def test_every_method_follows_the_default_systems(model):
    systems = standard_systems(model, "finetuned")
    names = [system.name for system in systems]
    assert names[: len(DEFAULT)] == DEFAULT
    assert names[len(DEFAULT) :] == ["qgsa-attention", *(name for name in METHODS if name not in DEFAULT)]
    for system in systems:
        assert system.method is METHODS.get(system.name)
        own = system.name in ("dense", *DEFAULT[2:4], "qgsa-attention")
        assert system.model == (model if own else "finetuned")


def test_systems_are_chosen_by_name_in_the_order_of_the_table():
    chosen = choose_systems(["qgsa", "vispruner", "random", "dense"], None, None)
    assert [system.name for system in chosen] == ["dense", "random", "qgsa", "vispruner"]


@pytest.mark.parametrize(
    "names, complaint",
    [
        (["dense", "qgsa", "magic"], r"systems \(magic\): unknown; choose from dense, .*, vispruner"),
        (["dense", "random"], r"systems \(dense, random\): must include dense and qgsa"),
    ],
)
def test_systems_that_cannot_be_chosen(names, complaint):
    with pytest.raises(ValueError, match=complaint):
        choose_systems(names, None, None)


def test_a_former_name_works_with_a_warning(capsys):
    assert choose_systems(["dense", "dense-tuned", "qgsa"], None, None)[1].name == "dense-finetuned"
    assert "dense-tuned is now called dense-finetuned" in capsys.readouterr().err


def test_methods_run_at_the_checkpoints_own_budgets(model):
    for system in standard_systems(model, model):
        budget = system.budget
        if system.name == "qgsa-attention":  # whole tiles, whatever the checkpoint was trained to read
            assert (budget.min_tiles, budget.min_visual_tokens) == (4, 80)
            continue
        assert (budget.min_visual_tokens, budget.max_visual_tokens) == (8, 48), system.name
        if system.method:
            assert budget.selection == system.method.selection
