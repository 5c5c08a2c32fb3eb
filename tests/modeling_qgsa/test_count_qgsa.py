"""Exact counts: what is announced before anything is encoded is what reaches the text model, by every route."""

import pytest
import torch
from handmade import layout_of
from transformers import DynamicCache

from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.count_qgsa import ExactCount
from modeling_qgsa.layout_qgsa import VisualLayout


NEW = 5
VARIANTS = ("before_encoder", "after_encoder", "blocks")
EXACT = {"positions_per_image": 50, "positions": "compact"}
WHOLE = {"min_tiles": 16, "max_tiles": 16}


def announced(model, input_ids, **options):
    """Positions of each image, as an engine learns them: from the prompt and the budget alone."""
    layout = VisualLayout.of(model.config, input_ids)
    return ExactCount.of(Budget.of(model.config, **options), layout, model.config.keep_tile_markers).total.tolist()


def taken(model, input_ids, selection):
    """Positions of each image that a selection kept."""
    layout = VisualLayout.of(model.config, input_ids)
    kept = torch.zeros_like(input_ids, dtype=torch.bool)
    sample, column = (selection.keep_indices >= 0).nonzero(as_tuple=True)
    kept[sample, selection.keep_indices[sample, column]] = True
    tiles = layout.tile_of_position[kept & (layout.tile_of_position >= 0)]
    return torch.bincount(layout.tile_image[tiles], minlength=len(layout.grids)).tolist()


@pytest.fixture(scope="module")
def pointing(make_deep):
    """A model that points with its attention, and keeps the markers of every tile."""
    return make_deep()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(12))
def test_the_count_is_the_announced_one(seed, variant, model, pointing, prepare, make_image):
    """Random grids, several images of a prompt, random budgets; both pointers."""
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    rows = [
        (question, [make_image(number(0, 99), 64 * number(1, 4), 64 * number(1, 4)) for _ in range(number(1, 2))])
        for question in ("where is the blue card?", "", "how many cards are there?")
    ]
    batch = prepare(*rows)
    for each in (model, pointing):
        options = {"selection": variant, "max_tiles": number(0, 16), "positions_per_image": number(45, 340)}
        options["min_tiles"] = number(0, options["max_tiles"])
        found = each.select(**batch, **options)
        counts = announced(each, batch["input_ids"], **options)
        assert taken(each, batch["input_ids"], found) == counts and max(counts) <= options["positions_per_image"]
        images = torch.bincount(found.image_sample, minlength=3)
        assert variant == "after_encoder" or (found.tiles <= options["max_tiles"] * images).all()


@pytest.mark.parametrize("limit", [4, 5, 19, 20, 21, 40, 55, 300, 311, 312, 313, 999])
@pytest.mark.parametrize("kept", [0, 2, 16])
def test_every_small_and_large_count(limit, kept, model, single):
    """A 4 x 4 grid: 3 positions of the global view's markers, 16 tokens each, 2 positions a tile and 5 line ends."""
    options = {"positions_per_image": limit, "min_tiles": kept, "max_tiles": 16}
    found = model.select(**single, **options)
    assert taken(model, single["input_ids"], found) == [min(limit, 312)]
    room = min(limit, 312) - 3
    assert found.visual_tokens.item() + 2 * found.tiles.item() <= room <= 16 + 20 * found.tiles.item()


def test_a_count_follows_from_grid_and_budget():
    grids = layout_of((0, 0), (1, 2), (4, 4))

    def counts(keep_tile_markers=False, **options):
        return ExactCount.of(Budget(**options), grids, keep_tile_markers)

    assert counts() is None
    assert counts(positions_per_image=999, max_tiles=16).total.tolist() == [19, 57, 312]
    assert counts(positions_per_image=50, max_tiles=16).total.tolist() == [19, 50, 50]
    assert counts(positions_per_image=50, max_tiles=1).total.tolist() == [19, 37, 37]
    assert counts(positions_per_image=50, max_tiles=0).total.tolist() == [19, 19, 19]
    assert counts(positions_per_image=999, max_tiles=2).total.tolist() == [19, 57, 55]
    stay = counts(keep_tile_markers=True, positions_per_image=50, max_tiles=1)
    assert stay.total.tolist() == [19, 41, 50] and stay.fixed.tolist() == [3, 9, 40]
    assert counts(positions_per_image=50, max_tiles=16).least_tiles.tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"positions_per_image": 3},
            r"positions_per_image \(3\) leaves no room .*: 3 positions of image 0 are markers",
        ),
        ({"positions_per_image": 40, "selection": "after_encoder"}, "40 positions of image 0 are markers"),
    ],
)
def test_a_count_without_room_for_tokens_is_refused_before_anything_is_encoded(
    options, message, model, batch, tiles_encoded
):
    with tiles_encoded(model) as counts, pytest.raises(ValueError, match=message):
        model.select(**batch, **options)
    assert not counts


def test_markers_that_outnumber_the_tokens_are_refused():
    with pytest.raises(ValueError, match="those of a chosen tile take up to 4"):
        ExactCount.of(Budget(positions_per_image=5), layout_of((1, 1), tokens=1), False)


# The same answers by every route


