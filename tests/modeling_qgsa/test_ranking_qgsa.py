"""The ranking of layers finds the ones that vision does not need."""

import copy

import pytest
import torch

from modeling_qgsa.ranking_qgsa import divergence, leave_out, read_prompt
from modeling_qgsa.schedule_qgsa import letters_of, parse_schedule, schedule_of


@pytest.fixture(scope="module")
def deep(make_deep):
    """Its third layer updates nothing, and its second one attends to nothing."""

    @torch.no_grad()
    def change(dense):
        layers = dense.model.text_model.layers
        layers[2].self_attn.o_proj.weight.zero_()
        layers[2].mlp.down_proj.weight.zero_()
        layers[1].self_attn.o_proj.weight.zero_()

    return make_deep(change)


@pytest.fixture
def samples(make_image):
    return [{"image": make_image(seed, 128, 64), "question": "what is it?"} for seed in range(3)]


def test_layers_without_effect_come_first(deep, samples, processor):
    model = copy.deepcopy(deep)
    found = model.rank_vision_layers(samples, processor)
    assert found["updates"][2] == pytest.approx(0, abs=1e-6) and min(found["updates"]) == found["updates"][2]
    assert found["schedules"][:2] == ["FFFF", "FFCF"] and found["schedules"][-1] == "TTTT"
    assert model.config.vision_ranking == found["schedules"] and len(found["divergence"]) == 9
    # Nothing attends to the keys of the second layer: once its updates are left out, so are they at no harm.
    number = next(n for n, each in enumerate(found["schedules"]) if each[1] == "T")
    assert found["divergence"][number] == pytest.approx(found["divergence"][number - 1], abs=1e-6)
    assert schedule_of(model.config, 0.9) == ("full", "full", "cross", "full")


def test_divergences_are_those_of_forward(deep, prepare, samples):
    inputs = prepare((samples[0]["question"], [samples[0]["image"]]))
    readings = [read_prompt(deep, inputs)]
    with torch.no_grad():
        full, *others = (
            deep(**inputs, vision_budget=each).logits[0, -1].log_softmax(0) for each in ("FFFF", "FCFF", "TTTT")
        )
    for letters, other in zip(("FCFF", "TTTT"), others):
        found = divergence(deep, readings, parse_schedule("schedule", letters, 4))
        assert found == pytest.approx(float((full.exp() * (full - other)).sum()), abs=1e-4)


def test_steps_go_where_harm_is_least():
    """Against all steps measured anew each time, for a harm in which steps add up to more than their sum."""
    weights = {0: 5.0, 1: 1.0, 2: 3.0}
    calls = []

    def harm(kinds):
        calls.append(kinds)
        gone = [weights[n] * (1.0 if kind == "cross" else 1.5) for n, kind in enumerate(kinds) if kind != "full"]
        return sum(gone) + 0.1 * len(gone) ** 2

    found = [letters_of(kinds) for kinds, _ in leave_out(harm, {"cross": 0.9, "text": 0.1}, 3)]
    assert found == ["FCF", "FCC", "FTC", "CTC", "CTT", "TTT"]
    assert len(calls) < 15  # every open step anew each time: 3 + 3 + 3 + 2 + 2 + 1 and more


@pytest.mark.parametrize("selection", ["dense", "after_encoder", "blocks"])
def test_every_selection_can_be_ranked(deep, samples, processor, selection):
    model = copy.deepcopy(deep)
    model.config.selection = selection
    found = model.rank_vision_layers(samples[:1], processor)
    assert all(value >= -1e-6 for value in found["updates"] + found["divergence"])


def test_bad_samples_change_nothing(deep, samples, processor):
    model = copy.deepcopy(deep).train()
    with pytest.raises(ValueError, match=r"samples \(0\)"):
        model.rank_vision_layers([], processor)
    with pytest.raises(ValueError, match="sample 1 of 2"):
        model.rank_vision_layers([samples[0], {"question": "?"}], processor)
    assert model.config.vision_ranking is None and model.training
