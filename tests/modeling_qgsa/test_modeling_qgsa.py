"""The forward pass: equal to the stock model where it has to be, and what it selects, counts and trains elsewhere."""

import copy
import re
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, SmolVLMForConditionalGeneration, SmolVLMModel

import modeling_qgsa.relaxation_qgsa as relaxation
from modeling_qgsa import QGSASmolVLMForConditionalGeneration, QGSASmolVLMModel
from modeling_qgsa.compat_qgsa import features_in
from modeling_qgsa.prompt_qgsa import NO_QUESTION, logger
from training.data.collator import QuestionCollator


TWO_TILES = {"min_tiles": 2, "max_tiles": 2, "min_visual_tokens": 20, "max_visual_tokens": 20}
WHOLE = {"min_tiles": 16, "max_tiles": 16, "min_visual_tokens": 272, "max_visual_tokens": 272}


@pytest.fixture(scope="module")
def one_tile(stock_processor, make_image):
    """The same for images of a single tile, whose markers always stay."""
    collate = QuestionCollator(stock_processor, image_kwargs={"do_image_splitting": False})
    return collate(
        [
            {"image": make_image(5), "question": "what shape is on the red card?", "answer": "star"},
            {"image": make_image(6), "question": "where is it?", "answer": "row 1 column 3"},
        ]
    )


@pytest.fixture(scope="module")
def asked_otherwise(labelled, tokenizer):
    """`labelled` with another last word in the question of its first row."""
    header = tokenizer("\nAssistant:", add_special_tokens=False)["input_ids"]
    answer = int((labelled["labels"][0] != -100).nonzero()[0])
    input_ids = labelled["input_ids"].clone()
    input_ids[0, answer - len(header) - 2] += 1
    return {**labelled, "input_ids": input_ids}


def padded_gather(values, indices):
    """Rows of `values` at `indices`; padding is 0."""
    rows = values.gather(1, indices.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))
    return rows.masked_fill(indices[..., None] < 0, 0)


# Dense


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_dense_logits_are_those_of_the_stock_model(
    kind, attention, make_dense, make_model, single, batch, stock_inputs
):
    dense = make_dense(kind, attention)
    model = make_model(dense)
    assert model.config._attn_implementation == attention
    for inputs in (single, batch):
        with torch.no_grad():
            expected = dense(**stock_inputs(inputs)).logits
            outputs = model(**inputs, selection="dense")
        assert torch.equal(outputs.logits, expected)
        assert outputs.selection is None


def test_dense_loss_is_that_of_the_stock_model(make_dense, make_model, labelled):
    dense = make_dense()
    model = make_model(dense, selection="dense").train()
    assert torch.equal(model(**labelled).loss, dense(**labelled).loss)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_whole_budget_is_close_to_dense(attention, make_dense, make_model, batch, stock_inputs):
    dense = make_dense("smolvlm", attention)
    model = make_model(dense, **WHOLE)
    with torch.no_grad():
        expected = dense(**stock_inputs(batch)).logits
        outputs = model(**batch)
    indices = outputs.selection.keep_indices
    assert torch.equal((indices >= 0).sum(1), batch["attention_mask"].sum(1))
    assert torch.allclose(padded_gather(outputs.logits, indices), padded_gather(expected, indices), atol=1e-4)


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder", "blocks"])
@pytest.mark.parametrize("pointer", ["selector", "attention"])
@pytest.mark.parametrize("marked", [True, False])
def test_without_a_question_everything_is_kept(
    marked, pointer, selection, make_dense, make_model, prepare, samples, stock_inputs, caplog, monkeypatch
):
    """In a batch of any questions; it is said once, for all calls."""
    monkeypatch.setattr(logger, "propagate", True)
    logger.warning_once.__func__.cache_clear()
    dense = make_dense("smolvlm", "eager" if selection == "blocks" else "sdpa")
    model = make_model(dense, selection=selection, pointer=pointer)
    batch = prepare(samples[0], ("", samples[1][1]))
    if marked:
        assert batch["question_mask"].any(1).tolist() == [True, False]
    else:  # nothing but the placeholders of an image
        alone = {name: value[1:, -(16 * 5 + 30) :] for name, value in prepare(samples[0], samples[1]).items()}
        visual = alone["input_ids"] == model.config.image_token_id
        first, last = visual[0].nonzero()[[0, -1], 0].tolist()
        alone = {name: alone[name][:, first - 2 : last + 2] for name in ("input_ids", "attention_mask")}
        batch = alone | {name: prepare(samples[1])[name] for name in ("pixel_values", "pixel_attention_mask")}
    with torch.no_grad():
        expected = dense(**stock_inputs(batch)).logits
        for _ in range(2):
            outputs = model(**batch)
    indices = outputs.selection.keep_indices[-1:]
    assert torch.equal((indices >= 0).sum(1), batch["attention_mask"][-1:].sum(1))
    logits = padded_gather(outputs.logits[-1:], indices)
    assert torch.allclose(logits, padded_gather(expected[-1:], indices), atol=1e-4)
    assert outputs.selection.visual_tokens.tolist()[-1] == 5 * 16
    assert all(count <= 48 for count in outputs.selection.visual_tokens.tolist()[:-1])
    assert [record.getMessage() for record in caplog.records] == [NO_QUESTION]


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder"])
def test_given_scores_select_without_a_question(selection, model, prepare, samples):
    batch = prepare(("", samples[1][1]))
    scores = torch.rand(1, 5 * 16)
    limits = {"min_visual_tokens": 9, "max_visual_tokens": 9, "min_tiles": 1, "max_tiles": 1}
    found = model.select(**batch, selection=selection, visual_token_scores=scores, **limits)
    assert found.visual_tokens.tolist() == [9]


