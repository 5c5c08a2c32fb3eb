"""Systems, questions and rows that the tests of evaluation and its reports share."""

import pytest

from training.data.cards import Cards
from training.data.collator import QuestionCollator
from training.evaluation.rows import add_flops, evaluate_systems
from training.evaluation.systems import standard_systems


@pytest.fixture(scope="session")
def questions():
    return Cards("test", 8)


@pytest.fixture(scope="session")
def collate(processor):
    return QuestionCollator(processor, with_answer=False)


@pytest.fixture(scope="session")
def systems(model):
    return standard_systems(model, model)


@pytest.fixture(scope="session")
def rows(systems, questions, processor):
    rows = evaluate_systems(systems, questions, processor, batch_size=3, max_new_tokens=2)
    add_flops(rows, systems, questions, processor, max_new_tokens=2, questions=1)
    return rows
