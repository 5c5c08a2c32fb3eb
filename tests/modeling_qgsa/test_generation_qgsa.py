"""Generation: stock where nothing is selected, and the same answers by every route where something is."""

import pytest
import torch
from transformers import GenerationConfig


NEW = 6


@pytest.fixture(scope="module")
def answers(model, batch):
    return model.generate(**batch, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def mixed(prepare, make_image):
    """Rows with 0, 1 and 2 images."""
    rows = [
        ("hi there", []),
        ("where is it?", [make_image(1, 256, 64)]),
        ("how many cards are there?", [make_image(2, 64, 128), make_image(3, 128, 64)]),
    ]
    return rows, prepare(*rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_dense_ids_are_those_of_the_stock_model(kind, attention, make_dense, make_model, single, batch, stock_inputs):
    dense = make_dense(kind, attention)
    model = make_model(dense)
    for inputs in (single, batch):
        expected = dense.generate(**stock_inputs(inputs), max_new_tokens=NEW)
        assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, selection="dense"), expected)
    beams = dense.generate(**stock_inputs(batch), max_new_tokens=3, num_beams=2)
    assert torch.equal(model.generate(**batch, max_new_tokens=3, num_beams=2, selection="dense"), beams)


def test_whole_budget_gives_the_ids_of_the_stock_model(make_dense, model, batch, stock_inputs):
    expected = make_dense().generate(**stock_inputs(batch), max_new_tokens=NEW)
    budget = {"min_tiles": 16, "max_tiles": 16, "min_visual_tokens": 272, "max_visual_tokens": 272}
    assert torch.equal(model.generate(**batch, **budget, max_new_tokens=NEW), expected)


def test_prompt_ids_are_returned_in_front(answers, batch):
    length = batch["input_ids"].shape[1]
    assert answers.shape == (3, length + NEW)
    assert torch.equal(answers[:, :length], batch["input_ids"])


def test_dropped_tokens_change_the_answer(model, batch, answers):
    """Guards the tests of this file: with this model, the ids depend on the tokens kept."""
    other = model.generate(**batch, max_new_tokens=NEW, max_tiles=0, min_visual_tokens=1, max_visual_tokens=1)
    assert (answers != other).any(1).all()


def test_batched_equals_single(model, prepare, samples, batch, answers):
    selection = model.select(**batch)
    assert len(set(selection.visual_tokens.tolist())) > 1
    for row, sample in enumerate(samples):
        alone = model.generate(**prepare(sample), max_new_tokens=NEW)
        assert torch.equal(answers[row, -NEW:], alone[0, -NEW:])


@pytest.mark.parametrize("variant", ["before_encoder", "after_encoder"])
@pytest.mark.parametrize("name", ["single", "batch"])
def test_cached_equals_a_loop_without_cache(variant, name, model, request):
    inputs = request.getfixturevalue(name)
    cached = model.generate(**inputs, max_new_tokens=NEW, selection=variant)
    loop = dict(inputs)
    for _ in range(NEW):
        with torch.no_grad():
            token = model(**loop, selection=variant, use_cache=False).logits[:, -1:].argmax(-1)
        for key, new in (("input_ids", token), ("attention_mask", token * 0 + 1), ("question_mask", token * 0)):
            loop[key] = torch.cat([loop[key], new], 1)
    assert torch.equal(loop["input_ids"], cached)


@pytest.mark.parametrize("name", ["single", "batch", "mixed"])
def test_positions_go_on_from_the_last_original_one(name, model, request):
    inputs = request.getfixturevalue(name)
    inputs = inputs[1] if name == "mixed" else inputs
    seen = []
    hook = model.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    model.generate(**inputs, max_new_tokens=4)
    hook.remove()
    lengths = inputs["attention_mask"].sum(1)
    indices = model.select(**inputs).keep_indices
    assert seen[0].shape == indices.shape and indices.shape[1] < inputs["input_ids"].shape[1]
    padding = (inputs["attention_mask"] == 0).sum(1, keepdim=True)
    real = indices >= 0
    assert torch.equal(seen[0][real], (indices - padding)[real])
    assert torch.equal(seen[0][:, -1], lengths - 1)
    for step, positions in enumerate(seen[1:]):
        assert torch.equal(positions[:, 0], lengths + step)


def test_the_encoder_runs_once_and_only_over_what_is_selected(model, batch, tiles_encoded):
    with tiles_encoded(model) as counts:
        model.generate(**batch, max_new_tokens=4, num_beams=2, min_tiles=2, max_tiles=2)
    assert counts == [3, 6]


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_every_cache_gives_the_same(cache, model, batch, answers):
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW, cache_implementation=cache), answers)


def test_eager_gives_the_same(make_dense, make_model, batch, answers):
    eager = make_model(make_dense("smolvlm", "eager"))
    assert torch.equal(eager.generate(**batch, max_new_tokens=NEW), answers)


def test_sampling_is_seeded(model, batch):
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate(**batch, max_new_tokens=NEW, do_sample=True, num_return_sequences=2))
    assert runs[0].shape == (6, batch["input_ids"].shape[1] + NEW)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(runs[0][:, :-NEW], batch["input_ids"].repeat_interleave(2, 0))


def test_beams(model, prepare, samples, batch):
    together = model.generate(**batch, max_new_tokens=4, num_beams=3)
    assert torch.equal(together[:, :-4], batch["input_ids"])
    for row, sample in enumerate(samples):
        alone = model.generate(**prepare(sample), max_new_tokens=4, num_beams=3)
        assert torch.equal(together[row, -4:], alone[0, -4:])


