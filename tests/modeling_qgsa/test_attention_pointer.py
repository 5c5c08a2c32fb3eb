"""The attention pointer: its maps are the text model's own, and everything behind the seam holds for it too."""

import copy

import pytest
import torch

from modeling_qgsa import QGSAConfig, QGSASmolVLMForConditionalGeneration, VisualCache
from modeling_qgsa.layout_qgsa import VisualLayout
from modeling_qgsa.pointer_qgsa import (
    AttentionPointer,
    attention_layers,
    attention_scores,
    make_pointer,
    nowhere_share,
    tiles_to_cover,
)
from modeling_qgsa.request_qgsa import Request
from modeling_qgsa.selection_qgsa import positions_to_keep, splice
from modeling_qgsa.vision_qgsa import encode_tiles


FIXED = {"min_tiles": 2, "max_tiles": 2}


@pytest.fixture(scope="module")
def untrained(make_dense, tokenizer):
    """A model as `from_dense` makes it."""
    torch.manual_seed(0)
    return QGSASmolVLMForConditionalGeneration.from_dense(make_dense(), tokenizer, max_tiles=2).eval()


def point(model, inputs):
    request = Request.take(model.config, dict(inputs) | {"pointer": "attention"})
    return model.model.glance_and_point(request), request


def read(model, inputs, layers):
    """The pointer's maps, `(I, layers, 2, C)`, and the glances."""
    request = Request.take(model.config, dict(inputs) | {"pointer": "attention"})
    layout = request.layout
    glance = encode_tiles(model.model, request.visual, layout, layout.is_global)
    question = model.get_input_embeddings()(request.prompt.input_ids)[layout.image_sample]
    maps = make_pointer(model.model, "attention", request).read(question, request.question_mask, glance, layers)
    return maps, glance, request


def test_from_dense_points_with_attention_and_keeps_whole_tiles(untrained):
    config = untrained.config
    assert config.pointer == "attention"
    assert (config.min_visual_tokens, config.max_visual_tokens) == (16, 48)


def test_budgets_that_are_given_stay(make_dense, tokenizer):
    model = QGSASmolVLMForConditionalGeneration.from_dense(make_dense(), tokenizer, max_visual_tokens=40)
    assert (model.config.min_visual_tokens, model.config.max_visual_tokens) == (16, 40)


def test_a_checkpoint_without_the_field_has_a_selector():
    assert QGSAConfig().pointer == "selector"


def test_an_untrained_selector_is_refused(untrained, batch):
    with pytest.raises(ValueError, match=r"(?s)never trained.*attention.*calibrate.*train it"):
        untrained.generate(**batch, pointer="selector", max_new_tokens=2)


@torch.no_grad()
def test_one_training_step_makes_it_a_trained_one(make_dense, tokenizer, single):
    torch.manual_seed(0)
    model = QGSASmolVLMForConditionalGeneration.from_dense(make_dense(), tokenizer, pointer="selector").train()
    labels = single["input_ids"].masked_fill(single["question_mask"].bool(), -100)
    labels[:, :-2] = -100
    with torch.enable_grad():
        outputs = model(**single, labels=labels)
        (outputs.loss + outputs.glance.relevance.square().mean()).backward()
        torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    model.eval().select(**single)


def test_an_unknown_pointer_is_refused(untrained, batch):
    with pytest.raises(ValueError, match=r"pointer \('finger'\): choose from attention, selector"):
        untrained.generate(**batch, pointer="finger")
    with pytest.raises(Exception, match=r"pointer \('finger'\)"):
        QGSAConfig(pointer="finger")


@torch.no_grad()
def test_maps_are_the_attention_of_the_stock_model(untrained, batch):
    """Against whole attention maps of a plain pass over prompt and glance."""
    layers = untrained.config.text_config.num_hidden_layers
    maps, glance, request = read(untrained, batch, layers)
    eager = copy.deepcopy(untrained)
    eager.set_attn_implementation("eager")
    layout, prompt = request.layout, request.prompt
    tiles = layout.is_global[:, None].expand(-1, layout.tokens_per_tile)
    keep = positions_to_keep(prompt.attention_mask, layout, tiles)
    embeds = untrained.model.embed(prompt.input_ids, layout, glance, layout.is_global)
    for image, sample in enumerate(layout.image_sample.tolist()):
        row = slice(sample, sample + 1)
        parts = (embeds[row], 0.0), (prompt.position_ids[row], 0), (request.question_mask[image, None], False)
        (hidden, positions, words), kept = splice(keep[row], *parts)
        given = {"inputs_embeds": hidden, "position_ids": positions, "attention_mask": torch.ones_like(positions)}
        attentions = eager.model.text_model(**given, output_attentions=True, use_cache=False).attentions
        cells = torch.searchsorted(kept[0], layout.token_positions[layout.is_global][image])
        answer = int(torch.searchsorted(kept[0], request.answer_position[image]))
        assert answer == kept.shape[1] - 1
        for layer, attention in enumerate(attentions):
            mean = attention[0].mean(0)[:, cells]
            asked = mean[words[0]].amax(0)
            expected = torch.stack([asked / asked.sum(), mean[answer] / mean[answer].sum()])
            assert torch.allclose(maps[image, layer], expected, atol=1e-5)