def test_captions_without_a_question_train_as_in_dense(trainable, make_dense, prepare, samples, stock_inputs):
    batch = prepare(("", samples[1][1]))
    batch["labels"] = batch["input_ids"].where(batch["input_ids"] != trainable.config.image_token_id, -100)
    loss = trainable.train()(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, make_dense()(**stock_inputs(batch)).loss)


def test_a_prompt_without_images_is_stock(make_dense, model, prepare):
    text = prepare(("how many cards are there?", []), ("why?", []))
    with torch.no_grad():
        outputs = model(**text)
        assert torch.equal(outputs.logits, make_dense()(**text).logits)
    assert outputs.selection is None


def test_inputs_embeds_are_stock(make_dense, model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, make_dense()(**inputs).logits)


def test_outputs_come_as_a_tuple_on_request(model, single):
    with torch.no_grad():
        outputs = model(**single)
        assert torch.equal(model(**single, return_dict=False)[0], outputs.logits)
        hidden = model.model(**single).last_hidden_state
        assert torch.equal(model.model(**single, return_dict=False)[0], hidden)


# Tiles and tokens that are looked at


@pytest.mark.parametrize("tiles", [0, 1, 3, 16])
def test_the_encoder_sees_the_global_view_and_m_tiles_and_no_more(tiles, model, batch, tiles_encoded):
    grids = [16, 4, 8]
    with tiles_encoded(model) as counts, torch.no_grad():
        selection = model(**batch, min_tiles=tiles, max_tiles=tiles).selection
    expected = [min(tiles, grid) for grid in grids]
    assert selection.tiles.tolist() == expected
    assert counts == [3] + [sum(expected)] * (tiles > 0)
    assert (selection.kept_tiles.sum(1) == selection.tiles + 1).all()


def test_after_encoder_sees_every_tile(model, batch, tiles_encoded):
    with tiles_encoded(model) as counts, torch.no_grad():
        selection = model(**batch, selection="after_encoder").selection
    assert sum(counts) == 17 + 5 + 9
    assert selection.tiles.tolist() == [16, 4, 8]
    assert (selection.visual_tokens <= 48).all()


def test_features_of_a_tile_do_not_depend_on_which_others_are_encoded(model, batch):
    with torch.no_grad():
        few = model(**batch)
        every = model(**batch, selection="after_encoder")
    rows = few.selection.kept_tiles[every.selection.kept_tiles]
    assert 0 < rows.sum() < len(rows)
    assert torch.allclose(features_in(few), features_in(every)[rows], atol=1e-5)


