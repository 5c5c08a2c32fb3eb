from copy import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_qgsa.layout_qgsa import VisualLayout
from modeling_qgsa.request_qgsa import VisualInputs
from modeling_qgsa.vision_qgsa import VisualCache, blocks_of_tiles, encode_chosen_blocks, encode_tiles, patch_numbers


def tokens(model, inputs, **options):
    return model.generate(**inputs, do_sample=False, max_new_tokens=6, **options)


def logits(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits


@pytest.fixture
def layout(model, batch):
    return VisualLayout.of(model.config, batch["input_ids"])


def test_check_visual_inputs(layout, batch):
    pixels = batch["pixel_values"]
    VisualInputs(pixels).check(layout, 64)
    with pytest.raises(
        ValueError, match="sample 1: the prompt has placeholders for 5 tiles, but pixel_values holds 17"
    ):
        VisualInputs(torch.ones_like(pixels)).check(layout, 64)
    with pytest.raises(
        ValueError, match="sample 0: the prompt has placeholders for 17 tiles, but pixel_values holds 2"
    ):
        VisualInputs(pixels[:, :2]).check(layout, 64)
    with pytest.raises(ValueError, match=r"shape \(1, 17, 3, 64, 64\): expected 3 x any x 3 x 64 x 64"):
        VisualInputs(pixels[:1]).check(layout, 64)
    for bad in (float("nan"), float("inf")):
        broken = pixels.clone()
        broken[1, 0, 0, 3, 3] = bad
        with pytest.raises(ValueError, match="sample 1: pixel_values holds NaN or infinite values"):
            VisualInputs(broken).check(layout, 64)


def test_check_visual_inputs_with_features(layout):
    count = len(layout.tile_row)
    VisualInputs(None, features=torch.zeros(count, 16, 8)).check(layout, 64)
    for shape in ((count - 1, 16, 8), (count, 5, 8)):
        with pytest.raises(ValueError, match=rf"shape \({shape[0]}, {shape[1]}, 8\): .* {count} tiles of 16 visual"):
            VisualInputs(None, features=torch.zeros(shape)).check(layout, 64)


def test_check_visual_inputs_with_lazy_tiles(layout, prepare, samples):
    inputs, other = prepare(*samples, lazy_tiles=True), prepare(*samples[:1] * 3, lazy_tiles=True)
    VisualInputs(inputs["pixel_values"], lazy_tiles=inputs["lazy_tiles"]).check(layout, 64)
    with pytest.raises(ValueError, match="sample 1: the prompt has placeholders for 5 tiles, but lazy_tiles holds 17"):
        VisualInputs(inputs["pixel_values"], lazy_tiles=other["lazy_tiles"]).check(layout, 64)
    with pytest.raises(ValueError, match="sample 0: .* 1 global views, but pixel_values holds 2"):
        views = inputs["pixel_values"].expand(-1, 2, -1, -1, -1)
        VisualInputs(views, lazy_tiles=inputs["lazy_tiles"]).check(layout, 64)


def test_blocks_of_tiles_are_the_patches_in_order():
    pixels = torch.arange(2 * 3 * 16 * 16).float().view(2, 3, 16, 16)
    blocks = blocks_of_tiles(pixels, 2)
    assert blocks.shape == (2, 4, 3, 8, 8) and torch.equal(blocks[1, 1], pixels[1, :, :8, 8:])
    assert patch_numbers(2, 2, None)[1].tolist() == [2, 3, 6, 7]


def test_blocks_of_whole_tiles_are_what_the_encoder_makes_of_them(model, batch, layout):
    visual = VisualInputs(batch["pixel_values"])
    tiles = torch.zeros(len(layout.tile_row), dtype=torch.bool)
    tiles[[2, 5, 18]] = True
    looked = tiles[:, None].expand(-1, 16)
    with torch.no_grad():
        blocks = encode_chosen_blocks(model.model, visual, layout, looked, tiles).view(3, 16, -1)
        assert torch.allclose(blocks, encode_tiles(model.model, visual, layout, tiles), atol=1e-5)


def test_blocks_see_those_of_their_own_tile_only(model, batch, layout):
    visual = VisualInputs(batch["pixel_values"])
    tiles = torch.arange(len(layout.tile_row)) < 2
    looked = torch.zeros(len(tiles), 16, dtype=torch.bool)
    looked[0, [1, 5, 6]], looked[1, [0, 2]] = True, True
    with torch.no_grad():
        both = encode_chosen_blocks(model.model, visual, layout, looked, tiles)
        for tile, part in ((0, both[:3]), (1, both[3:])):
            only = torch.arange(len(tiles)) == tile
            alone = encode_chosen_blocks(model.model, visual, layout, looked & only[:, None], only)
            assert torch.allclose(part, alone, atol=1e-5)
        fewer = looked.clone()
        fewer[0, 6] = False
        assert not torch.allclose(
            encode_chosen_blocks(model.model, visual, layout, fewer, tiles)[:2], both[:2], atol=1e-3
        )


def test_blocks_with_room_for_all_are_whole_tiles(model, batch):
    budget = {"min_tiles": 2, "max_tiles": 2, "min_visual_tokens": 48, "max_visual_tokens": 48}
    assert torch.allclose(
        logits(model, batch, selection="blocks", **budget), logits(model, batch, **budget), atol=1e-4
    )


def test_blocks_are_as_many_as_tokens_may_be_kept(model, batch):
    encoded = []
    hook = model.model.vision_model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    budget = {"min_tiles": 2, "max_tiles": 2, "min_visual_tokens": 9, "max_visual_tokens": 9}
    selection = model.select(**batch, selection="blocks", **budget)
    hook.remove()
    assert encoded == [64, 9 * 4]  # patches: the whole global views, then nine blocks of 2 x 2 per image
    assert selection.visual_tokens.tolist() == [9, 9, 9] and (selection.tiles <= 2).all()


def test_blocks_batch_is_single(model, prepare, batch, samples):
    together = tokens(model, batch, selection="blocks")
    for row, sample in enumerate(samples):
        alone = tokens(model, prepare(sample), selection="blocks")
        assert together[row, -6:].tolist() == alone[0, -6:].tolist()


def test_blocks_train_the_encoder(make_model, batch):
    model = make_model(selection="blocks").train()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    model(**batch, labels=labels).loss.backward()
    assert model.model.vision_model.encoder.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_blocks_need_pixels(model, batch, layout):
    with torch.no_grad():
        features = encode_tiles(
            model.model, VisualInputs(batch["pixel_values"]), layout, torch.ones_like(layout.is_global)
        )
    rest = {name: value for name, value in batch.items() if not name.startswith("pixel")}
    with pytest.raises(ValueError, match="needs pixel_values"):
        model.generate(**rest, image_hidden_states=features, selection="blocks", max_new_tokens=2, max_visual_tokens=9)


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder", "blocks"])
def test_lazy_tiles_answer_as_eager_ones(model, prepare, samples, batch, selection):
    lazy = prepare(*samples, lazy_tiles=True)
    assert torch.equal(logits(model, lazy, selection=selection), logits(model, batch, selection=selection))
    assert torch.equal(tokens(model, lazy, selection=selection), tokens(model, batch, selection=selection))


def test_lazy_tiles_cut_only_what_is_looked_at(model, prepare, samples, monkeypatch):
    inputs = prepare(*samples, lazy_tiles=True)
    cut, counts = inputs["lazy_tiles"].cut, []

    def count(of, ordinals):
        counts.append(len(of))
        return cut(of, ordinals)

    monkeypatch.setattr(inputs["lazy_tiles"], "cut", count)
    selection = model.select(**inputs, min_tiles=1, max_tiles=1)
    assert selection.tiles.tolist() == [1, 1, 1] and counts == [3]
    model.select(**inputs, min_tiles=0, max_tiles=0)
    assert counts == [3]


def test_dense_refuses_what_the_stock_model_has_not(model, prepare, samples):
    with pytest.raises(ValueError, match="lazy_tiles: not available with"):
        model.generate(**prepare(samples[0], lazy_tiles=True), selection="dense")
    with pytest.raises(ValueError, match="visual_cache: not available with"):
        model(**prepare(samples[0]), visual_cache=VisualCache(), selection="dense")


@pytest.mark.parametrize("selection", ["before_encoder", "dense"])
def test_tiles_one_by_one_change_nothing_but_rounding(make_model, batch, tiles_encoded, selection):
    model = make_model()
    expected, answers = logits(model, batch, selection=selection), tokens(model, batch, selection=selection)
    model.tune(tiles_per_step=1)
    with tiles_encoded(model) as counts:
        assert torch.allclose(logits(model, batch, selection=selection), expected, atol=1e-4)
    assert set(counts) == {1}
    assert torch.equal(tokens(model, batch, selection=selection), answers)


@pytest.mark.parametrize("selection", ["before_encoder", "blocks", "dense"])
def test_encoder_in_bfloat16_and_text_model_in_float32(make_model, batch, selection):
    model = make_model().tune(vision_dtype=torch.bfloat16)
    given = {"visual_token_scores": torch.rand(3, 17 * 16)} if selection != "dense" else {}
    budget = {"min_tiles": 2, "max_tiles": 2, "min_visual_tokens": 20, "max_visual_tokens": 20}
    expected = logits(make_model(), batch, selection=selection, **given, **budget)
    found = logits(model, batch, selection=selection, **given, **budget)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    assert (found - expected).abs().mean() < 0.1 * expected.std()


def test_tune_and_cache_refuse_sizes_below_one(make_model):
    with pytest.raises(ValueError, match=r"tiles_per_step \(0\)"):
        make_model().tune(tiles_per_step=0)
    with pytest.raises(Exception, match=r"tiles_per_step \(0\)"):
        make_model(tiles_per_step=0)
    with pytest.raises(ValueError, match=r"max_bytes \(0\)"):
        VisualCache(0)


@pytest.mark.parametrize("lazy_tiles", [False, True])
def test_cached_answers_are_those_without_a_cache(make_model, prepare, make_image, tiles_encoded, lazy_tiles):
    model, cache = make_model().tune(tiles_per_step=1), VisualCache()
    counts = []
    for question in ("what shape is on the red card?", "where is the star?", "what shape is on the red card?"):
        inputs = prepare((question, [make_image(0)]), lazy_tiles=lazy_tiles)
        with tiles_encoded(model) as encoded:
            cached = logits(model, inputs, visual_cache=cache)
        counts.append(len(encoded))
        assert torch.equal(cached, logits(model, inputs))
        assert torch.equal(tokens(model, inputs, visual_cache=cache), tokens(model, inputs))
    assert counts[0] > 1 and counts[1] < 1 + 4 and counts[2] == 0


def test_a_cache_knows_images_and_weights_apart(make_model, prepare, make_image, tiles_encoded):
    model, cache = make_model(), VisualCache()
    one, other = (prepare(("what is red?", [make_image(seed)])) for seed in (0, 1))
    logits(model, one, visual_cache=cache)
    expected = logits(model, other)
    assert torch.allclose(logits(model, other, visual_cache=cache), expected, atol=1e-4)
    held = len(cache)
    with torch.no_grad():
        model.model.connector.modality_projection.proj.weight.mul_(2)
    with tiles_encoded(model) as encoded:
        assert not torch.allclose(logits(model, other, visual_cache=cache), expected, atol=1e-4)
    assert encoded and len(cache) > held


def test_a_cache_is_bounded_and_forgets_what_was_used_least_recently():
    cache = VisualCache(max_bytes=100)
    for key in "abc":
        cache.put(key, torch.full((4, 3), float(ord(key))))  # 48 bytes each
        cache.get("a")
    assert cache.get("b") is None and len(cache) == 2 and cache.bytes == 96
    assert cache.get("a")[0, 0] == ord("a") and cache.get("c")[0, 0] == ord("c")
    cache.put("huge", torch.zeros(100))
    assert cache.get("huge") is None and len(cache) == 2


@pytest.mark.parametrize(
    "part", ["vision_model.encoder.layers.0.self_attn.q_proj", "connector.modality_projection.proj"]
)
def test_a_cache_knows_every_weight_of_the_encoder(make_model, single, part):
    model, cache = make_model(), VisualCache()
    logits(model, single, visual_cache=cache)
    with torch.no_grad():
        model.model.get_submodule(part).weight.mul_(2)
    expected = logits(model.tune(tiles_per_step=1), single)
    assert torch.equal(logits(model, single, visual_cache=cache), expected)


def test_a_cache_knows_adapters_that_are_switched_off(make_model, single):
    model, cache = make_model().tune(tiles_per_step=1), VisualCache()
    adapter = LoraConfig(target_modules=r".*vision_model.*q_proj", init_lora_weights=False)
    adapted = get_peft_model(model, adapter).eval()
    with_adapter = logits(adapted, single, visual_cache=cache)
    with adapted.disable_adapter():
        expected = logits(adapted, single)
        assert not torch.equal(expected, with_adapter)
        assert torch.equal(logits(adapted, single, visual_cache=cache), expected)
    assert torch.equal(logits(adapted, single, visual_cache=cache), with_adapter)


def test_a_cache_knows_how_pixels_are_scaled(make_model, prepare, samples):
    model, cache = make_model().tune(tiles_per_step=1), VisualCache()
    inputs, other = (prepare(samples[0], lazy_tiles=True) for _ in range(2))
    logits(model, inputs, visual_cache=cache)
    other["lazy_tiles"].image_processor = copy(other["lazy_tiles"].image_processor)
    other["lazy_tiles"].image_processor.image_mean = [0.1, 0.2, 0.3]
    other["pixel_values"] = other["lazy_tiles"].global_views()
    assert torch.equal(logits(model, other, visual_cache=cache), logits(model, other))


def test_a_cache_is_for_inference(make_model, single):
    with torch.inference_mode():
        model = make_model()
        logits(model, single, visual_cache=VisualCache())
    with pytest.raises(ValueError, match="visual_cache is for inference"):
        make_model().train()(**single, visual_cache=VisualCache())


def test_a_tuned_model_is_saved_in_the_dtype_of_its_text_model(make_model, batch, tmp_path):
    model = make_model().tune(torch.bfloat16, 1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_lazy_tiles_of_more_prompts_are_refused(model, prepare, samples):
    one, two = prepare(samples[0], lazy_tiles=True), prepare(samples[0], samples[0], lazy_tiles=True)
    with pytest.raises(ValueError, match="lazy_tiles holds tiles of 2 samples, but there are 1 prompts"):
        model(**{**one, "lazy_tiles": two["lazy_tiles"]})


@pytest.mark.parametrize("tuning", [{"tiles_per_step": 2}, {"vision_dtype": torch.bfloat16}])
def test_a_tuned_dense_model_says_where_pixels_and_prompt_do_not_fit(make_model, single, tuning):
    inputs = {**single, "pixel_values": single["pixel_values"][:, 1:]}
    inputs["pixel_attention_mask"] = single["pixel_attention_mask"][:, 1:]
    with pytest.raises(ValueError, match="272 image placeholders, but the images make 256 tokens"):
        make_model().tune(**tuning)(**inputs, selection="dense")


# Features that were encoded elsewhere


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder", "dense"])
def test_outputs_of_the_encoder_are_selected_from(selection, model, batch, tiles_encoded):
    """`mm_encoder_outputs`, as stock's `generate` makes them."""
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "question_mask")}
    with torch.no_grad():
        pixels = [batch[name] for name in ("pixel_values", "pixel_attention_mask")]
        encoded = {"image": model.model.get_image_features(*pixels, return_dict=True)}
        expected = model(**batch, selection=selection).logits
        with tiles_encoded(model) as counts:
            found = model(**text, mm_encoder_outputs=encoded, selection=selection).logits
            ids = model.generate(**text, mm_encoder_outputs=encoded, selection=selection, max_new_tokens=3)
    assert counts == []
    real = batch["attention_mask"] > 0
    assert torch.allclose(found[real], expected[real], atol=1e-4)
    assert torch.equal(ids, model.generate(**batch, selection=selection, max_new_tokens=3))


def test_outputs_of_the_encoder_beside_pixels_are_refused(model, batch):
    with pytest.raises(ValueError, match="mm_encoder_outputs hold the features of all tiles"):
        model(**batch, mm_encoder_outputs={"image": torch.zeros(1)})


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_return_sequences": 4, "do_sample": True}])
@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder", "blocks", "dense"])
def test_beams_and_samples_share_the_encoded_tiles(selection, options, make_model, batch, tiles_encoded):
    """In every variant, tuned or not: dense encodes as often as stock does."""
    for tuning in ({}, {"tiles_per_step": 2}):
        model = make_model().tune(**tuning)
        with tiles_encoded(model) as once:
            model.generate(**batch, selection=selection, max_new_tokens=2)
        with tiles_encoded(model) as shared:
            model.generate(**batch, selection=selection, max_new_tokens=2, **options)
        assert shared == once and sum(once) > 0
