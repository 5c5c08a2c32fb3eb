"""From some layer on, the text model sees only the kept tokens: against a plain pass that hides all others there."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache
from turns import check_turns_of_text

from modeling_qgsa import QGSAConfig
from modeling_qgsa.compat_qgsa import CACHE
from modeling_qgsa.layout_qgsa import VisualLayout
from modeling_qgsa.request_qgsa import Request
from modeling_qgsa.schedule_qgsa import cross_share, schedule_of, shortlist
from training.methods.method import encode_all


WHOLE = {"selection": "after_encoder"}
EVERYTHING = {"min_visual_tokens": 9999, "max_visual_tokens": 9999}
KEPT = {"min_visual_tokens": 7, "max_visual_tokens": 7}


@pytest.fixture(scope="module")
def deep(make_deep):
    return make_deep()


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


def whole_prompt(model, inputs):
    """Embeddings of one sample, everything encoded; which of them are visual; the text model in eager attention."""
    ids = inputs["input_ids"]
    embeds, visual = model.get_input_embeddings()(ids), ids[0] == model.config.image_token_id
    embeds[0, visual] = encode_all(model, inputs).flatten(0, 1)
    text = copy.deepcopy(model.model.text_model)
    text.set_attn_implementation("eager")
    return embeds, visual, text


@torch.no_grad()
def reference(model, inputs, scores, layer, new_tokens):
    """Greedy ids, by eager attention over the whole prompt, with dropped tokens hidden from later layers."""
    kept = model.select(**inputs, **WHOLE, **KEPT, visual_token_scores=scores).keep_indices[0]
    embeds, visual, text = whole_prompt(model, inputs)
    stays = torch.zeros(len(visual), dtype=torch.bool)
    stays[kept] = True
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
    most = {"min_tiles": 99, "max_tiles": 99, "prune_layer": 4}
    dense, padded = (deep(**inputs, selection="dense").logits for inputs in (single, batch))
    features = encode_all(deep, single)  # all at once, as stock encodes them
    shown = batch["attention_mask"].bool()
    for options in (WHOLE | EVERYTHING | {"prune_layer": 2}, EVERYTHING | most):
        assert torch.equal(deep(**single, **options, image_hidden_states=features).logits, dense)
        assert torch.allclose(deep(**batch, **options).logits[shown], padded[shown], atol=1e-4)


def test_behind_the_last_layer_nothing_is_pruned(deep, batch, scores):
    options = WHOLE | KEPT | {"visual_token_scores": scores, "prune_layer": 4}
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
        one = deep(input_ids=token, past_key_values=copy.deepcopy(output[CACHE])).logits
        other = deep(input_ids=token, past_key_values=output[CACHE]).logits
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
        cache = deep(**single, **options)[CACHE]
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


# Schedules: how vision takes part in each layer

SCHEDULES = ["FFCC", "CCCC", "FCTF", "TTTT", "CFTC", "TFFT"]


@torch.no_grad()
def scheduled(model, inputs, schedule, new_tokens):
    """Greedy ids, by eager attention over the whole prompt, with visual tokens that stay or are hidden, by layer."""
    embeds, visual, text = whole_prompt(model, inputs)
    made = []
    for _ in range(new_tokens):
        length = embeds.shape[1]
        positions = torch.arange(length)[None]
        rotary, hidden = text.rotary_emb(embeds, positions), embeds
        is_visual = torch.nn.functional.pad(visual, (0, length - len(visual)))
        causal = torch.full((length, length), float("-inf")).triu(1)
        hiding = causal.masked_fill(is_visual[None] & ~is_visual[:, None], float("-inf"))
        for kind, each in zip(schedule, text.layers):
            mask = (hiding if kind == "T" else causal)[None, None]
            updated = each(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            hidden = updated if kind == "F" else torch.where(is_visual[None, :, None], hidden, updated)
        made.append(int(model.lm_head(text.norm(hidden[:, -1:])).argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([made[-1:]]))], 1)
    return made


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_equals_a_plain_pass(deep, batch, schedule, attention):
    model = copy.deepcopy(deep)
    model.set_attn_implementation(attention)
    ids = model.generate(**batch, **WHOLE, **EVERYTHING, vision_budget=schedule, max_new_tokens=5)
    for row in range(len(ids)):
        assert ids[row, -5:].tolist() == scheduled(deep, rows(batch, row), schedule, 5)


def test_all_layers_full_are_dense_bit_for_bit(deep, single):
    features = encode_all(deep, single)
    dense = deep(**single, selection="dense").logits
    outputs = deep(**single, **WHOLE, **EVERYTHING, image_hidden_states=features, vision_budget="FFFF")
    assert torch.equal(outputs.logits, dense)
    request = Request.take(deep.config, dict(single) | {"vision_budget": "FFFF"})
    assert deep.model.prefill(request).interaction is None


@pytest.mark.parametrize("schedule", ["FCTF", "CCTT"])
def test_a_schedule_needs_no_cache(deep, batch, schedule):
    options = {**WHOLE, **EVERYTHING, "vision_budget": schedule}
    with torch.no_grad():
        cached, plain = (deep(**batch, **options, use_cache=use).logits[:, -1] for use in (True, False))
    assert torch.allclose(cached, plain, atol=1e-5)


def test_layers_hold_what_they_see(deep, single):
    options = {**WHOLE, **EVERYTHING, "vision_budget": "FCTT"}
    with torch.no_grad():
        cache = deep(**single, **options)[CACHE]
    length, visual = single["input_ids"].shape[1], 17 * 16
    assert [layer.get_seq_length() for layer in cache.layers] == [length, length, length - visual, length - visual]


def test_only_text_runs_through_a_cross_layer(deep, single, scores):
    lengths = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
        for layer in deep.model.text_model.layers
    ]
    with torch.no_grad():
        given = {"visual_token_scores": scores[:1], **WHOLE, **EVERYTHING}  # no pointer reads anything
        deep(**single, **given, vision_budget="FCTF")
    for hook in hooks:
        hook.remove()
    length, text = single["input_ids"].shape[1], single["input_ids"].shape[1] - 17 * 16
    assert lengths == [length, text, text, length]


@pytest.mark.parametrize("schedule", ["FFCC", "CCTT", "TFFC"])
def test_schedules_go_with_a_selection(deep, batch, samples, prepare, schedule):
    options = {"vision_budget": schedule, "max_tiles": 2, "min_tiles": 2, **KEPT, "max_new_tokens": 4}
    together = deep.generate(**batch, **options)
    for row, sample in enumerate(samples):
        assert torch.equal(together[row, -4:], deep.generate(**prepare(sample), **options)[0, -4:])


def test_schedules_go_with_pruning(deep, batch, scores):
    options = {**WHOLE, **KEPT, "visual_token_scores": scores, "prune_layer": 2}
    expected = deep.generate(**batch, **options, max_new_tokens=4)
    assert torch.equal(deep.generate(**batch, **options, vision_budget="FFFF", max_new_tokens=4), expected)
    cache = deep(**batch, **options, vision_budget="FCFC")[CACHE]
    assert cache.get_seq_length(2) < cache.get_seq_length(0)


def test_beams_of_a_schedule(deep, batch, samples, prepare):
    options = {"vision_budget": "FCTC", "num_beams": 3, "max_new_tokens": 4, **WHOLE, **EVERYTHING}
    together = deep.generate(**batch, **options)
    for row, sample in enumerate(samples):
        assert torch.equal(together[row, -4:], deep.generate(**prepare(sample), **options)[0, -4:])


@pytest.mark.parametrize("schedule", ["FCTF", "TCFF", "CCCC"])
def test_turns_on_a_scheduled_cache(deep, single, tokenizer, schedule):
    check_turns_of_text(deep, single, tokenizer, vision_budget=schedule, **WHOLE, **EVERYTHING)


def test_another_schedule_on_a_filled_cache_is_refused(deep, prepare, make_image):
    first, second = (prepare(("what is it?", [make_image(seed, 128, 64)])) for seed in (0, 1))
    with torch.no_grad():
        cache = deep(**first, vision_budget="FFCC")[CACHE]
        del second["attention_mask"]
        with pytest.raises(ValueError, match="past_key_values was filled with others"):
            deep(**second, past_key_values=cache, vision_budget="FCCC")
        deep(**second, past_key_values=cache, vision_budget="FFCC")


def test_gradients_reach_what_takes_part(deep, single):
    model = copy.deepcopy(deep).train()
    labels = single["input_ids"].clone()
    labels[:, :-3] = -100
    model(**single, labels=labels, vision_budget="FCCC").loss.backward()
    assert model.model.connector.modality_projection.proj.weight.grad.any()
    assert all(layer.self_attn.k_proj.weight.grad.any() for layer in model.model.text_model.layers)
    model.zero_grad()
    model(**single, labels=labels, vision_budget="TTTT").loss.backward()
    gradient = model.model.connector.modality_projection.proj.weight.grad
    assert gradient is None or not gradient.any()


def test_a_share_of_the_work_chooses_among_schedules(deep):
    config = copy.deepcopy(deep.config)
    config.vision_ranking = ["FFFF", "FFFC", "FCFC", "CCFC", "CCCC", "CCCT", "TCCT", "TTTT"]
    share = cross_share(config)
    assert schedule_of(config, 1.0) == ("full",) * 4
    assert schedule_of(config, (3 + share) / 4) == ("full", "full", "full", "cross")
    assert schedule_of(config, 0.6) == ("full", "cross", "full", "cross")
    assert schedule_of(config, share) == ("cross",) * 4
    assert schedule_of(config, share / 2) == ("text", "cross", "cross", "text")
    assert schedule_of(config, 0.0) == ("text",) * 4
    assert shortlist(config, [1, 0.6, 0.57, share]) == ["CCCC", "FCFC", "FFFF"]
    config.vision_schedules = ["CCCC", "FFFC"]
    assert schedule_of(config, 0.9) == ("full", "full", "full", "cross")
    assert schedule_of(config, 0.5) == ("cross",) * 4
    assert schedule_of(config, 0.0) == ("text",) * 4  # what was trained is preferred, not enforced
    config.vision_ranking = None
    with pytest.raises(ValueError, match=r"vision_budget \(0.0\) must be at least 0\.\d+, the least"):
        schedule_of(config, 0.0)


def test_cross_layers_cost_keys_and_values():
    """Of the matrices that a visual token meets in a layer of 256M."""
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    text = SimpleNamespace(head_dim=None, **sizes)
    assert cross_share(SimpleNamespace(vision_cross="own", text_config=text)) == pytest.approx(384 / 6144)


def test_the_schedule_of_the_config_is_saved(deep, single, tmp_path):
    model = copy.deepcopy(deep)
    model.config.vision_layers, model.config.vision_ranking = ["full", "cross", "text", "cross"], ["FFFF", "FCCT"]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    expected = deep.generate(**single, vision_budget="FCTC", max_new_tokens=4)
    dense = deep.generate(**single, selection="dense", max_new_tokens=4)
    for each in (model, loaded):
        assert torch.equal(each.generate(**single, max_new_tokens=4), expected)
        assert torch.equal(each.generate(**single, selection="dense", max_new_tokens=4), dense)


@pytest.mark.parametrize(
    "budget, complaint",
    [
        ("FFC", r"vision_budget \(3 layers\) must have one kind for each of the 4 layers"),
        ("FFCX", r"vision_budget \('X'\): choose from full, cross, text"),
        (["full"] * 5, r"vision_budget \(5 layers\)"),
        (1.5, r"vision_budget \(1.5\) must be in 0 .. 1"),
        (0.5, r"vision_budget \(0.5\): the layers of this checkpoint were not ranked"),
    ],
)
def test_bad_schedules(deep, single, budget, complaint):
    with pytest.raises(ValueError, match=complaint):
        deep.generate(**single, vision_budget=budget)


def test_bad_schedules_of_a_config():
    with pytest.raises(Exception, match=r"vision_layers \(2 layers\)"):
        QGSAConfig(vision_layers=["full", "cross"])
    layers = QGSAConfig().text_config.num_hidden_layers
    full, cross = "F" * layers, "C" * layers
    with pytest.raises(Exception, match=r"vision_ranking \(2 layers\)"):
        QGSAConfig(vision_ranking=["FF"])
    with pytest.raises(Exception, match="vision_ranking .* order of their work"):
        QGSAConfig(vision_ranking=[cross, full])
    with pytest.raises(Exception, match="vision_schedules .* order of their work"):
        QGSAConfig(vision_schedules=[full, cross])
    with pytest.raises(Exception, match=r"vision_policy \(True\): there are no vision_schedules"):
        QGSAConfig(vision_policy=True)
    with pytest.raises(Exception, match=r"vision_policy \(True\): vision_layers"):
        QGSAConfig(vision_policy=True, vision_schedules=[cross, full], vision_layers=["full"] * layers)


def test_what_cannot_read_a_mask_is_refused(deep, single, scores):
    given = {"visual_token_scores": scores[:1], **WHOLE, **EVERYTHING, "vision_budget": "FCCC"}
    model = copy.deepcopy(deep)
    model.model.text_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="a cross layer"):
        model(**single, **given)


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