@pytest.mark.parametrize("variant", ["before_encoder", "after_encoder"])
def test_the_budget_follows_the_complexity(variant, model, batch):
    with torch.no_grad():
        selection = model(**batch, selection=variant).selection
    assert torch.equal(selection.complexity * 8, (selection.complexity * 8).round()), "nine levels"
    k = (8 + selection.complexity * (48 - 8)).round().long()
    assert len(set(k.tolist())) > 1, "the samples of this test must differ in their budgets"
    assert torch.equal(selection.visual_tokens, k)
    if variant == "before_encoder":
        assert torch.equal(selection.tiles, (selection.complexity * 4).round().long())
    assert torch.equal(selection.kept_tokens.sum(1), k)
    kept_tiles = selection.kept_tokens.view(3, -1, 16).any(-1)
    assert not (kept_tiles & ~selection.kept_tiles).any(), "a token of a tile that was not encoded"


def test_selection_describes_what_was_kept(model, batch):
    with torch.no_grad():
        outputs = model(**batch)
    selection, indices = outputs.selection, outputs.selection.keep_indices
    visual = batch["input_ids"] == model.config.image_token_id
    for row in range(3):
        kept = indices[row][indices[row] >= 0]
        assert (kept.diff() > 0).all()
        places = visual[row].nonzero()[:, 0]
        mine = selection.kept_tokens[row][: len(places)]
        assert torch.equal(kept[visual[row, kept]], places[mine])
        assert not selection.kept_tokens[row][len(places) :].any()
        question = batch["question_mask"][row].nonzero()[:, 0]
        assert torch.isin(question, kept).all(), "text is never dropped"
    assert selection.grids.tolist() == [[4, 4], [1, 4], [4, 2]]
    assert torch.allclose(selection.relevance.sum((1, 2)), torch.ones(3))


def test_the_text_model_gets_the_original_positions(model, batch):
    seen = []
    hook = model.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        indices = model(**batch).selection.keep_indices
    hook.remove()
    padding = (batch["attention_mask"] == 0).sum(1, keepdim=True)
    assert torch.equal(seen[0][indices >= 0], (indices - padding)[indices >= 0])


def test_select_is_the_selection_of_forward(model, batch):
    with torch.no_grad():
        expected = model(**batch, max_tiles=2).selection
    selection = model.select(**batch, max_tiles=2)
    for name in ("kept_tokens", "kept_tiles", "tiles", "visual_tokens", "keep_indices"):
        assert torch.equal(selection[name], expected[name])
    assert torch.allclose(selection.relevance, expected.relevance, atol=1e-6)


def test_selection_is_the_same_with_and_without_gradients(model, batch):
    expected = model.select(**batch)
    selection = model(**batch).selection
    assert torch.equal(selection.kept_tokens, expected.kept_tokens)
    assert torch.allclose(selection.relevance, expected.relevance, atol=1e-6)
    assert selection.relevance.requires_grad and not expected.relevance.requires_grad


def test_nothing_is_kept_on_the_model_between_calls(model, batch, single):
    with torch.no_grad():
        first = model(**single).logits
        model(**batch, max_tiles=1, selection="after_encoder")
        assert torch.equal(model(**single).logits, first)


def test_batched_equals_single(model, prepare, samples, batch):
    with torch.no_grad():
        together = model(**batch)
        for row, sample in enumerate(samples):
            alone = model(**prepare(sample))
            tokens = alone.selection.kept_tokens[0]
            assert torch.equal(together.selection.kept_tokens[row][: len(tokens)], tokens)
            length = alone.logits.shape[1]
            assert torch.allclose(together.logits[row, -length:], alone.logits[0], atol=1e-4)
    assert len(set(together.selection.visual_tokens.tolist())) > 1


