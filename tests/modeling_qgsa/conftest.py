"""Fixtures of the tests of the model."""

import pytest

from training.data.collator import QuestionCollator


@pytest.fixture
def trainable(make_model):
    return make_model().train()


@pytest.fixture(scope="module")
def labelled(stock_processor, make_image):
    """Right-padded questions with their answers."""
    return QuestionCollator(stock_processor)(
        [
            {"image": make_image(3), "question": "what shape is on the red card?", "answer": "star"},
            {"image": make_image(4, 256, 64), "question": "where is it?", "answer": "row 1 column 3"},
        ]
    )