@torch.no_grad()
def test_the_pass_ends_with_the_last_layer_that_is_read(untrained, batch):
    calls = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
        for number, layer in enumerate(untrained.model.text_model.layers)
    ]
    point(untrained, batch)
    for hook in hooks:
        hook.remove()
    layers = attention_layers(untrained.config.text_config.num_hidden_layers)
    assert calls == list(range(layers - 1))  # of the last one only queries and keys are computed


def test_three_quarters_of_the_layers_are_read():
    assert [attention_layers(layers) for layers in (1, 6, 30, 32)] == [1, 5, 23, 24]


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder", "blocks"])
def test_batch_equals_single(untrained, batch, samples, prepare, selection):
    options = {"selection": selection, "max_visual_tokens": 30}
    together = untrained.select(**batch, **options)
    for number, sample in enumerate(samples):
        alone = untrained.select(**prepare(sample), **options)
        tiles = alone.kept_tiles.shape[1]
        assert torch.equal(together.kept_tiles[number, :tiles], alone.kept_tiles[0])
        tokens = alone.kept_tokens.shape[1]
        assert torch.equal(together.kept_tokens[number, :tokens], alone.kept_tokens[0])
        assert torch.allclose(together.relevance[number], alone.relevance[0], atol=1e-5)


def test_images_of_one_prompt_are_read_in_one_pass(untrained, prepare, make_image):
    images = [make_image(0), make_image(1, 256, 64)]
    inputs = prepare(("which card is red?", images), ("how many cards are there?", [make_image(2, 64, 128)]))
    glance, _ = point(untrained, inputs)
    assert glance.relevance.shape[0] == 3
    assert torch.allclose(glance.relevance.exp().sum(1), torch.ones(3), atol=1e-5)
    selected = untrained.select(**inputs)
    assert selected.tiles.tolist() == [4, 2]


def test_everything_in_the_budget_is_dense(untrained, batch):
    most = {"max_tiles": 99, "min_tiles": 99, "min_visual_tokens": 9999, "max_visual_tokens": 9999}
    with torch.no_grad():
        dense = untrained(**batch, selection="dense").logits[:, -1]
        kept = untrained(**batch, **most).logits[:, -1]
    assert torch.allclose(dense, kept, atol=1e-4)


def test_the_tiles_stay_whole(untrained, batch):
    selected = untrained.select(**batch, **FIXED)
    assert selected.tiles.tolist() == [2, 2, 2]
    assert selected.visual_tokens.tolist() == [48, 48, 48]


def test_the_glance_stays_if_there_is_room_for_more(untrained, batch):
    layout = VisualLayout.of(untrained.config, batch["input_ids"])
    for sample in range(3):
        selected = untrained.select(**batch, min_visual_tokens=24, max_visual_tokens=24, **FIXED)
        glances = layout.tile_ordinal[layout.is_global & (layout.tile_sample == sample)]
        kept = selected.kept_tokens[sample].view(-1, layout.tokens_per_tile)
        assert kept[glances].all() and selected.visual_tokens[sample] == 24


def test_the_answer_is_hidden(untrained, single, tokenizer):
    """An answer in the prompt, labelled or closed in a turn of its own, changes nothing."""
    alone = untrained.select(**single)
    answer = torch.tensor([tokenizer(" star<end_of_utterance>", add_special_tokens=False)["input_ids"]])
    answered = {name: value for name, value in single.items() if name != "question_mask"}
    answered["input_ids"] = torch.cat([single["input_ids"], answer], 1)
    answered["attention_mask"] = torch.ones_like(answered["input_ids"])
    labels = answered["input_ids"].clone()
    labels[:, : -answer.shape[1]] = -100
    for given in ({}, {"labels": labels}):
        request = Request.take(untrained.config, {**answered, **given})
        assert request.answer_position.tolist() == [single["input_ids"].shape[1] - 1]
        assert torch.equal(untrained.select(**answered, **given).relevance, alone.relevance)


def test_a_visual_cache_changes_nothing(untrained, single):
    cache, options = VisualCache(), {"max_new_tokens": 3}
    first = untrained.generate(**single, **options)
    for _ in range(2):
        assert torch.equal(untrained.generate(**single, visual_cache=cache, **options), first)