def test_image_counts_may_differ_between_rows(model, prepare, make_image, make_dense):
    rows = [
        ("hi there", []),
        ("where is it?", [make_image(1, 256, 64)]),
        ("how many cards are there?", [make_image(2, 64, 128), make_image(3, 128, 64)]),
    ]
    with torch.no_grad():
        together = model(**prepare(*rows))
        selection = together.selection
        assert selection.image_sample.tolist() == [1, 2, 2]
        assert selection.visual_tokens[0] == 0 and selection.tiles[0] == 0
        text = make_dense()(**prepare(rows[0])).logits
        assert torch.allclose(together.logits[0, -text.shape[1] :], text[0], atol=1e-4)
        for row in (1, 2):
            alone = model(**prepare(rows[row]))
            assert torch.allclose(together.logits[row, -alone.logits.shape[1] :], alone.logits[0], atol=1e-4)


def test_each_image_of_a_prompt_has_its_own_budget(model, prepare, make_image, tiles_encoded):
    inputs = prepare(("which is red?", [make_image(1, 256, 64), make_image(2)]))
    with tiles_encoded(model) as counts, torch.no_grad():
        selection = model(**inputs, min_tiles=2, max_tiles=2, min_visual_tokens=10, max_visual_tokens=10).selection
    assert counts == [2, 4]
    assert selection.kept_tiles[0, :5].sum() == selection.kept_tiles[0, 5:].sum() == 3
    assert selection.kept_tokens[0, :80].sum() == selection.kept_tokens[0, 80:].sum() == 10


def test_stock_inputs_without_masks_give_the_same(model, single, stock_inputs):
    with torch.no_grad():
        expected = model(**single).logits
        assert torch.equal(model(**stock_inputs(single)).logits, expected)
        ids_and_pixels = {name: single[name] for name in ("input_ids", "pixel_values")}
        assert torch.allclose(model(**ids_and_pixels).logits, expected, atol=1e-5)


def test_bfloat16_runs(make_dense, make_model, batch, labelled):
    model = make_model(make_dense().to(torch.bfloat16))
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    model.train()(**labelled).loss.backward()
    assert model.model.selector.query.weight.grad.isfinite().all()


# Scores from elsewhere


def test_given_scores_choose_the_tile_and_the_tokens(model, single, tiles_encoded):
    scores = torch.zeros(1, 272)
    wanted = [5 * 16 + 3, 5 * 16 + 7, 256 + 2]
    scores[0, wanted] = torch.tensor([10.0, 9.0, 8.0])
    scores[0, 7 * 16 : 8 * 16] = 5.0  # a tile counts by its best token
    budget = {"min_tiles": 1, "max_tiles": 1, "min_visual_tokens": 3, "max_visual_tokens": 3}
    with tiles_encoded(model) as counts, torch.no_grad():
        selection = model(**single, **budget, visual_token_scores=scores).selection
    assert selection.kept_tokens[0].nonzero()[:, 0].tolist() == wanted
    assert selection.kept_tiles[0].nonzero()[:, 0].tolist() == [5, 16]
    assert counts == [1, 1]


def test_given_scores_of_short_rows_are_padded_at_the_end(model, batch):
    scores = torch.zeros(3, 272)
    wanted = [16, 2 * 16 + 5, 7 * 16 + 15]
    scores[range(3), wanted] = 1
    scores[1, 5 * 16 :] = 100
    budget = {"min_tiles": 1, "max_tiles": 1, "min_visual_tokens": 1, "max_visual_tokens": 1}
    selection = model.select(**batch, **budget, visual_token_scores=scores)
    assert selection.kept_tokens.nonzero()[:, 1].tolist() == wanted


def test_given_scores_count_in_training_too(trainable, one_tile):
    scores = torch.zeros(2, 16)
    scores[0, 3], scores[1, 9] = 1, 1
    budget = {"min_visual_tokens": 1, "max_visual_tokens": 1}
    selection = trainable(**one_tile, **budget, visual_token_scores=scores).selection
    assert selection.kept_tokens.nonzero().tolist() == [[0, 3], [1, 9]]


def test_given_scores_of_a_wrong_size_are_named(model, batch):
    with pytest.raises(ValueError, match=r"shape \(3, 256\): the prompts hold 3 samples of at most 272 visual tokens"):
        model.select(**batch, visual_token_scores=torch.zeros(3, 256))


# Labels and training


