"""One request per call: what it takes, what it leaves, and when there is something to select."""

import inspect
from dataclasses import fields

import pytest
import torch

from modeling_qgsa import QGSAConfig
from modeling_qgsa.configuration_qgsa import Budget, LimitKwargs
from modeling_qgsa.request_qgsa import REQUEST_NAMES, STOCK_NAMES, Request


@pytest.fixture
def config(model):
    return model.config


def test_the_budget_has_one_list_of_names():
    names = [each.name for each in fields(Budget)]
    assert {name: getattr(QGSAConfig(), name) for name in names} == vars(Budget())
    assert set(names) | set(STOCK_NAMES) < set(REQUEST_NAMES)


def test_a_request_takes_its_own_arguments_and_leaves_the_rest(config, batch):
    kwargs = {**batch, "max_tiles": 2, "use_cache": False, "max_new_tokens": 3}
    request = Request.take(config, kwargs)
    assert kwargs == {"use_cache": False, "max_new_tokens": 3}
    assert request.selects and request.budget.max_tiles == 2
    assert torch.equal(request.prompt.input_ids, batch["input_ids"])


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder", "blocks"])
@pytest.mark.parametrize("number", [1, 9, 16, 40, 1000])
def test_one_number_bounds_the_tokens_of_every_image(number, selection, model, batch):
    """In `select`, `forward` and `generate` alike; 1000 is more than there are."""
    given = {**batch, "selection": selection, "max_image_tokens": number}
    with torch.no_grad():
        found = model.select(**given)
        forward = model(**given).selection
        generated = model.generate(**given, max_new_tokens=1, return_dict_in_generate=True).selection
    assert found.visual_tokens.max() <= number
    assert torch.equal(found.kept_tokens, forward.kept_tokens)
    assert torch.equal(found.kept_tokens, generated.kept_tokens)
    if selection != "after_encoder":
        assert found.tiles.max() <= max(-(-number // 16) - 1, -(-number * 4 // 48))  # 4 for 48 are configured
    if number == 1000:
        assert found.visual_tokens.max() > model.config.max_visual_tokens


def test_one_number_against_a_budget_of_the_same_call_is_refused(model, batch):
    for call in (model.select, model, model.generate):
        with pytest.raises(ValueError, match="max_image_tokens .40.* contradicts max_visual_tokens .48"):
            call(**batch, max_image_tokens=40, max_visual_tokens=48)
        with pytest.raises(ValueError, match='max_image_tokens .40.* "dense"'):
            call(**batch, max_image_tokens=40, selection="dense")


@pytest.mark.parametrize("given", [{"selection": "dense"}, {"pixel_values": None}])
def test_the_stock_model_takes_what_selects_nothing(given, config, batch):
    request = Request.take(config, {**batch, **given})
    assert not request.selects and request.stock["input_ids"] is batch["input_ids"]
    assert set(request.stock) <= {*batch, "position_ids", "inputs_embeds"}


@pytest.mark.parametrize("variant", ["before_encoder", "after_encoder", "blocks"])
def test_images_beside_embeddings_are_refused(variant, model, batch):
    """Without ids there is no layout to select from, and encoding every tile instead would not be said."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    given = {**batch, "input_ids": None, "inputs_embeds": embeds, "selection": variant}
    message = f'inputs_embeds with images: {variant!r} reads .* input_ids; .*selection="dense"'
    for call in (model, model.generate, model.select):
        with pytest.raises(ValueError, match=message):
            call(**given)


@pytest.mark.parametrize("name", ["image_hidden_states", "lazy_tiles", "visual_cache"])
def test_dense_refuses_by_name(name, config, batch):
    with pytest.raises(ValueError, match=f'{name}: not available with selection="dense"'):
        Request.take(config, {**batch, name: object(), "selection": "dense"})


def test_unknown_arguments_of_select_are_named(model, batch):
    with pytest.raises(TypeError, match=r"select\(\) got unexpected arguments: max_tilez"):
        model.select(**batch, max_tilez=2)


def test_there_is_nothing_to_select_without_images(model, prepare):
    with pytest.raises(ValueError, match="pixel_values is missing"):
        model.select(**prepare(("how many cards are there?", [])))


def test_upstream_finds_every_input_in_the_signature(model):
    """Trainer drops the columns of a data set that `forward` does not name, and `generate` refuses such arguments."""
    own = set(LimitKwargs.__annotations__) | {"positions"}
    assert set(REQUEST_NAMES) - own <= set(inspect.signature(model.forward).parameters)
    assert set(STOCK_NAMES) <= set(inspect.signature(model.model.forward).parameters)


def test_the_first_arguments_can_be_given_by_position(model, single):
    pixels = single["pixel_values"]
    rest = {name: single[name] for name in ("pixel_attention_mask", "attention_mask", "question_mask")}
    expected = model.select(**single)
    assert torch.equal(model.select(single["input_ids"], pixels, **rest).kept_tokens, expected.kept_tokens)
    mask, question = single["attention_mask"], single["question_mask"]
    with torch.no_grad():
        named = model.model(**single).last_hidden_state
        places = (single["input_ids"], mask, None, None, None, pixels, single["pixel_attention_mask"])
        assert torch.equal(model.model(*places, question_mask=question).last_hidden_state, named)


@pytest.mark.parametrize("selection", ["before_encoder", "dense"])
def test_labels_change_nothing_in_generate(selection, model, single):
    """As in stock: an evaluation loop passes the whole batch."""
    expected = model.generate(**single, selection=selection, max_new_tokens=3)
    labels = single["input_ids"].clone()
    assert torch.equal(model.generate(**single, labels=labels, selection=selection, max_new_tokens=3), expected)
