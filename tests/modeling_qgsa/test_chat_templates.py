"""The turns of a chat, and the question among them, under several chat templates."""

import pytest
import torch
from chats import CHATML_OF_STRINGS, TEMPLATES, turn, with_template
from handmade import END, NEWLINE, PAD, prompts

from modeling_qgsa.conversion_qgsa import marker_ids
from modeling_qgsa.prompt_qgsa import ChatFormat, Turns, find_question, read_chat_format


HEADER = [5, 6]  # opens an answer
BOS = 1
CHAT = ChatFormat(END, HEADER, "", [NEWLINE, *HEADER], [])


def find(ids, labelled=(), readable=None):
    """The question of one prompt of ids, of which the positions `labelled` have a label."""
    ids = prompts(ids)
    turns = Turns.of(CHAT, ids, ids != PAD if readable is None else readable, BOS)
    unlabelled = torch.ones_like(ids, dtype=torch.bool)
    unlabelled[0, list(labelled)] = False
    return ids[find_question(turns, unlabelled)].tolist()


@pytest.mark.parametrize(
    "ids, question",
    [
        ([BOS, 20, 21, END, *HEADER], [BOS, 20, 21]),
        ([BOS, 20, 21, END, *HEADER, 30], [BOS, 20, 21]),
        ([BOS, 20, 21, END, *HEADER, 30, END], [BOS, 20, 21]),
        ([BOS, 20, END, *HEADER, 30, END, 40, 41, END, *HEADER], [40, 41]),
        ([BOS, 20, END, NEWLINE, *HEADER, 30, END, NEWLINE, 40, END, NEWLINE, *HEADER, 31, END], [NEWLINE, 40]),
        ([BOS, 20, END, NEWLINE, 40, *HEADER, END, NEWLINE, *HEADER], [NEWLINE, 40, *HEADER]),
        ([BOS, 20, END, *HEADER, 30, END, 40, 41, END, *HEADER, 30, 31, END, 9], [40, 41]),
        ([BOS, 20, END, *HEADER, 30, END, 40, 41], [BOS, 20]),  # the last turn is open
        ([BOS, 20, END, 40, 41, END], [40, 41]),  # a system's and a user's turn
        ([BOS, 20, 5, 6, 21, END], [BOS, 20, 5, 6, 21]),  # the header counts only at the start of a turn
        ([BOS, 20, END, 5, 40, END], [5, 40]),
        ([BOS, 60, 61], [BOS, 60, 61]),  # no turns
        ([PAD, PAD, BOS, 50, END, *HEADER], [BOS, 50]),
        ([BOS, 50, END], [BOS, 50]),
        ([END, *HEADER, 30, END], []),
    ],
)
def test_the_question_is_the_last_closed_turn_that_is_not_the_assistants(ids, question):
    assert find(ids) == question


@pytest.mark.parametrize(
    "ids, labelled, question",
    [
        ([BOS, 20, 21, END, *HEADER, 30, END], [6, 7], [BOS, 20, 21]),
        ([BOS, 20, 21, END, *HEADER, 30, END], [3, 4, 5, 6, 7], [BOS, 20, 21]),
        ([BOS, 20, 21, END, *HEADER, 30, END], range(8), [BOS, 20, 21]),  # the whole prompt
        ([BOS, 20, 21, END, *HEADER, 30], range(7), [BOS, 20, 21]),
        ([BOS, 20, 21, END, *HEADER, 30, END], [1, 2, 4, 5, 6], [BOS, 20, 21]),  # all but special tokens
        ([BOS, 20, END, *HEADER, 30, END, 40, END, *HEADER, 31, END], range(13), [40]),
        ([BOS, 20, END, *HEADER, 30, END, 40, END, *HEADER, 31, END], [5, 6, 11, 12], [40]),
        ([BOS, 20, END, *HEADER, 30, END, 40, END, *HEADER, 31, END], range(3, 13), [BOS, 20]),  # a long completion
        ([BOS, 20, 21, END, *HEADER, 30, END], [2, 3, 6, 7], [BOS, 20, 21]),  # all but what opens turns
        ([BOS, 20, 21, 22, END], [2], [BOS, 20, 22]),  # nobody answers
        ([BOS, 20, 21, 30, END], [3, 4], [BOS, 20, 21]),  # no template: labels hide the answer
        ([BOS, 20, 21, 30, 31], [3, 4], [BOS, 20, 21]),
        ([BOS, 20, 21, 30, END], range(5), []),  # neither template nor labels tell the answer from the question
        ([BOS, 20, 21, 30, 31], range(5), []),
    ],
)
def test_labels_hide_answers_unless_they_cover_everything(ids, labelled, question):
    assert find(ids, labelled) == question