@pytest.mark.parametrize("variant", ["before_encoder", "after_encoder"])
def test_labels_follow_the_kept_positions(variant, model, labelled):
    with torch.no_grad():
        outputs = model(**labelled, selection=variant)
    losses = []
    for row, indices in enumerate(outputs.selection.keep_indices):
        for place in range(1, len(indices)):
            target = labelled["labels"][row, indices[place]]
            if indices[place] >= 0 and target != -100:
                losses.append(-outputs.logits[row, indices[place - 1]].log_softmax(-1)[target])
    assert len(losses) == (labelled["labels"] != -100).sum()
    assert torch.isclose(outputs.loss, torch.stack(losses).mean(), atol=1e-5)


def test_the_selector_does_not_see_what_is_labelled(model, trainable, labelled):
    changed = {name: value.clone() for name, value in labelled.items()}
    answer = changed["labels"] != -100
    changed["input_ids"][answer] = (changed["input_ids"][answer] + 5) % 200 + 10
    for each in (model, trainable):
        with torch.no_grad():
            before, after = each(**labelled).selection, each(**changed).selection
        assert torch.equal(before.relevance, after.relevance)
        assert torch.equal(before.complexity, after.complexity)


def test_the_selector_sees_the_question(model, labelled, asked_otherwise):
    with torch.no_grad():
        before, after = model(**labelled).selection, model(**asked_otherwise).selection
    assert not torch.equal(before.relevance[0], after.relevance[0])
    assert torch.equal(before.relevance[1], after.relevance[1])


def test_a_given_question_mask_is_what_the_selector_reads(model, labelled, asked_otherwise):
    mask = torch.zeros_like(labelled["input_ids"])
    mask[:, 0] = 1
    with torch.no_grad():
        before = model(**labelled, question_mask=mask).selection
        after = model(**asked_otherwise, question_mask=mask).selection
    assert torch.equal(before.relevance, after.relevance)


@pytest.mark.parametrize("variant", ["before_encoder", "after_encoder"])
def test_answers_train_the_selector(variant, trainable, labelled):
    outputs = trainable(**labelled, selection=variant, **TWO_TILES)
    assert outputs.loss.isfinite() and outputs.logits.shape[:2] == labelled["input_ids"].shape
    outputs.loss.backward()
    selector = trainable.model.selector
    for weight in (selector.relevance.weight, selector.query.weight, selector.tile_key.weight):
        assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0
    for name, weight in trainable.named_parameters():
        assert weight.grad is None or weight.grad.isfinite().all(), name


def test_training_encodes_every_tile_and_reports_the_hard_selection(trainable, labelled, tiles_encoded):
    with tiles_encoded(trainable) as counts:
        relaxed = trainable(**labelled, **TWO_TILES)
    assert sum(counts) == 17 + 5
    with torch.no_grad():
        hard = trainable.eval()(**labelled, **TWO_TILES)
    for name in ("kept_tokens", "kept_tiles", "tiles", "visual_tokens"):
        assert torch.equal(relaxed.selection[name], hard.selection[name])
    assert relaxed.glance.relevance.requires_grad and hard.glance is None


def test_training_draws_budgets_between_minimum_and_maximum(trainable, labelled):
    with torch.no_grad():
        drawn = [trainable(**labelled).selection for _ in range(20)]
    tiles, tokens = (torch.stack([selection[name] for selection in drawn]) for name in ("tiles", "visual_tokens"))
    assert set(tiles.flatten().tolist()) == {0, 1, 2, 3, 4}
    assert tokens.min() >= 8 and tokens.max() <= 48 and tokens.unique().numel() > 10