def test_lazy_tiles_change_nothing(untrained, prepare, samples):
    eager, lazy = prepare(samples[0]), prepare(samples[0], lazy_tiles=True)
    assert torch.equal(untrained.generate(**eager, max_new_tokens=3), untrained.generate(**lazy, max_new_tokens=3))


def test_saved_equals_loaded(untrained, single, tmp_path):
    model = copy.deepcopy(untrained)
    weights = torch.rand(2, 2, generator=torch.Generator().manual_seed(0)).tolist()
    model.config.attention_weights, model.config.attention_temperature = weights, 0.1
    model.config.attention_coverage, model.config.attention_nowhere = 0.6, -1.0
    model.save_pretrained(tmp_path)
    loaded = QGSASmolVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.pointer == "attention"
    for name in ("weights", "temperature", "coverage", "nowhere"):
        assert getattr(loaded.config, f"attention_{name}") == getattr(model.config, f"attention_{name}")
    assert torch.equal(loaded.select(**single).relevance, model.select(**single).relevance)


def test_training_selects_as_inference_does(untrained, single):
    """Adapters can be trained on what the attention points at; the selection is hard and the selector idle."""
    model = copy.deepcopy(untrained).train()
    labels = single["input_ids"].clone()
    labels[:, :-2] = -100
    outputs = model(**single, labels=labels)
    outputs.loss.backward()
    assert torch.equal(outputs.selection.kept_tiles, untrained.select(**single, labels=labels).kept_tiles)
    assert all(weight.grad is not None for weight in model.model.selector.parameters())
    assert not any(weight.grad.any() for weight in model.model.selector.parameters())
    assert any(weight.grad.any() for weight in model.model.text_model.parameters())


def test_given_scores_take_precedence(untrained, single):
    layout = VisualLayout.of(untrained.config, single["input_ids"])
    scores = torch.zeros(1, len(layout.tile_row) * layout.tokens_per_tile)
    scores[0, 5 * 16 : 6 * 16] = 1
    selected = untrained.select(**single, visual_token_scores=scores, min_tiles=1, max_tiles=1)
    assert selected.kept_tiles[0, :16].nonzero().tolist() == [[5]]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_weights": []},
        {"attention_weights": [[1.0, 2.0, 3.0]]},
        {"attention_weights": [[1.0, 2.0]] * 99},
        {"attention_temperature": 0},
        {"attention_coverage": 0},
        {"attention_coverage": 1.5},
    ],
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(Exception, match=next(iter(changes))):
        QGSAConfig(**changes)


# The arithmetic behind it


def test_scores_take_the_stronger_row():
    """A row whose layers agree stands out; one whose layers do not is averaged away."""
    maps = torch.full((1, 4, 2, 4), 0.1)
    maps[0, :, 0, 2] = 0.7  # every layer points at cell 2
    for layer in range(4):
        maps[0, layer, 1, layer] = 0.7
    scores = attention_scores(maps, None)
    assert scores.argmax(1).tolist() == [2]
    assert scores[0, 2] > scores[0, 0]
    assert torch.allclose(attention_scores(maps.flip(2), None), scores)


def test_weights_combine_the_maps():
    maps = torch.rand(2, 3, 2, 4)
    weights = [[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]]
    assert torch.allclose(attention_scores(maps, weights), maps[:, 0, 0] - 2 * maps[:, 1, 1])


def test_tiles_that_cover(batch, untrained):
    layout = VisualLayout.of(untrained.config, batch["input_ids"])
    mass = torch.where(layout.is_global, 0.0, torch.where(layout.tile_ordinal == 1, 0.6, 0.0))
    others = ~layout.is_global & (layout.tile_ordinal != 1)
    mass = torch.where(others, 0.4 / torch.bincount(layout.tile_image[others])[layout.tile_image], mass)
    nothing = torch.zeros(3)
    assert tiles_to_cover(mass, layout, 0.5, nothing).tolist() == [1, 1, 1]
    assert tiles_to_cover(mass, layout, 0.75, nothing).tolist() == [7, 3, 4]
    assert tiles_to_cover(mass, layout, 1, nothing).tolist() == layout.grids.prod(1).tolist() == [16, 4, 8]
    assert tiles_to_cover(mass, layout, 0.5, nothing + 0.6).tolist() == [0, 0, 0]
    assert tiles_to_cover(mass, layout, 0.75, nothing + 0.4).tolist() == [1, 1, 1]


def test_the_share_of_looking_nowhere():
    scores = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    assert nowhere_share(scores, 1.0, None).tolist() == [0, 0]
    expected = torch.cat([torch.full((2, 1), 2.0), scores], 1).div(0.5).softmax(1)[:, 0]
    assert torch.allclose(nowhere_share(scores, 0.5, 2.0), expected)


def test_the_pointer_names_itself(untrained, batch):
    glance, _ = point(untrained, batch)
    assert isinstance(glance.pointer, AttentionPointer)
