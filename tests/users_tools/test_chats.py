"""Decoding loops and chats of users' own, on one cache: every step is that of a run without a cache."""

import pytest
import torch
from recording import assert_close
from transformers import DynamicCache

from modeling_qgsa.compat_qgsa import CACHE


NEW = 4


def extended(inputs, token):
    """Inputs with one more token at the end."""
    longer = dict(inputs)
    for name, column in (
        ("input_ids", token),
        ("attention_mask", torch.ones_like(token)),
        ("question_mask", 0 * token),
    ):
        if name in inputs:
            longer[name] = torch.cat([inputs[name], column], 1)
    return longer


def steps_without_cache(model, inputs, tail_logits):
    """Greedy ids and the logits of each step."""
    logits = []
    for _ in range(NEW):
        logits.append(tail_logits(model, inputs))
        inputs = extended(inputs, logits[-1].argmax(-1, keepdim=True))
    return inputs["input_ids"][:, -NEW:], torch.stack(logits, 1)


@pytest.mark.parametrize("mask", [False, True])
def test_a_loop_on_the_cache_of_forward(mask, tool_model, asked_alone, tail_logits):
    """`model(**inputs, use_cache=True)`, then each token with the cache, and with a mask as long as the text."""
    ids, expected = steps_without_cache(tool_model, asked_alone, tail_logits)
    with torch.no_grad():
        output = tool_model(**asked_alone, use_cache=True)
        found, attention_mask = [output.logits[:, -1]], asked_alone["attention_mask"]
        for step in range(1, NEW):
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], 1)
            given = {"attention_mask": attention_mask} if mask else {}
            output = tool_model(input_ids=ids[:, step - 1 : step], use_cache=True, **given, **{CACHE: output[CACHE]})
            found.append(output.logits[:, -1])
    assert_close(torch.stack(found, 1), expected, atol=1e-3)


def test_a_loop_over_a_padded_batch(tool_model, asked, tail_logits):
    ids, expected = steps_without_cache(tool_model, asked, tail_logits)
    attention_mask, found = asked["attention_mask"], []
    with torch.no_grad():
        output = tool_model(**asked, use_cache=True)
        for step in range(1, NEW + 1):
            found.append(output.logits[:, -1])
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], 1)
            given = {"input_ids": ids[:, step - 1 : step], "attention_mask": attention_mask}
            output = tool_model(**given, **{CACHE: output[CACHE]}, use_cache=True)
    assert_close(torch.stack(found, 1), expected, atol=1e-3)


def test_logits_to_keep(tool_model, asked_alone):
    with torch.no_grad():
        every = tool_model(**asked_alone).logits
        assert every.shape[:2] == asked_alone["input_ids"].shape
        assert_close(tool_model(**asked_alone, logits_to_keep=1).logits, every[:, -1:])
        few = tool_model(**asked_alone, logits_to_keep=5).logits
        assert_close(few, every[:, -5:])
        places = torch.tensor([every.shape[1] - 3, every.shape[1] - 1])
        assert_close(tool_model(**asked_alone, logits_to_keep=places).logits, every[:, places])


def test_answers(kind, tool_model, asked, asked_alone, decode):
    ids = tool_model.generate(**asked, max_new_tokens=NEW)
    assert decode(ids, asked["input_ids"].shape[1]) == ["moon", "seven"]
    ids = tool_model.generate(**asked_alone, max_new_tokens=NEW)
    assert decode(ids, asked_alone["input_ids"].shape[1]) == ["moon"]


# Chats


@pytest.fixture
def chat(tool_processor, cards):
    """Makes the text of a chat about the cards; answers are given, the last question is open."""

    def make(*turns):
        messages = []
        for number, (question, answer) in enumerate(turns):
            content = [{"type": "image"}] * (number == 0) + [{"type": "text", "text": question}]
            messages.append({"role": "user", "content": content})
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = tool_processor.apply_chat_template(messages, add_generation_prompt=turns[-1][1] is None)
        return dict(tool_processor(text=text, images=cards, return_tensors="pt"))

    return make


