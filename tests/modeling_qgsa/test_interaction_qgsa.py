"""From some layer on, the text model sees only the kept tokens: against a plain pass that hides all others there."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_qgsa.layout_qgsa import VisualLayout
from training.methods.method import encode_all


LAYERS = 4
WHOLE = {"selection": "after_encoder"}
EVERYTHING = {"min_visual_tokens": 9999, "max_visual_tokens": 9999}
KEPT = {"min_visual_tokens": 7, "max_visual_tokens": 7}


@pytest.fixture(scope="module")
def deep(make_dense, make_model):
    """A model of four layers."""
    dense = make_dense()
    config = copy.deepcopy(dense.config)
    config.text_config.num_hidden_layers = LAYERS
    torch.manual_seed(3)
    dense = type(dense)._from_config(config, attn_implementation="sdpa").eval()
    dense.generation_config.pad_token_id = config.text_config.pad_token_id
    return make_model(dense, pointer="attention", keep_tile_markers=True)


@pytest.fixture(scope="module")
def scores(deep, batch):
    layout = VisualLayout.of(deep.config, batch["input_ids"])
    most = int(layout.tiles_per_sample.max()) * layout.tokens_per_tile
    return torch.rand(len(batch["input_ids"]), most, generator=torch.Generator().manual_seed(0))


def rows(inputs, row):
    """One sample of a batch, without its padding."""
    shown = inputs["attention_mask"][row].bool()
    tiles = inputs["pixel_values"][row].flatten(1).any(1)
    texts = {name: inputs[name][row, shown][None] for name in ("input_ids", "attention_mask", "question_mask")}
    return texts | {name: inputs[name][row, tiles][None] for name in ("pixel_values", "pixel_attention_mask")}


@torch.no_grad()
def reference(model, inputs, scores, layer, new_tokens):
    """Greedy ids, by eager attention over the whole prompt, with dropped tokens hidden from later layers."""
    kept = model.select(**inputs, **WHOLE, **KEPT, visual_token_scores=scores).keep_indices[0]
    ids = inputs["input_ids"]
    embeds = model.model.get_input_embeddings()(ids)
    features = model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"], return_dict=True)
    features = torch.cat(list(features.pooler_output)).flatten(0, -2)
    embeds[ids == model.config.image_token_id] = features
    stays = torch.zeros(ids.shape[1], dtype=torch.bool)
    stays[kept] = True
    text = copy.deepcopy(model.model.text_model)
    text.set_attn_implementation("eager")
    made = []
    for _ in range(new_tokens):
        length = embeds.shape[1]
        positions = torch.arange(length)[None]
        rotary, hidden = text.rotary_emb(embeds, positions), embeds
        causal = torch.full((length, length), float("-inf")).triu(1)
        hidden_columns = torch.zeros(length, dtype=torch.bool)
        hidden_columns[: len(stays)] = ~stays
        later = causal.masked_fill(hidden_columns[None], float("-inf"))
        later.fill_diagonal_(0)
        for number, each in enumerate(text.layers):
            mask = (causal if number < layer else later)[None, None]
            hidden = each(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        made.append(int(model.lm_head(text.norm(hidden[:, -1:])).argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([made[-1:]]))], 1)
    return made


@pytest.mark.parametrize("layer", [1, 3])
def test_equals_a_plain_pass_that_hides_what_was_dropped(deep, batch, scores, layer):
    ids = deep.generate(**batch, **WHOLE, **KEPT, visual_token_scores=scores, prune_layer=layer, max_new_tokens=5)
    for row in range(len(ids)):
        one = rows(batch, row)
        tokens = one["pixel_values"].shape[1] * 16
        expected = reference(deep, one, scores[row : row + 1, :tokens], layer, 5)
        assert ids[row, -5:].tolist() == expected


@pytest.mark.parametrize("selection", ["after_encoder", "before_encoder", "blocks"])
def test_layer_0_prunes_before_the_text_model(deep, batch, scores, selection):
    options = {"selection": selection, **KEPT, "visual_token_scores": scores, "max_new_tokens": 4}
    assert torch.equal(deep.generate(**batch, **options, prune_layer=0), deep.generate(**batch, **options))


def test_everything_kept_is_dense_bit_for_bit(deep, single, batch):
    most = {"min_tiles": 99, "max_tiles": 99, "prune_layer": LAYERS}
    dense, padded = (deep(**inputs, selection="dense").logits for inputs in (single, batch))
    features = encode_all(deep, single)  # all at once, as stock encodes them
    shown = batch["attention_mask"].bool()
    for options in (WHOLE | EVERYTHING | {"prune_layer": 2}, EVERYTHING | most):
        assert torch.equal(deep(**single, **options, image_hidden_states=features).logits, dense)
        assert torch.allclose(deep(**batch, **options).logits[shown], padded[shown], atol=1e-4)


def test_behind_the_last_layer_nothing_is_pruned(deep, batch, scores):
    options = WHOLE | KEPT | {"visual_token_scores": scores, "prune_layer": LAYERS}
    assert torch.equal(
        deep.generate(**batch, **options, max_new_tokens=4),
        deep.generate(**batch, selection="dense", max_new_tokens=4),
    )


def test_each_layer_holds_what_it_saw(deep, batch, scores):
    cache = DynamicCache(config=deep.config.text_config)
    options = WHOLE | KEPT | {"visual_token_scores": scores, "prune_layer": 2}
    with torch.no_grad():
        outputs = deep(**batch, **options, past_key_values=cache)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    long, short = batch["input_ids"].shape[1], outputs.selection.keep_indices.shape[1]
    assert lengths == [long, long, short, short] and short < long
    assert outputs.selection.visual_tokens.tolist() == [7, 7, 7]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_equals_uncached(deep, batch, scores, attention):
    model = copy.deepcopy(deep)
    model.set_attn_implementation(attention)
    options = WHOLE | KEPT | {"visual_token_scores": scores, "prune_layer": 2}
    ids = model.generate(**batch, **options, max_new_tokens=4)
    length = batch["input_ids"].shape[1]
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    images = {name: batch[name] for name in ("pixel_values", "pixel_attention_mask")}
    for step in range(4):
        new = ids[:, length : length + step]
        grown = {
            "input_ids": torch.cat([text["input_ids"], new], 1),
            "attention_mask": torch.cat([text["attention_mask"], torch.ones_like(new)], 1),
            "question_mask": torch.cat([batch["question_mask"], torch.zeros_like(new)], 1),
        }
        logits = model(**grown, **images, **options, use_cache=False).logits
        assert torch.equal(logits[:, -1].argmax(-1), ids[:, length + step])


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_decoding_methods(deep, batch, scores, options):
    pruned = WHOLE | KEPT | {"visual_token_scores": scores, "max_new_tokens": 4}
    torch.manual_seed(0)
    ids = deep.generate(**batch, **pruned, prune_layer=0, **options)
    torch.manual_seed(0)
    same = deep.generate(**batch, **pruned, **options)
    assert torch.equal(ids, same)
    torch.manual_seed(0)
    later = deep.generate(**batch, **pruned, prune_layer=2, **options)
    assert later.shape[0] == ids.shape[0]


def test_beams_equal_those_without_a_cache(deep, batch, scores):
    options = WHOLE | KEPT | {"visual_token_scores": scores, "prune_layer": 2, "num_beams": 3, "max_new_tokens": 4}
    together = deep.generate(**batch, **options)
    for row in range(len(together)):
        one = rows(batch, row)
        tokens = one["pixel_values"].shape[1] * 16
        alone = deep.generate(**one, **options | {"visual_token_scores": scores[row : row + 1, :tokens]})
        assert torch.equal(together[row, -4:], alone[0, -4:])


def test_a_second_turn_on_a_pruned_cache(deep, single, tokenizer):
    """As if the whole conversation had been read at once, with the same tokens dropped from the same layers."""
    n = 17 * 16
    scores = torch.rand(1, n, generator=torch.Generator().manual_seed(1))
    options = WHOLE | KEPT | {"prune_layer": 2}
    cache = DynamicCache(config=deep.config.text_config)
    with torch.no_grad():
        deep(**single, **options, visual_token_scores=scores, past_key_values=cache)
        more = tokenizer(" two<end_of_utterance>\nUser: and where?", return_tensors="pt", add_special_tokens=False)
        later = deep(input_ids=more["input_ids"], past_key_values=cache).logits
        whole = torch.cat([single["input_ids"], more["input_ids"]], 1)
        question = torch.cat([single["question_mask"], torch.zeros_like(more["input_ids"])], 1)
        inputs = single | {"input_ids": whole, "attention_mask": torch.ones_like(whole), "question_mask": question}
        together = deep(**inputs, **options, visual_token_scores=scores).logits
    assert torch.allclose(later, together[:, -later.shape[1] :], atol=1e-4)


def test_a_second_image_on_a_pruned_cache(deep, prepare, make_image):
    options = WHOLE | {"min_visual_tokens": 5, "max_visual_tokens": 5, "prune_layer": 2}
    first, second = (prepare(("what is it?", [make_image(seed, 128, 64)])) for seed in (0, 1))
    cache = DynamicCache(config=deep.config.text_config)
    with torch.no_grad():
        deep(**first, **options, past_key_values=cache)
        del second["attention_mask"]
        after = deep(**second, **options, past_key_values=cache)
        joined = {name: torch.cat([first[name], second[name]], 1) for name in second}
        together = deep(**joined, **options)
    assert after.selection.visual_tokens.tolist() == [5]
    lengths = {layer.get_seq_length() for layer in cache.layers}
    assert len(lengths) == 2
    assert together.logits.shape[1] == first["input_ids"].shape[1] + after.logits.shape[1]


def test_a_copied_cache_goes_on(deep, single):
    options = WHOLE | KEPT | {"prune_layer": 2, "max_new_tokens": 3, "return_dict_in_generate": True}
    output = deep.generate(**single, **options)
    token = output.sequences[:, -1:]
    with torch.no_grad():
        one = deep(input_ids=token, past_key_values=copy.deepcopy(output.past_key_values)).logits
        other = deep(input_ids=token, past_key_values=output.past_key_values).logits
    assert torch.equal(one, other)


def test_training_on_given_scores(deep, single):
    model = copy.deepcopy(deep).train()
    labels = single["input_ids"].clone()
    labels[:, :-3] = -100
    scores = torch.rand(1, 17 * 16)
    model(**single, **WHOLE, **KEPT, labels=labels, visual_token_scores=scores, prune_layer=2).loss.backward()
    assert all(layer.mlp.up_proj.weight.grad.any() for layer in model.model.text_model.layers)


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"prune_layer": 5}, r"prune_layer \(5\) must be in 0 .. 4"),
        ({"prune_layer": -1}, r"prune_layer \(-1\)"),
        ({"prune_layer": True}, r"prune_layer \(True\)"),
        ({"prune_layer": 2, "selection": "dense"}, r'prune_layer \(2\): not available with selection="dense"'),
        ({"prune_layer": 2, "output_hidden_states": True}, "output_hidden_states: not available"),
        ({"prune_layer": 2, "complexity": torch.ones(2)}, r"complexity has shape \(2,\)"),
        ({"complexity": torch.full((1,), 1.5)}, "complexity ranges from 1.5"),
    ],
)
def test_bad_input(deep, single, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        deep(**single, **{"selection": "after_encoder"} | options)


def test_caches_that_do_not_fit_are_refused(deep, single):
    options = WHOLE | KEPT | {"prune_layer": 2}
    with pytest.raises(ValueError, match="StaticCache"):
        cache = StaticCache(config=deep.config.text_config, max_cache_len=600)
        deep(**single, **options, past_key_values=cache)
    with torch.no_grad():
        cache = deep(**single, **options).past_key_values
        more = {"input_ids": single["input_ids"][:, -4:]}
        expected = deep(**more, past_key_values=copy.deepcopy(cache)).logits
        deep(**more, past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :-4], layer.values[:, :, :-4]
        assert torch.equal(deep(**more, past_key_values=copy.deepcopy(cache)).logits, expected)
        cache.layers[-1].keys, cache.layers[2].keys = (cache.layers[0].keys[:, :, :-1],) * 2
    with pytest.raises(ValueError, match="it was cropped"):
        deep(**more, past_key_values=cache)


def test_the_relaxed_selection_of_training_is_refused(make_model, single):
    model = make_model().train()
    with pytest.raises(ValueError, match="prune_layer"):
        model(**single, prune_layer=1)


# Scores and complexity from elsewhere


def test_given_complexity_spends_the_budget(deep, batch):
    for complexity, tiles in ((0.0, 0), (0.5, 2), (1.0, 4)):
        given = {"complexity": torch.full((3,), complexity), "min_tiles": 0, "max_tiles": 4}
        assert deep.select(**batch, **given).tiles.tolist() == [tiles] * 3


def test_given_scores_and_budget_need_no_pointer(deep, batch, scores, monkeypatch):
    expected = deep.generate(**batch, visual_token_scores=scores, min_tiles=1, max_tiles=1, **KEPT, max_new_tokens=2)
    monkeypatch.setattr("modeling_qgsa.modeling_qgsa.make_pointer", None)
    given = {"visual_token_scores": scores, "min_tiles": 1, "max_tiles": 1, **KEPT, "max_new_tokens": 2}
    assert torch.equal(deep.generate(**batch, **given), expected)
    adaptive = {"visual_token_scores": scores, "complexity": torch.ones(3), "max_new_tokens": 2}
    deep.generate(**batch, **adaptive)
