"""A glance at a fraction of its resolution: the same tokens at less than a quarter of the cost."""

from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import pad

from modeling_qgsa import VisualCache
from modeling_qgsa.layout_qgsa import VisualLayout
from modeling_qgsa.request_qgsa import VisualInputs
from modeling_qgsa.vision_qgsa import encode_tiles, recorded_states, remember_tiles
from training.costs.counter import count_flops
from training.costs.formula import estimate_flops
from training.learning.feature_cache import open_feature_cache, with_features


BUDGET = {"min_tiles": 2, "max_tiles": 2, "min_visual_tokens": 20, "max_visual_tokens": 20}


def tokens(model, inputs, **options):
    return model.generate(**inputs, do_sample=False, max_new_tokens=5, **options)


def logits(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits


@pytest.fixture(scope="module", params=["selector", "attention"])
def scaled(request, make_model):
    """Shared: do not modify it."""
    return make_model(glance_downscale=2, pointer=request.param, **BUDGET)


@pytest.fixture
def patches_encoded():
    """Lists tiles and patches of each call of the encoder."""

    def count(model, inputs, **options):
        seen = []
        hook = model.model.vision_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(tuple(kwargs["patch_attention_mask"].shape)), with_kwargs=True
        )
        model.select(**inputs, **options)
        hook.remove()
        return seen

    return count


def test_the_encoder_sees_a_quarter_of_the_patches(scaled, batch, patches_encoded):
    assert patches_encoded(scaled, batch) == [(3, 4, 4), (6, 8, 8)]
    assert sorted(patches_encoded(scaled, batch, selection="after_encoder")) == [(3, 4, 4), (16 + 4 + 8, 8, 8)]


def test_the_states_are_those_of_a_smaller_view(make_model, single):
    model = make_model(glance_downscale=2)
    view = single["pixel_values"][:, -1:]
    small = view.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean((-1, -3))
    with recorded_states(model.model) as states, torch.no_grad():
        model.model.get_image_features(small)
        model.select(**single)
    expected, found = states[0].view(4, 4, -1), states[1].view(8, 8, -1)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):  # each of them stands for four
        assert torch.allclose(found[row::2, column::2], expected, atol=1e-5)


def test_an_image_without_tiles_is_seen_as_a_whole(make_model, prepare, make_image, patches_encoded):
    plain, scaled = make_model(), make_model(glance_downscale=2)
    inputs = prepare(("what is it?", [make_image(3)]), do_image_splitting=False)
    assert patches_encoded(scaled, inputs) == [(1, 8, 8)]
    assert torch.equal(logits(scaled, inputs), logits(plain, inputs))


def test_dense_is_left_alone(make_model, batch):
    plain, scaled = make_model(), make_model(glance_downscale=2)
    assert torch.equal(logits(scaled, batch, selection="dense"), logits(plain, batch, selection="dense"))
    assert not torch.allclose(logits(scaled, batch), logits(plain, batch), atol=1e-3)


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder", "blocks"])
def test_a_batch_equals_its_samples(scaled, batch, prepare, samples, selection):
    answers = tokens(scaled, batch, selection=selection)[:, -5:]
    for row, sample in enumerate(samples):
        assert torch.equal(tokens(scaled, prepare(sample), selection=selection)[0, -5:], answers[row])


def test_cache_and_lazy_tiles_change_nothing(make_model, prepare, samples, tiles_encoded):
    model, cache = make_model(glance_downscale=2, **BUDGET).tune(tiles_per_step=1), VisualCache()
    eager, lazy = prepare(samples[0]), prepare(samples[0], lazy_tiles=True)
    expected = logits(model, eager)
    for inputs in (eager, lazy):
        assert torch.allclose(logits(model, inputs), expected, atol=1e-5)
        assert torch.equal(logits(model, inputs, visual_cache=cache), logits(model, inputs))
        with tiles_encoded(model) as counts:
            assert torch.equal(logits(model, inputs, visual_cache=cache), logits(model, inputs))
        assert len(counts) == 3  # the glance and two tiles, without the cache
    model.config.glance_downscale = 1  # what the cache holds is of another glance
    assert torch.equal(logits(model, eager, visual_cache=cache), logits(model, eager))


