"""The collator: only answers are labelled, and the question mask excludes the answer."""

import pytest
import torch
from chats import TEMPLATES, with_template

from training.data.cards import Cards
from training.data.collator import QuestionCollator, answer_labels, conversation


END = "<end_of_utterance>"


@pytest.fixture(scope="module")
def turns(make_image):
    """Three samples with one, two and one turns, on images of 4 x 4, 1 x 4 and 4 x 2 tiles."""
    return [
        {"image": make_image(0), "question": "what shape is on the red card?", "answer": "star"},
        {
            "image": make_image(1, 256, 64),
            "turns": [
                {"question": "where is the blue card?", "answer": "row 2 column 3"},
                {"question": "does the pink card show a moon?", "answer": "no"},
            ],
        },
        {"image": make_image(2, 64, 128), "question": "how many cards are there?", "answer": "four"},
    ]


@pytest.fixture(scope="module")
def training(processor, turns):
    return QuestionCollator(processor)(turns)


@pytest.fixture(scope="module")
def asking(processor, turns):
    return QuestionCollator(processor, with_answer=False)(turns)


def runs(mask):
    """Slices of the consecutive True values in a mask `(length,)`."""
    edges = torch.diff(mask.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero()[:, 0].tolist()
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2])]


def test_labels_are_the_answers_with_their_end_tokens(training, tokenizer):
    answers = [["star"], ["row 2 column 3", "no"], ["four"]]
    for ids, labels, expected in zip(training["input_ids"], training["labels"], answers):
        labelled = labels != -100
        assert torch.equal(labels[labelled], ids[labelled])
        assert [tokenizer.decode(ids[run]) for run in runs(labelled)] == [f" {answer}{END}" for answer in expected]


def test_the_header_of_a_turn_comes_before_an_answer(training, tokenizer):
    for ids, labels in zip(training["input_ids"], training["labels"]):
        for run in runs(labels != -100):
            assert tokenizer.decode(ids[: run.start]).endswith(f"{END}\nAssistant:")


def test_training_batches_are_padded_on_the_right_without_labels(training, processor, turns):
    lengths = training["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == 3
    for row, length in enumerate(lengths.tolist()):
        assert training["attention_mask"][row, :length].all()
        assert (training["labels"][row, length:] == -100).all()
        alone = QuestionCollator(processor)([turns[row]])
        assert torch.equal(alone["labels"][0], training["labels"][row, :length])


def test_generation_batches_are_padded_on_the_left_and_end_where_the_answer_begins(asking, tokenizer):
    assert "labels" not in asking
    for ids, mask, last in zip(asking["input_ids"], asking["attention_mask"], ("star", "no", "four")):
        length = int(mask.sum())
        assert mask[-length:].all()
        text = tokenizer.decode(ids[-length:])
        assert text.endswith(f"{END}\nAssistant:")
        assert last not in text.split(END)[-1]
    assert "row 2 column 3" in tokenizer.decode(asking["input_ids"][1])


def test_the_question_is_marked_and_the_answer_is_not(training, tokenizer):
    questions = ["what shape is on the red card?", "does the pink card show a moon?", "how many cards are there?"]
    for row, question in enumerate(questions):
        mask = training["question_mask"][row].bool()
        assert question in tokenizer.decode(training["input_ids"][row][mask])
        assert not (mask & (training["labels"][row] != -100)).any()
        assert not (mask & (training["attention_mask"][row] == 0)).any()


def test_the_marked_question_is_the_same_with_and_without_its_answer(training, asking):
    for row in range(3):
        marked = [batch["input_ids"][row][batch["question_mask"][row].bool()] for batch in (training, asking)]
        assert torch.equal(*marked)


def test_cards_of_all_families(processor, tokenizer):
    samples = [Cards("train", 16)[index] for index in range(16)]
    inputs = QuestionCollator(processor)(samples)
    for row, sample in enumerate(samples):
        mask = inputs["question_mask"][row].bool()
        assert sample["question"] in tokenizer.decode(inputs["input_ids"][row][mask])
        labelled = inputs["labels"][row] != -100
        assert not (mask & labelled).any()
        assert tokenizer.decode(inputs["input_ids"][row][labelled]) == f" {sample['answer']}{END}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_labelled_under_every_chat_template(name, processor, turns):
    template, end, header, _ = TEMPLATES[name]
    other = with_template(processor, template)
    training = QuestionCollator(other)(turns)
    answers = [["star"], ["row 2 column 3", "no"], ["four"]]
    for ids, labels, mask, expected in zip(*map(training.get, ("input_ids", "labels", "question_mask")), answers):
        spans = runs(labels != -100)
        assert [other.decode(ids[run]).strip() for run in spans] == [f"{answer}{end}" for answer in expected]
        for run in spans:
            assert other.decode(ids[: run.start]).rstrip().endswith(f"{end}{header}")
        assert not (mask.bool() & (labels != -100)).any()


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_begin_where_generation_does(name, processor, turns):
    """White space of the template is not labelled, that of the answer is: tokens of numbers are separate from it."""
    other = with_template(processor, TEMPLATES[name][0])
    samples = [{**turns[0], "answer": answer} for answer in ("star", "7", "", "\nstar", "  two", "star: 7")]
    trained, asked = (QuestionCollator(other, with_answer=each)(samples[:1]) for each in (True, False))
    length = asked["input_ids"].shape[1]
    assert torch.equal(trained["input_ids"][:, :length], asked["input_ids"])
    labels = QuestionCollator(other)(samples)["labels"]
    assert (labels[:, :length] == -100).all() and (labels[:, length] != -100).all()


def test_answers_that_are_not_found_are_refused(processor, turns):
    """Turns that no special token closes are read as SmolVLM's, which are not there."""
    template = TEMPLATES["smolvlm"][0].replace("<end_of_utterance>", "")
    collate = QuestionCollator(with_template(processor, template))
    with pytest.raises(ValueError, match="sample 0: 0 of .* positions are labelled.*Assistant:"):
        collate(turns)


def test_the_image_processor_gets_its_options(stock_processor, turns):
    collate = QuestionCollator(stock_processor, image_kwargs={"do_image_splitting": False})
    assert collate(turns)["pixel_values"].shape[1] == 1
    assert "question_mask" not in collate(turns)


def test_a_conversation_has_the_image_once_and_the_last_answer_on_demand(turns):
    messages = conversation(turns[1], with_answer=False)
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    images = [part for message in messages for part in message["content"] if part["type"] == "image"]
    assert images == [{"type": "image"}]
    assert messages[0]["content"][0] == {"type": "image"}
    assert [message["role"] for message in conversation(turns[1], with_answer=True)][-1] == "assistant"


def test_labels_of_hand_made_ids():
    header, end = [7, 8], 9
    ids = torch.tensor([[1, 2, 9, 7, 8, 3, 4, 9, 5, 9, 7, 8, 9, 0], [7, 8, 3, 9, 7, 8, 4, 4, 0, 0, 0, 0, 0, 0]])
    expected = torch.full_like(ids, -100)
    expected[0, 5:8] = ids[0, 5:8]
    expected[0, 12] = 9  # an empty answer ends at once
    expected[1, 2:4] = ids[1, 2:4]  # the next turn is not closed
    assert torch.equal(answer_labels(ids, header, end), expected)