def test_rows_with_different_image_counts(model, make_dense, prepare, mixed):
    rows, inputs = mixed
    together = model.generate(**inputs, max_new_tokens=NEW)
    text = make_dense().generate(**prepare(rows[0]), max_new_tokens=NEW)
    assert torch.equal(together[0, -NEW:], text[0, -NEW:])
    for row in (1, 2):
        alone = model.generate(**prepare(rows[row]), max_new_tokens=NEW)
        assert torch.equal(together[row, -NEW:], alone[0, -NEW:])


def test_text_alone_is_stock(make_dense, model, prepare):
    text = prepare(("how many cards are there?", []), ("why?", []))
    expected = make_dense().generate(**text, max_new_tokens=NEW)
    assert torch.equal(model.generate(**text, max_new_tokens=NEW), expected)
    positional = model.generate(text["input_ids"], attention_mask=text["attention_mask"], max_new_tokens=NEW)
    assert torch.equal(positional, expected)


def test_inputs_embeds_are_passed_through(make_dense, model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "max_new_tokens": NEW}
    expected = make_dense().generate(**inputs)
    assert expected.shape == (3, NEW)
    assert torch.equal(model.generate(**inputs), expected)


def test_a_stock_processor_is_enough(model, batch, answers, stock_inputs):
    assert torch.equal(model.generate(**stock_inputs(batch), max_new_tokens=NEW), answers)


def test_a_single_tile_image_keeps_the_best_of_its_tokens(model, prepare, make_image, tiles_encoded):
    inputs = prepare(("what shape?", [make_image(1)]), do_image_splitting=False)
    with tiles_encoded(model) as counts:
        ids = model.generate(**inputs, max_new_tokens=3, min_visual_tokens=4, max_visual_tokens=4)
    assert counts == [1] and ids.shape[1] == inputs["input_ids"].shape[1] + 3
    assert model.select(**inputs, min_visual_tokens=4, max_visual_tokens=4).visual_tokens.tolist() == [4]


def test_given_scores_decide(model, batch, answers):
    scores = torch.rand(3, 272, generator=torch.Generator().manual_seed(3))
    other = model.generate(**batch, max_new_tokens=NEW, visual_token_scores=scores)
    assert not torch.equal(other, answers)
    repeated = model.generate(**batch, max_new_tokens=NEW, visual_token_scores=100 * scores)
    assert torch.equal(other, repeated), "only the order of the scores counts"


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("limit", ["max_length", "generation_config", "none"])
def test_lengths_count_the_whole_prompt_as_in_the_stock_model(limit, make_dense, model, batch, stock_inputs):
    length = batch["input_ids"].shape[1]
    options = {
        "max_length": {"max_length": length + 3},
        "generation_config": {
            "generation_config": GenerationConfig(
                max_length=length + 4, pad_token_id=model.config.text_config.pad_token_id
            )
        },
        "none": {},
    }[limit]
    expected = make_dense().generate(**stock_inputs(batch), **options)
    assert expected.shape[1] > length
    assert model.generate(**batch, **options).shape == expected.shape


def test_min_length_counts_the_whole_prompt(model, batch, answers):
    """The first token would end the answer if it were allowed to."""
    length = batch["input_ids"].shape[1]
    end = answers[:, length].unique().tolist()
    ids = model.generate(**batch, max_new_tokens=5, min_length=length + 3, eos_token_id=end)
    assert not torch.isin(ids[:, length : length + 3], torch.tensor(end)).any()


def test_given_position_ids_are_used(model, single):
    positions = torch.arange(single["input_ids"].shape[1])[None]
    expected = model.generate(**single, max_new_tokens=NEW)
    assert torch.equal(model.generate(**single, position_ids=positions, max_new_tokens=NEW), expected)


def test_scores_and_sequences_come_as_a_dictionary_on_request(model, batch, answers):
    outputs = model.generate(**batch, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(outputs.sequences, answers)
    assert torch.equal(torch.stack(outputs.logits, 1).argmax(-1), answers[:, -NEW:])
    assert torch.equal(outputs.selection.keep_indices, model.select(**batch).keep_indices)


def test_a_model_in_training_generates_with_the_hard_selection(make_model, batch, answers):
    model = make_model().train()
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW), answers)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 16}])
def test_ways_to_decode_that_read_the_whole_prompt_are_refused(options, model, single):
    with pytest.raises(ValueError, match=f"{next(iter(options))} reads the whole prompt"):
        model.generate(**single, max_new_tokens=3, **options)
    config = GenerationConfig(**options)
    with pytest.raises(ValueError, match=f"{next(iter(options))} reads the whole prompt"):
        model.generate(**single, max_new_tokens=3, generation_config=config)


def test_embeddings_beside_their_ids_are_answered(model, single):
    embeds = model.get_input_embeddings()(single["input_ids"])
    given = {"input_ids": single["input_ids"], "attention_mask": single["attention_mask"]}
    ids = model.generate(**given, inputs_embeds=embeds, max_new_tokens=3)
    assert torch.equal(ids[:, :-3], single["input_ids"])
    with pytest.raises(ValueError, match="272 image placeholders, but pixel_values is missing"):
        model.generate(**given, max_new_tokens=3)


def test_prompts_beyond_the_positions_of_the_config_are_answered(model, prepare, make_image):
    """They are rotary: there is no table to run out of. 4 images make more than the 1024 of the config."""
    inputs = prepare(("how many cards are there?", [make_image(seed) for seed in range(4)]))
    assert inputs["input_ids"].shape[1] > model.config.text_config.max_position_embeddings
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
