"""Fixtures of the tests of the model."""

import copy

import pytest
import torch

from training.data.collator import QuestionCollator


@pytest.fixture(scope="session")
def make_deep(make_dense, make_model):
    """Makes a model of four layers that points with its attention; `change` may alter the dense one before."""

    def make(change=lambda dense: None, seed=3, **fields):
        dense = make_dense()
        config = copy.deepcopy(dense.config)
        config.text_config.num_hidden_layers = 4
        torch.manual_seed(seed)
        dense = type(dense)._from_config(config, attn_implementation="sdpa").eval()
        dense.generation_config.pad_token_id = config.text_config.pad_token_id
        change(dense)
        return make_model(dense, pointer="attention", keep_tile_markers=True, **fields)

    return make


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
