"""Lessons: several questions about one picture in one sequence, none of which sees another."""

import numpy as np
import pytest
import torch

from training.data.cards import FAMILIES, place
from training.data.collator import QuestionCollator
from training.standins.lessons import (
    ALL_DESCRIPTIONS,
    DESCRIPTIONS,
    SHARES,
    WITHOUT_FIGURES,
    LessonCollator,
    Lessons,
    Question,
    WordCollator,
    describe,
)


def lessons(grids, size=4, **kwargs):
    dataset = Lessons("train", size, 0, grids, batch_size=size, **kwargs)
    return [dataset[index] for index in range(size)]


def with_split(split, grids):
    """The first batch of lessons that is (or is not) shown in tiles."""
    dataset = Lessons("train", 400, 0, grids, batch_size=2)
    first = next(index for index in range(0, 400, 2) if dataset[index].split == split)
    return [dataset[first], dataset[first + 1]]


def answer(question):
    return "".join(text for text, _ in question.pieces).strip()


def test_shares_cover_the_families():
    assert set(SHARES) == set(FAMILIES)
    assert sum(SHARES.values()) == pytest.approx(1)


def test_a_batch_shares_its_canvas_and_differs_otherwise():
    dataset = Lessons("train", 60, 0, [(2, 2), (3, 4)], batch_size=6, drawn=False)
    canvases = set()
    for start in range(0, 60, 6):
        batch = [dataset[start + number] for number in range(6)]
        assert len({(lesson.rows, lesson.columns, lesson.split) for lesson in batch}) == 1
        assert len({lesson.cards for lesson in batch}) == 6
        canvases.add((batch[0].rows, batch[0].columns))
    assert canvases == {(2, 2), (3, 4)}
    assert dataset[7].image is None
    assert dataset[7] == dataset[7]


def test_a_thumbnail_is_asked_only_what_it_shows():
    thumbnail, tiles = (with_split(split, [(4, 4)]) for split in (False, True))
    shapes = [question for lesson in thumbnail for question in lesson.questions if "shape" in question.text]
    assert not shapes
    assert any("shape" in question.text for lesson in tiles for question in lesson.questions)
    assert all(len(lesson.questions) == 13 for lesson in (*thumbnail, *tiles))


def test_descriptions_learn_only_what_follows():
    rng, asked = np.random.default_rng(0), set()
    for lesson in lessons([(4, 4)], size=40, drawn=False):
        for _ in range(4):
            question = describe(rng, lesson.cards, split=True)
            asked.add(question.text)
            facts = dict(DESCRIPTIONS)[question.text]
            expected = {facts(card) for card in lesson.cards}
            pairs = [tuple(fact.split(" ", 1)) for fact in answer(question).split(", ")]
            assert len(pairs) == len(lesson.cards) and set(pairs) == expected
            firsts = [first for first, _ in pairs]
            assert [learnt for _, learnt in question.pieces[::2]] == [False] * len(pairs)
            assert [learnt for _, learnt in question.pieces[1::2]] == [firsts.count(first) == 1 for first in firsts]
    assert asked == {text for text, _ in DESCRIPTIONS}


@pytest.mark.parametrize("split", [False, True])
def test_descriptions_by_place_follow_from_it(split):
    rng, cards = np.random.default_rng(0), lessons([(4, 4)], size=1, drawn=False)[0].cards
    asked = {}
    for _ in range(100):
        question = describe(rng, cards, split, ALL_DESCRIPTIONS)
        asked[question.text] = question
    assert set(asked) == {text for text, _ in ALL_DESCRIPTIONS if split or text in WITHOUT_FIGURES}
    pairs = answer(asked["which colours are where?"]).split(", ")
    assert sorted(pairs) == sorted(f"{place(card)} {card.colour}" for card in cards)
    assert [learnt for _, learnt in asked["which colours are where?"].pieces] == [False, True] * len(cards)