FIRST, SECOND = "what shape is on the red card?", "how many cards are there?"


def about_first(inputs, first):
    """The inputs of a later turn, selected by the question of the first one."""
    if "question_mask" not in inputs:
        return inputs
    mask = torch.zeros_like(inputs["question_mask"])
    mask[:, : first["question_mask"].shape[1]] = first["question_mask"]
    return inputs | {"question_mask": mask}


@pytest.fixture
def two_turns(tool_model, chat):
    """A first turn answered on a cache, and the inputs of the second: its text alone, and the pixels of the first.

    Whoever asks on the same cache asks about what was looked at in the first turn: without a cache, the same is said
    by a question mask on the first question.
    """
    first = chat((FIRST, None))
    cache = DynamicCache(config=tool_model.config.text_config)
    ids = tool_model.generate(**first, **{CACHE: cache}, max_new_tokens=NEW)
    second = chat((FIRST, "moon"), (SECOND, None))
    length = ids.shape[1]
    assert torch.equal(second["input_ids"][:, : length - 1], ids[:, : length - 1]), "the second turn extends the first"
    text = {name: second[name] for name in ("input_ids", "attention_mask")}
    return cache, text, second, about_first(second, first)


def assert_same_answers(model, given, cache, expected):
    """The same ids on a cache as without one, and the same logits: ids alone may agree by chance."""
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": NEW}
    found = model.generate(**given, **{CACHE: cache}, **options)
    expected = model.generate(**expected, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-3)
    return found.sequences


def test_a_second_turn_on_one_cache(tool_model, two_turns):
    cache, text, _, expected = two_turns
    assert_same_answers(tool_model, text, cache, expected)


def test_a_second_turn_by_hand(tool_model, two_turns, tail_logits):
    """The new tokens and the cache, through forward."""
    cache, text, _, expected = two_turns
    ids, mask = text["input_ids"], text["attention_mask"]
    fresh = ids.shape[1] - seen_positions(tool_model, two_turns)
    with torch.no_grad():
        found = tool_model(input_ids=ids[:, -fresh:], attention_mask=mask, **{CACHE: cache}).logits[:, -1]
    assert_close(found, tail_logits(tool_model, expected), atol=1e-3)


def seen_positions(model, two_turns):
    """Positions of the prompt that the cache stands for: all of the first turn but its last token."""
    header = (two_turns[1]["input_ids"][0] == model.config.text_config.eos_token_id).nonzero()[1, 0]
    return int(header)


def test_pixels_in_a_second_turn_are_not_selected_from_again(kind, tool_model, two_turns):
    """Stock has no use for them; ours may use them as they are or refuse, but must not select on a foreign prefix."""
    cache, _, second, expected = two_turns
    try:
        assert_same_answers(tool_model, second, cache, expected)
    except ValueError as error:
        assert kind in ("stock", "dense") or "past_key_values" in str(error)


def test_three_turns_on_one_cache(tool_model, tool_processor, chat):
    """A loop as in a notebook: the whole text each time, the same cache, the pixels once."""
    cache, turns, answers = DynamicCache(config=tool_model.config.text_config), [], []
    for number, question in enumerate((FIRST, SECOND, FIRST)):
        inputs = chat(*turns, (question, None))
        if number == 0:
            first = inputs
        given = inputs if number == 0 else {name: inputs[name] for name in ("input_ids", "attention_mask")}
        ids = assert_same_answers(tool_model, given, cache, about_first(inputs, first))
        answer = tool_processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        turns.append((question, answer))
        answers.append(answer)
    assert answers[0] == "moon"


# Beams and several returned sequences


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_an_image_is_encoded_once_however_many_sequences(options, kind, tool_model, asked_alone, tiles_encoded):
    with tiles_encoded(tool_model) as once:
        tool_model.generate(**asked_alone, max_new_tokens=1)
    with tiles_encoded(tool_model) as several:
        tool_model.generate(**asked_alone, max_new_tokens=NEW, **options)
    assert sum(several) == sum(once)
    assert sum(once) == 17 if kind in ("stock", "dense", "after_encoder") else sum(once) < 17
