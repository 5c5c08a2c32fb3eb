"""The ranking of layers finds the ones that vision does not need."""

import copy

import pytest
import torch

from modeling_qgsa.interaction_qgsa import schedule_of
from modeling_qgsa.ranking_qgsa import divergences, one_layer


@pytest.fixture(scope="module")
def deep(make_dense, make_model):
    """A model of four layers, of which the third updates nothing, and the second attends to nothing."""
    config = copy.deepcopy(make_dense().config)
    config.text_config.num_hidden_layers = 4
    torch.manual_seed(3)
    dense = type(make_dense())._from_config(config, attn_implementation="sdpa").eval()
    dense.generation_config.pad_token_id = config.text_config.pad_token_id
    with torch.no_grad():
        layer = dense.model.text_model.layers[2]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        dense.model.text_model.layers[1].self_attn.o_proj.weight.zero_()
    return make_model(dense, pointer="attention", keep_tile_markers=True)


@pytest.fixture
def samples(make_image):
    return [{"image": make_image(seed, 128, 64), "question": "what is it?"} for seed in range(3)]


def test_layers_without_effect_come_first(deep, samples, processor):
    model = copy.deepcopy(deep)
    found = model.rank_vision_layers(samples, processor)
    assert found["updates"][2] == pytest.approx(0, abs=1e-6) and found["nothing"][2] == pytest.approx(0, abs=1e-6)
    # Where nothing is attended to, keys and values do not matter, but what the MLP makes of visual tokens does.
    assert found["nothing"][1] == pytest.approx(found["updates"][1], abs=1e-6) and found["updates"][1] > 1e-6
    assert [order[0] for order in model.config.vision_ranking] == [2, 2]
    assert schedule_of(model.config, 0.9) == one_layer("cross", 2, 4)


def test_divergences_are_those_of_forward(deep, prepare, samples):
    inputs = prepare((samples[0]["question"], [samples[0]["image"]]))
    schedules = ["FCFF", "TTTT"]
    kinds = {"F": "full", "C": "cross", "T": "text"}
    found = divergences(deep, inputs, [[kinds[letter] for letter in schedule] for schedule in schedules])
    with torch.no_grad():
        full, *others = (
            deep(**inputs, vision_budget=each).logits[0, -1].log_softmax(0) for each in ("FFFF", *schedules)
        )
    expected = [float((full.exp() * (full - other)).sum()) for other in others]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("selection", ["dense", "after_encoder", "blocks"])
def test_every_selection_can_be_ranked(deep, samples, processor, selection):
    model = copy.deepcopy(deep)
    model.config.selection = selection
    found = model.rank_vision_layers(samples[:1], processor)
    assert all(value >= -1e-6 for values in found.values() for value in values)


def test_bad_samples_change_nothing(deep, samples, processor):
    model = copy.deepcopy(deep).train()
    with pytest.raises(ValueError, match=r"samples \(0\)"):
        model.rank_vision_layers([], processor)
    with pytest.raises(ValueError, match="sample 1 of 2"):
        model.rank_vision_layers([samples[0], {"question": "?"}], processor)
    assert model.config.vision_ranking is None and model.training
