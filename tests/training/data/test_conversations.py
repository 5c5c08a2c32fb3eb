"""Conversations: several questions about each picture."""

import pytest

from training.data.cards import FAMILIES
from training.data.collator import QuestionCollator
from training.data.conversations import Conversations


def test_items_follow_from_their_index():
    first, second = (Conversations("train", 5, 1, 3) for _ in range(2))
    for index in range(5):
        assert first[index]["turns"] == second[index]["turns"] and len(first[index]["turns"]) == 3
        assert first[index]["image"].tobytes() == second[index]["image"].tobytes()
    assert Conversations("train", 5, 2, 3)[0]["turns"] != first[0]["turns"]
    assert Conversations("validation", 5, 1, 3)[0]["image"].tobytes() != first[0]["image"].tobytes()


def test_every_answer_is_learnt(processor):
    samples = [Conversations("train", 2, 1, 4, ["count", "odd", "share"])[index] for index in range(2)]
    inputs = QuestionCollator(processor)(samples)
    for row, sample in enumerate(samples):
        labels = inputs["labels"][row]
        text = processor.decode(labels[labels >= 0])
        assert all(turn["answer"] in text for turn in sample["turns"])


def test_bad_input():
    with pytest.raises(ValueError, match=r"turns \(0\) must be at least 1"):
        Conversations("train", 1, 0, 0)
    with pytest.raises(ValueError, match=r"families \(colour\): choose from"):
        Conversations("train", 1, 0, 1, [*FAMILIES, "colour"])
    with pytest.raises(IndexError):
        Conversations("train", 1, 0, 1)[1]