@pytest.mark.parametrize("variant", VARIANTS)
def test_batched_equals_single(variant, model, prepare, samples, batch):
    answers = model.generate(**batch, **EXACT, selection=variant, max_new_tokens=NEW)
    for row, sample in enumerate(samples):
        alone = model.generate(**prepare(sample), **EXACT, selection=variant, max_new_tokens=NEW)
        assert torch.equal(answers[row, -NEW:], alone[0, -NEW:])


def append(inputs, tokens):
    """`inputs` with more text behind it, which is no part of the question."""
    longer = {"input_ids": tokens, "attention_mask": tokens * 0 + 1, "question_mask": tokens * 0}
    return {**inputs, **{name: torch.cat([inputs[name], new], 1) for name, new in longer.items()}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["single", "batch"])
def test_cached_equals_a_loop_without_cache(variant, name, model, request):
    inputs = request.getfixturevalue(name)
    cached = model.generate(**inputs, **EXACT, selection=variant, max_new_tokens=NEW)
    loop = dict(inputs)
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(**loop, **EXACT, selection=variant, use_cache=False).logits
        loop = append(loop, logits[:, -1:].argmax(-1))
    assert torch.equal(loop["input_ids"], cached)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_later_turn_on_one_cache(variant, model, batch, tokenizer):
    more = "<end_of_utterance>\nUser:how many cards are there?<end_of_utterance>\nAssistant:"
    more = tokenizer(more, add_special_tokens=False, return_tensors="pt")["input_ids"].expand(3, -1)
    cache = DynamicCache(config=model.config.text_config)
    first = model.generate(**batch, **EXACT, selection=variant, max_new_tokens=NEW, past_key_values=cache)
    conversation = append(append(batch, first[:, -NEW:]), more)
    expected = model.generate(**conversation, **EXACT, selection=variant, max_new_tokens=NEW)
    given = {name: conversation[name] for name in ("input_ids", "attention_mask")}
    found = model.generate(**given, **EXACT, selection=variant, max_new_tokens=NEW, past_key_values=cache)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_text_model_alone_answers_the_same(variant, model, single):
    """As an engine does: it numbers what it is given from 0 on, and knows nothing of the selection."""
    expected = model.generate(**single, **EXACT, selection=variant, max_new_tokens=NEW)[0, -NEW:]
    embeds = None
    hook = model.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: record.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    record = []
    model.generate(**single, **EXACT, selection=variant, max_new_tokens=1)
    hook.remove()
    embeds, answer = record[0], []
    for _ in range(NEW):
        with torch.no_grad():
            hidden = model.model.text_model(inputs_embeds=embeds).last_hidden_state
            answer.append(model.lm_head(hidden[:, -1]).argmax(-1))
        embeds = torch.cat([embeds, model.get_input_embeddings()(answer[-1])[:, None]], 1)
    assert torch.equal(torch.cat(answer), expected)


@pytest.mark.parametrize("variant", ["before_encoder", "after_encoder"])
def test_everything_kept_is_the_same_with_and_without_exact_counts(variant, model, batch):
    """Bit for bit: position ids are those of the whole prompt."""
    options = {**WHOLE, "selection": variant}
    with torch.no_grad():
        expected = model(**batch, **options, min_visual_tokens=272, max_visual_tokens=272).logits
        assert torch.equal(model(**batch, **options, positions_per_image=312, positions="compact").logits, expected)
        assert torch.equal(model(**batch, **options, positions_per_image=312).logits, expected)


def test_compact_positions_are_not_the_original_ones(model, batch):
    """Guards the tests of this file, and says what the two are."""
    seen = []
    hook = model.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    for positions in ("compact", "original"):
        model.generate(**batch, max_new_tokens=2, positions_per_image=50, positions=positions)
    hook.remove()
    compact, step, original, _ = seen
    padding = (compact == 0).sum(1, keepdim=True) - 1
    assert torch.equal(compact, (torch.arange(compact.shape[1]) - padding).clamp(min=0))
    assert torch.equal(step, compact[:, -1:] + 1) and (original[:, -1] > compact[:, -1]).all()


def test_saved_equals_loaded(make_model, batch, tmp_path):
    model = make_model(**EXACT)
    model.save_pretrained(tmp_path)
    loaded = QGSASmolVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert {name: getattr(loaded.config, name) for name in EXACT} == EXACT
    answers = model.generate(**batch, max_new_tokens=NEW)
    assert torch.equal(loaded.generate(**batch, max_new_tokens=NEW), answers)
    assert taken(loaded, batch["input_ids"], loaded.select(**batch)) == [50, 50, 50]


def test_dense_is_stock_whatever_is_configured(make_dense, make_model, batch, stock_inputs):
    model = make_model(**EXACT)
    with torch.no_grad():
        expected = make_dense()(**stock_inputs(batch)).logits
        assert torch.equal(model(**batch, selection="dense").logits, expected)
    for name, value in EXACT.items():
        with pytest.raises(ValueError, match=f'{name} .*: not available with selection="dense"'):
            model(**batch, selection="dense", **{name: value})


def test_unknown_positions_are_refused(model, batch):
    with pytest.raises(ValueError, match=r"positions \('dense'\): choose from original, compact"):
        model.select(**batch, positions="dense")


def test_training_has_no_exact_count(make_model, labelled):
    model = make_model(**EXACT).train()
    outputs = model(**labelled)
    outputs.loss.backward()
    assert outputs.loss.isfinite() and (outputs.selection.visual_tokens <= 48).all()