def test_a_lesson_has_as_many_questions_and_descriptions_as_wanted():
    (lesson,) = lessons([(4, 4)], size=1, drawn=False, questions=3, descriptions=5, kinds=ALL_DESCRIPTIONS)
    described = [question.text in dict(ALL_DESCRIPTIONS) for question in lesson.questions]
    assert described == [False] * 3 + [True] * 5


def test_pieces_are_tokens_of_the_whole(processor):
    collate = LessonCollator(processor)
    for lesson in lessons([(4, 4)], size=10, drawn=False):
        for question in lesson.questions:
            apart = [token for text, _ in question.pieces for token in collate._encode(text)]
            assert apart == collate._encode(" " + answer(question))


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_a_lesson_equals_its_questions_asked_one_by_one(kind, make_dense, processor):
    model, collate = make_dense(kind).eval(), LessonCollator(processor)
    batch = with_split(True, [(2, 2)])
    inputs = collate(batch)
    with torch.no_grad():
        packed = model(**inputs).logits
    single = QuestionCollator(processor, image_kwargs={"size": {"longest_edge": 128}})
    for row, lesson in enumerate(batch):
        prefix = len(collate.show(batch)[0][row])
        at = prefix
        for question in lesson.questions:
            alone = single([{"image": lesson.image, "question": question.text, "answer": answer(question)}])
            labels = alone.pop("labels")
            with torch.no_grad():
                expected = model(**alone).logits
            length = int((alone["input_ids"][0] == collate.end_id).nonzero()[-1]) + 1 - prefix
            here, there = slice(at, at + length), slice(prefix, prefix + length)
            assert torch.equal(inputs["input_ids"][row, here], alone["input_ids"][0, there])
            torch.testing.assert_close(packed[row, here], expected[0, there], atol=2e-4, rtol=0)
            if all(learnt for _, learnt in question.pieces):
                assert torch.equal(inputs["labels"][row, here], labels[0, there])
            at += length
        assert (inputs["labels"][row, at:] == -100).all()


def test_thumbnails_are_one_tile(processor):
    inputs = LessonCollator(processor)(with_split(False, [(4, 4)]))
    assert inputs["pixel_values"].shape == (2, 1, 3, 64, 64)
    inputs = LessonCollator(processor)(with_split(True, [(2, 3)]))
    assert inputs["pixel_values"].shape == (2, 7, 3, 64, 64)


def test_words_are_written_as_the_processor_writes_pictures(processor):
    """Except for one visual token per tile instead of sixteen."""
    for split in (True, False):
        lesson = with_split(split, [(2, 3)])[0]
        drawn, words = LessonCollator(processor)([lesson]), WordCollator(processor)([lesson])
        decode = processor.tokenizer.decode
        text = decode(drawn["input_ids"][0])
        head, tail = text.split("<global-img>")
        assert head.replace("<image>" * 16, "<image>") + "<global-img>" + tail == decode(words["input_ids"][0])
        assert (words["input_ids"] == processor.image_token_id).sum() == len(words["words"])
        shown = [decode([word]).strip() for word in words["words"].flatten().tolist() if word >= 0]
        named = [word for card in lesson.cards for word in (card.colour, card.figure)] if split else []
        colours = [card.colour for card in lesson.cards]
        assert set(shown) == set(named) | set(colours)


def test_hidden_questions_cannot_matter(make_dense, processor):
    model, collate = make_dense("idefics3").eval(), LessonCollator(processor)
    asked = Question("is there a red card?", ((" yes", True),))
    other = Question("how many cards are there?", ((" two", True),))
    size = len(collate.pack([[5, 6, 7]], [(asked,)])["input_ids"][0]) - 3
    first, second = (collate.pack([[5, 6, 7]], [(one, asked)]) for one in (other, asked))
    with torch.no_grad():
        one, two = model(**first).logits, model(**second).logits
    torch.testing.assert_close(one[:, -size:], two[:, -size:], atol=1e-5, rtol=0)
    assert torch.equal(second["position_ids"][0, 3 : 3 + size], second["position_ids"][0, 3 + size :])