def test_relaxed_forward_with_all_gates_open_is_dense(make_dense, trainable, labelled):
    with torch.no_grad():
        expected = make_dense()(**labelled)
        outputs = trainable(**labelled, **WHOLE)
    indices = outputs.selection.keep_indices
    assert torch.equal((indices >= 0).sum(1), labelled["attention_mask"].sum(1))
    found, gathered = (padded_gather(each.logits, indices) for each in (outputs, expected))
    assert torch.allclose(found, gathered, atol=1e-4)
    assert torch.isclose(outputs.loss, expected.loss, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_relaxed_forward_approaches_the_hard_one(attention, make_dense, make_model, one_tile, monkeypatch):
    monkeypatch.setattr(relaxation, "relaxed_top_k", partial(relaxation.relaxed_top_k, noise=False))
    model = make_model(make_dense("smolvlm", attention))
    budget = {"min_visual_tokens": 5, "max_visual_tokens": 5}
    with torch.no_grad():
        hard = model(**one_tile, **budget)
        cold = model.train()(**one_tile, **budget, gumbel_temperature=1e-5)
        warm = model(**one_tile, **budget, gumbel_temperature=5.0)
    assert torch.isclose(cold.loss, hard.loss, atol=1e-3)
    assert not torch.isclose(warm.loss, hard.loss, atol=1e-2)
    kept = hard.selection.keep_indices
    found, expected = (padded_gather(outputs.logits, kept) for outputs in (cold, hard))
    assert torch.allclose(found, expected, atol=1e-2)


def test_relaxed_forward_approaches_the_hard_one_where_a_tile_keeps_nothing(trainable, labelled, monkeypatch):
    monkeypatch.setattr(relaxation, "relaxed_top_k", partial(relaxation.relaxed_top_k, noise=False))
    budget = {"min_tiles": 4, "max_tiles": 4, "min_visual_tokens": 3, "max_visual_tokens": 3}
    with torch.no_grad():
        cold = trainable(**labelled, **budget, gumbel_temperature=1e-5)
        hard = trainable.eval()(**labelled, **budget)
    assert cold.selection.keep_indices.shape[1] > hard.selection.keep_indices.shape[1]
    assert torch.isclose(cold.loss, hard.loss, atol=1e-3)


def test_relaxed_forward_sees_the_chosen_tiles_only(trainable, labelled):
    def logits(pixel_values):
        torch.manual_seed(7)  # the noise of the gates
        with torch.no_grad():
            outputs = trainable(**{**labelled, "pixel_values": pixel_values}, **TWO_TILES)
        return outputs.logits, outputs.selection.kept_tiles

    pixels = labelled["pixel_values"]
    before, chosen = logits(pixels)
    present = pixels.flatten(2).any(-1)
    is_global = present & (present.cumsum(1) == present.sum(1, keepdim=True))
    for tiles, seen in ((present & ~chosen, False), (chosen & ~is_global, True)):
        assert tiles.any(1).all()
        after, _ = logits(torch.where(tiles[:, :, None, None, None], pixels + 1, pixels))
        assert torch.allclose(after, before, atol=1e-5) != seen


def test_activation_checkpointing_gives_the_same_gradients(trainable, labelled):
    weight = trainable.model.selector.relevance.weight
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = "activation" if hasattr(trainable, "activation_checkpointing_enable") else "gradient"
            getattr(trainable, f"{enable}_checkpointing_enable")()  # renamed within transformers 5
        assert trainable.is_gradient_checkpointing == checkpointing  # read by PEFT; stock's warns since 5.23
        torch.manual_seed(5)
        trainable.zero_grad()
        trainable(**labelled).loss.backward()
        gradients.append(weight.grad.clone())
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_few_steps_of_training_lower_the_loss(trainable, one_tile):
    optimizer = torch.optim.Adam(trainable.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = trainable(**one_tile).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


# Built as stock is


@pytest.fixture
def config(model):
    return copy.deepcopy(model.config)


def test_the_model_is_built_once(config, monkeypatch):
    built = []
    build = SmolVLMModel.__init__
    monkeypatch.setattr(SmolVLMModel, "__init__", lambda self, config: built.append(self) or build(self, config))
    QGSASmolVLMForConditionalGeneration(config)
    assert len(built) == 1


def test_the_model_has_all_that_stock_has(config, make_dense):
    model, stock = QGSASmolVLMForConditionalGeneration(config), make_dense()
    ours, theirs = (SmolVLMForConditionalGeneration(copy.deepcopy(stock.config)), model)
    assert set(vars(ours)) <= set(vars(theirs))
    assert {name for name, _ in ours.named_modules()} <= {name for name, _ in theirs.named_modules()}
    assert model.vocab_size == stock.vocab_size and model.image_token_id == stock.image_token_id
    for text in (stock, model):
        text.model.text_model.generation_config.transformers_version = None
    assert model.model.text_model.generation_config.to_dict() == stock.model.text_model.generation_config.to_dict()


def test_a_configuration_turns_on_checkpointing(config):
    config.gradient_checkpointing = True
    model = QGSASmolVLMForConditionalGeneration(config)
    for part in (model.model.text_model, model.model.vision_model.encoder):
        assert all(layer.gradient_checkpointing for layer in part.layers)
    assert "gradient_checkpointing" not in model.config.to_dict(), "as in stock: it is not saved"


# From dense, saved and loaded


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_from_dense_copies_every_weight(kind, make_dense, tokenizer, stock_processor, tmp_path):
    dense = make_dense(kind)
    dense.generation_config.no_repeat_ngram_size = 5
    dense.save_pretrained(tmp_path)
    stock_processor.save_pretrained(tmp_path)
    for base, of in ((dense, tokenizer), (str(tmp_path), None), (tmp_path, None)):
        model = QGSASmolVLMForConditionalGeneration.from_dense(base, of, max_tiles=3)
        weights = model.state_dict()
        added = {name for name in weights if name.startswith(("model.selector.", "model.complexity_estimator."))}
        assert set(weights) - added == set(dense.state_dict())
        for name, weight in dense.state_dict().items():
            assert torch.equal(weights[name], weight), name
        assert model.config.max_tiles == 3 and model.config.model_type == "qgsa_smolvlm"
        assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
        assert model.config.tile_token_ids[-1] == tokenizer.convert_tokens_to_ids("<row_6_col_6>")
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id
        assert model.generation_config.no_repeat_ngram_size == 5
        assert not model.training


def test_the_selector_of_a_dense_model_starts_without_places(make_dense, tokenizer):
    selector = QGSASmolVLMForConditionalGeneration.from_dense(make_dense(), tokenizer).model.selector
    assert not selector.cell_position.any() and not selector.word_position.any()
    assert torch.equal(selector.query.weight, torch.cat([selector.tile_key.weight, selector.glance_key.weight]))
    width = selector.glance_projection.in_features
    assert selector.glance_projection.weight.std().item() == pytest.approx(width**-0.5, rel=0.1)


def test_from_dense_leaves_the_dense_model_alone(make_dense, make_model):
    dense = make_dense()
    before = copy.deepcopy(dense.state_dict())
    model = make_model(dense)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert all(torch.equal(weight, before[name]) for name, weight in dense.state_dict().items())


def test_from_dense_keeps_tied_embeddings_tied(make_dense, tokenizer):
    config = make_dense().config
    config.tie_word_embeddings = True
    tied = make_dense()._from_config(config)
    model = QGSASmolVLMForConditionalGeneration.from_dense(tied, tokenizer)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, tied.lm_head.weight)


def test_from_dense_names_another_architecture(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    llama = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    for base in (llama, str(tmp_path)):
        with pytest.raises(ValueError, match=r"model_type \('llama'\)"):
            QGSASmolVLMForConditionalGeneration.from_dense(base)


def test_from_dense_names_weights_without_a_place(make_dense, tokenizer):
    dense = make_dense()
    dense.model.extra = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"2 have no counterpart \(\['model.extra"):
        QGSASmolVLMForConditionalGeneration.from_dense(dense, tokenizer)


def test_from_dense_names_the_markers_a_tokenizer_lacks(make_dense, tokenizer):
    class Plain:
        def get_vocab(self):
            vocabulary = tokenizer.get_vocab()
            return {name: vocabulary[name] for name in vocabulary if name != "<image>"}

    with pytest.raises(ValueError, match=r"lacks 1 of the 2 tokens of an image: \['<image>'\]"):
        QGSASmolVLMForConditionalGeneration.from_dense(make_dense(), Plain())


def test_save_and_load_give_equal_logits(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = QGSASmolVLMForConditionalGeneration.from_pretrained(tmp_path)
    base = QGSASmolVLMModel.from_pretrained(tmp_path)
    named = {"_name_or_path": str(tmp_path)}
    assert loaded.config.to_dict() == model.config.to_dict() | named
    with torch.no_grad():
        expected = model(**batch)
        assert torch.equal(loaded(**batch).logits, expected.logits)
        assert torch.equal(model.lm_head(base(**batch).last_hidden_state), expected.logits)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"configuration_qgsa.py", "modeling_qgsa.py", "selection_qgsa.py"} <= names


def test_attention_can_be_switched(model, make_model, batch):
    other = make_model()
    other.set_attn_implementation("eager")
    with torch.no_grad():
        sdpa, eager = (each(**batch).logits[batch["attention_mask"] > 0] for each in (model, other))
    assert torch.allclose(eager, sdpa, atol=1e-4)


# Bad input


@pytest.fixture
def broken(single):
    """A batch that a test may break."""
    return {name: value.clone() for name, value in single.items()}


def test_more_tiles_than_placeholders(model, broken):
    broken["pixel_values"] = torch.cat([broken["pixel_values"]] * 2, 1)
    del broken["pixel_attention_mask"]
    with pytest.raises(ValueError, match="placeholders for 17 tiles, but pixel_values holds 34"):
        model(**broken)


def test_fewer_tiles_than_placeholders(model, broken):
    broken["pixel_values"] = broken["pixel_values"][:, :15]
    with pytest.raises(ValueError, match="placeholders for 17 tiles, but pixel_values holds 15"):
        model.generate(**broken)


def test_a_placeholder_too_few(model, broken):
    place = int((broken["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    broken["input_ids"][0, place] = 9
    with pytest.raises(ValueError, match=r"image placeholders \(271\) must be a multiple of .* per tile \(16\)"):
        model.select(**broken)


def test_a_missing_global_view(model, broken):
    marker = (broken["input_ids"][0] == model.config.global_image_token_id).nonzero()[0, 0]
    kept = torch.ones(broken["input_ids"].shape[1], dtype=torch.bool)
    kept[marker - 1 : marker + 18] = False
    for name in ("input_ids", "attention_mask", "question_mask"):
        broken[name] = broken[name][:, kept]
    with pytest.raises(ValueError, match="sample 0: the last image has no global view"):
        model(**broken)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("training", [False, True])
def test_pixels_that_are_no_numbers(training, bad, trainable, broken):
    broken["pixel_values"][0, 3, 1, 5, 5] = bad
    with pytest.raises(ValueError, match="sample 0: pixel_values holds NaN or infinite values"):
        trainable.train(training)(**broken)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"selection": "some"}, "selection ('some')"),
        ({"min_tiles": -1}, "min_tiles (-1)"),
        ({"max_visual_tokens": 0}, "min_visual_tokens (8) must not exceed max_visual_tokens (0)"),
    ],
)
def test_a_budget_out_of_range(model, broken, overrides, message):
    for call in (model, model.generate, model.select):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(**broken, **overrides)


def test_dense_selects_nothing(model, broken):
    with pytest.raises(ValueError, match=r'selection \("dense"\) keeps everything'):
        model.select(**broken, selection="dense")


# Features instead of pixels


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder"])
def test_features_in_the_place_of_pixels_answer_alike(selection, model, batch, tiles_encoded):
    with torch.no_grad():
        features = features_in(model(**batch, selection="after_encoder"))
        expected = model(**batch, selection=selection)
        inputs = {name: value for name, value in batch.items() if not name.startswith("pixel")}
        with tiles_encoded(model) as counts:
            found = model(**inputs, image_hidden_states=features, selection=selection)
    assert counts == []
    assert torch.equal(found.selection.kept_tokens, expected.selection.kept_tokens)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)


def test_features_of_other_tiles_are_refused(model, batch):
    inputs = {name: value for name, value in batch.items() if not name.startswith("pixel")}
    with pytest.raises(ValueError, match="image_hidden_states has shape"):
        model(**inputs, image_hidden_states=torch.zeros(3, 16, 32))
    with pytest.raises(ValueError, match='not available with selection="dense"'):
        model(**inputs, image_hidden_states=torch.zeros(3, 16, 32), selection="dense")