def test_a_cache_tells_a_whole_view_from_a_smaller_one(make_model, prepare, make_image):
    """Both have the same pixels: an image that is cut into tiles, and the same image as a single tile."""
    model, cache = make_model(glance_downscale=2), VisualCache()
    sample = ("what is it?", [make_image(3)])
    tiled, whole = prepare(sample), prepare(sample, do_image_splitting=False)
    assert torch.equal(tiled["pixel_values"][:, -1], whole["pixel_values"][:, -1])
    for inputs in (tiled, whole):
        assert torch.allclose(logits(model, inputs, visual_cache=cache), logits(model, inputs), atol=1e-5)


def test_glances_of_two_kinds_are_remembered_as_their_own(make_model, prepare, make_image):
    """Images with tiles and without, in one batch: each kind is encoded at once, not in the order of the prompt."""
    model, cache = make_model(glance_downscale=2).model, VisualCache()
    tiled = prepare(("what is it?", [make_image(1)]))
    whole = prepare(("what is it?", [make_image(2)]), do_image_splitting=False)
    missing = tiled["input_ids"].shape[1] - whole["input_ids"].shape[1]
    ids = torch.cat([tiled["input_ids"], pad(whole["input_ids"], (missing, 0))])
    more = tiled["pixel_values"].shape[1] - 1
    pixels = torch.cat([tiled["pixel_values"], pad(whole["pixel_values"], (0, 0, 0, 0, 0, 0, 0, more))])
    layout, visual = VisualLayout.of(model.config, ids), VisualInputs(pixels, None)
    assert layout.has_tiles[layout.is_global].tolist() == [True, False]
    with recorded_states(model) as states, torch.no_grad():
        expected = encode_tiles(model, visual, layout, layout.is_global)
    cached = replace(visual, cache=cache)
    remember_tiles(model, cached, layout, layout.is_global, states)
    assert len(cache) == 2
    assert torch.allclose(encode_tiles(model, cached, layout, layout.is_global), expected, atol=1e-5)


def test_glances_of_a_batch_keep_to_the_steps(make_model, batch, patches_encoded):
    model = make_model(glance_downscale=2, tiles_per_step=2, **BUDGET)
    assert patches_encoded(model, batch)[:2] == [(2, 4, 4), (1, 4, 4)]
    expected = tokens(make_model(glance_downscale=2, **BUDGET), batch)
    assert torch.equal(tokens(model, batch), expected)


def test_it_is_saved(make_model, single, tmp_path):
    model = make_model(glance_downscale=2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config.glance_downscale == 2
    assert torch.equal(logits(loaded, single), logits(model, single))


def test_it_trains_on_features_that_are_kept(make_model, batch, processor, tmp_path):
    model = make_model(glance_downscale=2)
    store = open_feature_cache(tmp_path, model, processor, 2**20)
    for _ in range(2):  # made, and read
        assert torch.allclose(logits(model, with_features(store, model, batch)), logits(model, batch), atol=1e-5)
    with pytest.raises(ValueError, match="glance downscale"):
        open_feature_cache(tmp_path, make_model(), processor, 2**20)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.model.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder", "blocks"])
def test_the_formula_counts_it(make_model, single, selection):
    model = make_model(glance_downscale=2, **BUDGET)
    found = model.select(**single, selection=selection)
    layout = VisualLayout.of(model.config, single["input_ids"])
    whole, parts = 1 + int(found.tiles[0]), ()
    if selection == "blocks":
        whole, parts = 1, (20,)
    length, question = found.keep_indices.shape[1], int(single["question_mask"].sum())
    expected = estimate_flops(model.config, whole, length, 5, question, parts)
    counted = count_flops(model, single, 5, selection=selection)
    assert counted["vision"] == pytest.approx(expected["vision"], rel=1e-3)
    assert layout.has_tiles.all()


@pytest.mark.parametrize("scale", [0, 3, 16])
def test_scales_that_do_not_divide_a_tile_are_refused(make_model, scale):
    with pytest.raises(StrictDataclassError, match=rf"glance_downscale \({scale}\) must divide .* \(8\)"):
        make_model(glance_downscale=scale)