def test_nothing_hidden_is_read():
    readable = torch.tensor([[True, False, True, True, True, True, False, False, False]])
    assert find([BOS, 20, 21, 22, END, 9, 30, 31, END], readable=readable) == [BOS, 21, 22]


def test_batch_equals_single():
    rows = [[BOS, 20, 21, END, *HEADER, 30, END], [BOS, 50, END, *HEADER], [BOS, 60, 61]]
    ids = prompts(*rows)
    question = find_question(Turns.of(CHAT, ids, ids != PAD), torch.ones_like(ids).bool())
    assert [each[mask].tolist() for each, mask in zip(ids, question)] == [find(row) for row in rows]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_format_is_read_from_the_template(name, processor):
    template, end, header, user = TEMPLATES[name]
    other = with_template(processor, template)
    tokenizer = other.tokenizer
    newline, *ids = tokenizer(header, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([newline]) == "\n"
    closing = other.apply_chat_template([turn("user", "Q")], add_generation_prompt=True).rpartition(end)[2]
    following = tokenizer(closing, add_special_tokens=False)["input_ids"]
    opening = other.apply_chat_template([turn("user", "Q")]).partition("Q")[0].rstrip()
    opening = tokenizer(opening.removeprefix(tokenizer.bos_token), add_special_tokens=False)["input_ids"]
    expected = ChatFormat(tokenizer.convert_tokens_to_ids(end), ids, user, following, opening)
    assert read_chat_format(other) == expected
    tokenizer.chat_template = template
    assert read_chat_format(tokenizer) == expected
    named = marker_ids(other)
    assert (named["end_of_utterance_token_id"], named["assistant_token_ids"]) == expected[:2]


def test_a_template_for_texts_is_read_as_well(processor):
    other = with_template(processor, CHATML_OF_STRINGS)
    assert read_chat_format(other) == read_chat_format(with_template(processor, TEMPLATES["chatml"][0]))


@pytest.mark.parametrize(
    "template",
    [None, "{{ raise_exception('no') }}", "{{ messages[0]['role'] }}", "USER: {{ messages[0]['content'] }}"],
)
def test_without_a_readable_template_it_is_smolvlms(template, processor):
    expected = read_chat_format(with_template(processor, TEMPLATES["smolvlm"][0]))
    assert read_chat_format(with_template(processor, template)) == expected


# Every chat under every template: the turns, and the question that the selector should read.
CHATS = {
    "one turn": ([turn("user", "what is red?", 1)], "what is red?"),
    "an answer": ([turn("user", "what is red?", 1), turn("assistant", "moon")], "what is red?"),
    "a second question": (
        [turn("user", "what is red?", 1), turn("assistant", "moon"), turn("user", "where is it?")],
        "where is it?",
    ),
    "two answers": (
        [
            turn("system", "be brief"),
            turn("user", "what is red?", 1),
            turn("assistant", "moon"),
            turn("user", "where is it?"),
            turn("assistant", "in row 1"),
        ],
        "where is it?",
    ),
    "an answer of two lines": ([turn("user", "what is red?", 1), turn("assistant", "\nmoon\nsun")], "what is red?"),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("answer", ["closed", "open", "asked for"])
def test_processors_mark_the_question_under_every_template(name, chat, answer, processor, make_image):
    messages, question = CHATS[chat]
    other = with_template(processor, TEMPLATES[name][0])
    text = other.apply_chat_template(messages, add_generation_prompt=answer == "asked for")
    if answer == "open" and messages[-1]["role"] == "assistant":
        text = text.rstrip().removesuffix(TEMPLATES[name][1])
    inputs = other(text=text, images=make_image(0, 256, 64), return_tensors="pt")
    marked = inputs["input_ids"][0][inputs["question_mask"][0].bool()]
    words = other.tokenizer.decode(marked, skip_special_tokens=True).strip()
    assert words.removeprefix(TEMPLATES[name][3]).strip() == question


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("question", ["", "  "])
def test_an_empty_question_is_not_marked_under_any_template(name, question, processor, make_image):
    other = with_template(processor, TEMPLATES[name][0])
    for messages in ([turn("user", question, 1)], [turn("user", question, 1), turn("assistant", "moon")]):
        text = other.apply_chat_template(messages, add_generation_prompt=True)
        assert not other(text=text, images=make_image(0, 256, 64), return_tensors="pt")["question_mask"].any()
