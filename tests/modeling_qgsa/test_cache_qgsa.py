"""Several turns and foreign loops on one cache, which holds fewer slots than the conversation has positions."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_qgsa.cache_qgsa import Past
from modeling_qgsa.compat_qgsa import CACHE


NEW = 5
FIXED = {"min_tiles": 2, "max_tiles": 2, "min_visual_tokens": 12, "max_visual_tokens": 12}
VARIANTS = ("before_encoder", "after_encoder", "blocks")
WITH_LOGITS = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def more(tokenizer):
    """A second turn of text, as ids."""
    text = "<end_of_utterance>\nUser:how many cards are there?<end_of_utterance>\nAssistant:"
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def greedy_without_cache(model, inputs, **options):
    """Ids of a loop that reads the whole conversation at each step; the question stays that of `inputs`."""
    loop = dict(inputs)
    for _ in range(NEW):
        with torch.no_grad():
            token = model(**loop, use_cache=False, **options).logits[:, -1:].argmax(-1)
        loop = append(loop, token)
    return loop["input_ids"]


def append(inputs, tokens):
    """`inputs` with more text behind it, which is no part of the question."""
    longer = {"input_ids": tokens, "attention_mask": tokens * 0 + 1, "question_mask": tokens * 0}
    return {**inputs, **{name: torch.cat([inputs[name], new], 1) for name, new in longer.items()}}


def without_images(inputs):
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("mask", ["whole", "none"])
@pytest.mark.parametrize("variant", [*VARIANTS, "dense"])
def test_a_foreign_loop_on_the_cache_of_forward(variant, mask, model, single):
    expected = greedy_without_cache(model, single, selection=variant)
    with torch.no_grad():
        outputs = model(**single, use_cache=True, selection=variant)
        ids, attention = single["input_ids"], single["attention_mask"]
        for _ in range(NEW):
            token = outputs.logits[:, -1:].argmax(-1)
            ids, attention = torch.cat([ids, token], 1), torch.cat([attention, token * 0 + 1], 1)
            given = {"attention_mask": attention} if mask == "whole" else {}
            outputs = model(input_ids=token, past_key_values=outputs[CACHE], **given)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_a_foreign_loop_over_a_padded_batch(variant, model, batch):
    token = batch["input_ids"][:, -1:]
    longer = append(batch, token)
    with torch.no_grad():
        expected = model(**longer, selection=variant).logits[:, -1]
        cache = model(**batch, use_cache=True, selection=variant)[CACHE]
        found = model(input_ids=token, attention_mask=longer["attention_mask"], past_key_values=cache).logits[:, -1]
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("images", ["without", "with"])
@pytest.mark.parametrize("name", ["single", "batch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_chat_on_one_cache(variant, name, images, model, more, request):
    """The image is seen as the first question chose; the same pixels may be given again."""
    inputs = request.getfixturevalue(name)
    cache = DynamicCache(config=model.config.text_config)
    first = model.generate(**inputs, max_new_tokens=NEW, past_key_values=cache, selection=variant)
    answer = first[:, inputs["input_ids"].shape[1] :]
    conversation = append(append(inputs, answer), more.expand(len(answer), -1))
    expected = model.generate(**conversation, max_new_tokens=NEW, selection=variant)
    given = conversation if images == "with" else without_images(conversation)
    slots = cache.get_seq_length()
    second = model.generate(**given, max_new_tokens=NEW, past_key_values=cache, selection=variant)
    assert torch.equal(second, expected)
    assert cache.get_seq_length() == slots + more.shape[1] + NEW
    third = append(append(conversation, second[:, -NEW:]), more.expand(len(answer), -1))
    expected = model.generate(**third, max_new_tokens=NEW, selection=variant)
    found = model.generate(**without_images(third), max_new_tokens=NEW, past_key_values=cache, selection=variant)
    assert torch.equal(found, expected)


def test_the_new_part_alone_with_a_mask_over_the_whole(model, single, more):
    cache = DynamicCache(config=model.config.text_config)
    first = model.generate(**single, max_new_tokens=NEW, past_key_values=cache)
    conversation = append(append(single, first[:, -NEW:]), more)
    expected = model.generate(**conversation, max_new_tokens=NEW)[:, -NEW:]
    new = conversation["input_ids"][:, first.shape[1] - 1 :]
    given = {"input_ids": new, "attention_mask": conversation["attention_mask"]}
    assert torch.equal(model.generate(**given, max_new_tokens=NEW, past_key_values=cache)[:, -NEW:], expected)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("images", ["all", "new"])
def test_a_second_image_in_the_second_turn(images, lazy, model, processor, make_image):
    """Each image as its own question chose; the reference gets both choices as scores and has no cache."""
    pictures = [make_image(1, 256, 128), make_image(2, 128, 256)]
    turn = "<end_of_utterance>\nUser:<image>and here, where is it?<end_of_utterance>\nAssistant:"
    prompts = ["User:<image>where is the blue card?<end_of_utterance>\nAssistant:"]
    lazily = {"lazy_tiles": True} if lazy else {}
    inputs = dict(processor(text=prompts, images=pictures[:1], return_tensors="pt", **lazily))
    cache = DynamicCache(config=model.config.text_config)
    first = model.generate(**inputs, **FIXED, max_new_tokens=NEW, past_key_values=cache, return_dict_in_generate=True)
    both = dict(processor(text=[prompts[0] + turn], images=pictures, return_tensors="pt", **lazily))
    start = inputs["input_ids"].shape[1]
    answer = first.sequences[:, start:]
    for name, new in (("input_ids", answer), ("attention_mask", answer * 0 + 1), ("question_mask", answer * 0)):
        both[name] = torch.cat([both[name][:, :start], new, both[name][:, start:]], 1)
    given = dict(both)
    if images == "new":
        alone = dict(processor(text=[turn], images=pictures[1:], return_tensors="pt", **lazily))
        given |= {name: alone.get(name) for name in ("pixel_values", "pixel_attention_mask", "lazy_tiles")}
    second = model.generate(**given, **FIXED, max_new_tokens=NEW, past_key_values=cache, return_dict_in_generate=True)
    assert second.selection.visual_tokens.tolist() == [12] and second.selection.tiles.tolist() == [2]
    scores = torch.cat([each.selection.kept_tokens.float() for each in (first, second)], 1)
    expected = model.generate(**both, **FIXED, max_new_tokens=NEW, visual_token_scores=scores)
    assert torch.equal(second.sequences, expected)
    more = append(both, second.sequences[:, -NEW:])
    more = append(more, both["input_ids"][:, -6:])
    expected = model.generate(**more, **FIXED, max_new_tokens=NEW, visual_token_scores=scores)
    third = model.generate(**without_images(more), max_new_tokens=NEW, past_key_values=cache)
    assert torch.equal(third, expected)


def test_an_image_after_a_conversation_that_was_read_whole(model, prepare, make_image, tokenizer):
    question = ("where is it?", [make_image(1, 256, 64)])
    inputs, text = prepare(question), prepare(("hi there", []))
    cache = DynamicCache(config=model.config.text_config)
    model.generate(**text, max_new_tokens=1, past_key_values=cache)
    joined = {name: torch.cat([text[name], inputs[name]], 1) for name in ("input_ids", "attention_mask")}
    given = {**inputs, **joined}
    given["question_mask"] = torch.cat([text["input_ids"] * 0, inputs["question_mask"]], 1)
    expected = model.generate(**given, max_new_tokens=NEW)
    assert torch.equal(model.generate(**given, max_new_tokens=NEW, past_key_values=cache), expected)


def test_a_system_turn_is_read_once_for_many_questions(model, processor, make_image):
    cache = None
    system = {"role": "system", "content": [{"type": "text", "text": "answer in one word. " * 9}]}
    for seed, question in enumerate(("where is it?", "what shape is on the red card?", "what is it?")):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [system, {"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = dict(processor(text=text, images=make_image(seed), return_tensors="pt"))
        if cache is None:
            end = int((inputs["input_ids"][0] == model.config.end_of_utterance_token_id).nonzero()[0]) + 1
            with torch.no_grad():
                cache = model(input_ids=inputs["input_ids"][:, :end], use_cache=True)[CACHE]
        expected = model.generate(**inputs, **WITH_LOGITS)
        found = model.generate(**inputs, **WITH_LOGITS, past_key_values=copy.deepcopy(cache))
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.selection.relevance, expected.selection.relevance)
        assert torch.allclose(torch.cat(found.logits), torch.cat(expected.logits), atol=1e-4)


def test_a_forward_pass_over_a_second_image(model, processor, make_image):
    """As the turn in `generate`, but foreign code gives the new positions alone, and a mask over all."""
    inputs = dict(processor(text="User:<image>where?<end_of_utterance>", images=make_image(1), return_tensors="pt"))
    again = dict(processor(text="User:<image>what?<end_of_utterance>", images=make_image(2), return_tensors="pt"))
    with torch.no_grad():
        cache = model(**inputs, **FIXED)[CACHE]
        mask = torch.cat([inputs["attention_mask"], again["attention_mask"]], 1)
        chosen = [model(**each, **FIXED).selection.kept_tokens.float() for each in (inputs, again)]
        found = model(**{**again, "attention_mask": mask}, **FIXED, past_key_values=cache)
        whole = {name: torch.cat([inputs[name], again[name]], 1) for name in inputs}
        expected = model(**whole, **FIXED, visual_token_scores=torch.cat(chosen, 1))
    length = again["input_ids"].shape[1]
    assert found.logits.shape[1] == length
    assert torch.allclose(found.logits, expected.logits[:, -length:], atol=1e-4)


def test_dense_chats_are_those_of_the_stock_model(make_dense, model, batch, stock_inputs, more):
    dense, answers = make_dense(), []
    for each, options in ((dense, {}), (model, {"selection": "dense"})):
        cache = DynamicCache(config=model.config.text_config)
        inputs = stock_inputs(batch)
        first = each.generate(**inputs, max_new_tokens=NEW, **{CACHE: cache}, **options)
        ids = torch.cat([first, more.expand(3, -1)], 1)
        mask = torch.cat([inputs["attention_mask"], ids.new_ones(3, ids.shape[1] - inputs["input_ids"].shape[1])], 1)
        answers.append(
            each.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, **{CACHE: cache}, **options)
        )
    assert torch.equal(*answers)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_several_rows_of_one_sample_go_on(options, model, single, more):
    outputs = model.generate(**single, max_new_tokens=NEW, return_dict_in_generate=True, **options)
    cache, ids = outputs[CACHE], outputs.sequences
    if len(ids) != cache.layers[0].keys.shape[0]:
        ids = ids.expand(cache.layers[0].keys.shape[0], -1)
    token = ids[:, -1:]
    length = single["input_ids"].shape[1] + cache.get_seq_length() - model.select(**single).keep_indices.shape[1]
    past = Past.of(cache, token)
    assert past.seen == length
    with torch.no_grad():
        found = model(input_ids=token, past_key_values=cache).logits
    assert found.isfinite().all()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_cache_go_on_too(how, model, single, more):
    with torch.no_grad():
        cache = model(**single, use_cache=True)[CACHE]
        twin = copy.deepcopy(cache) if how == "deepcopy" else pickle.loads(pickle.dumps(cache))
        expected = model(input_ids=more, past_key_values=cache).logits
        assert torch.equal(model(input_ids=more, past_key_values=twin).logits, expected)


def test_the_cache_goes_by_both_of_its_names(model, single, more):
    """Whatever the version of transformers calls it."""
    conversation = append(single, more)
    with torch.no_grad():
        filled = model(**single, use_cache=True)[CACHE]
        caches = [{name: copy.deepcopy(filled)} for name in ("past_key_values", "cache")]
        one, other = (model(input_ids=more, **cache).logits for cache in caches)
        assert torch.equal(one, other)
        base = model.model(input_ids=more, cache=copy.deepcopy(filled)).last_hidden_state
        assert torch.equal(model.lm_head(base), one)
        with pytest.raises(ValueError, match="past_key_values and cache are names of the same argument"):
            model(input_ids=more, past_key_values=filled, cache=filled)
    caches = [{name: copy.deepcopy(filled)} for name in ("past_key_values", "cache")]
    one, other = (model.generate(**without_images(conversation), max_new_tokens=NEW, **cache) for cache in caches)
    assert torch.equal(one, other) and torch.equal(one, model.generate(**conversation, max_new_tokens=NEW))
    with pytest.raises(ValueError, match="past_key_values and cache are names of the same argument"):
        model.generate(**single, past_key_values=filled, cache=filled)


def test_a_static_cache(model, single, more):
    cache = StaticCache(config=model.config.text_config, max_cache_len=900)
    first = model.generate(**single, max_new_tokens=NEW, past_key_values=cache)
    conversation = append(append(single, first[:, -NEW:]), more)
    expected = model.generate(**conversation, max_new_tokens=NEW)
    second = model.generate(**without_images(conversation), max_new_tokens=NEW, past_key_values=cache)
    assert torch.equal(second, expected)


def test_the_loop_of_generate_does_not_ask_a_static_cache_for_its_length(model, single, monkeypatch):
    """It is a tensor, and its value would have to be waited for at each step."""
    cache = StaticCache(config=model.config.text_config, max_cache_len=900)
    asked = []
    monkeypatch.setattr(Past, "of", lambda cache, inputs, of=Past.of: asked.append(cache) or of(cache, inputs))
    model.generate(**single, max_new_tokens=NEW, past_key_values=cache)
    assert asked.count(cache) <= 2 and len(asked) <= 3


def test_a_cache_that_was_reset_is_new(model, single):
    cache = StaticCache(config=model.config.text_config, max_cache_len=900)
    first = model.generate(**single, max_new_tokens=NEW, past_key_values=cache)
    cache.reset()
    assert torch.equal(model.generate(**single, max_new_tokens=NEW, past_key_values=cache), first)


# Refusals


@pytest.fixture
def cache(model, single):
    with torch.no_grad():
        return model(**single, use_cache=True)[CACHE]


def test_a_mask_of_another_length_is_named(model, single, cache, more):
    seen, length = single["input_ids"].shape[1], more.shape[1]
    with pytest.raises(ValueError, match=rf"attention_mask has shape \(1, {seen}\): expected 1 x {seen + length}"):
        model(input_ids=more, attention_mask=single["attention_mask"], past_key_values=cache)


def test_a_cache_cropped_within_its_prompt_is_refused(model, cache, more):
    slots = cache.get_seq_length()
    cache.crop(-2)
    with pytest.raises(ValueError, match=f"holds {slots - 2} positions, but a selection filled its first {slots}"):
        model(input_ids=more, past_key_values=cache)


def test_a_cache_cropped_behind_its_prompt_goes_on(model, single, cache, more):
    slots = cache.get_seq_length()
    with torch.no_grad():
        expected = model(input_ids=more, past_key_values=cache).logits
        cache.crop(slots - cache.get_seq_length())
        assert torch.equal(model(input_ids=more, past_key_values=cache).logits, expected)


def test_another_batch_is_refused(model, batch, more):
    with torch.no_grad():
        cache = model(**batch, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="belongs to 3 samples, but there are 2 inputs"):
        model(input_ids=more.expand(2, -1), past_key_values=cache)


def test_a_conversation_without_anything_new_is_refused(model, single, cache):
    length = single["input_ids"].shape[1]
    with pytest.raises(ValueError, match=f"input_ids holds {length} positions, but {length} are behind"):
        model.generate(**single, max_new_tokens=2, past_key_values=cache)


def test_embeddings_cannot_continue_a_selection(model, single, cache):
    embeds = model.get_input_embeddings()(single["input_ids"])
    with pytest.raises(ValueError, match="which only input_ids can continue"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2, past_key_values=cache)


def test_a_relaxed_selection_cannot_go_on(make_model, single, cache):
    given = {name: value for name, value in single.items() if name != "attention_mask"}
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        make_model().train()(**given, past_key_values=cache)
