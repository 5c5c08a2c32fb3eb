"""What torch counts is what the formula says, to 0.1 %."""

import pytest
import torch

from modeling_qgsa.selection_qgsa import Prompt
from modeling_qgsa.vision_qgsa import Views
from training.flops import count_flops, estimate_flops, paper_table, text_flops


BUDGET = {"min_visual_tokens": 20, "max_visual_tokens": 20}


@pytest.fixture
def inputs(prepare, make_image):
    return prepare(("what shape is on the red card?", [make_image()]))


def check(counted, expected):
    for part in ("vision", "prefill", "decode", "total"):
        assert counted[part] == pytest.approx(expected[part], rel=1e-3), part


def test_dense(model, inputs):
    length = inputs["input_ids"].shape[1]
    check(count_flops(model, inputs, 5, selection="dense"), estimate_flops(model.config, 17, length, 5))


@pytest.mark.parametrize("selection, tiles", [("before_encoder", 0), ("before_encoder", 3), ("after_encoder", 16)])
def test_selection(model, inputs, selection, tiles):
    options = {"selection": selection, "min_tiles": tiles, "max_tiles": tiles, **BUDGET}
    length = model.select(**inputs, **options).keep_indices.shape[1]
    question = int(inputs["question_mask"].sum())
    expected = estimate_flops(model.config, 1 + tiles, length, 5, question)
    check(count_flops(model, inputs, 5, **options), expected)


def test_blocks(model, inputs):
    options = {"selection": "blocks", "min_tiles": 2, "max_tiles": 2, **BUDGET}
    selection = model.select(**inputs, **options)
    with torch.no_grad():
        prompt = Prompt.of(inputs["input_ids"], inputs["attention_mask"])
        glance = model.model.glance_and_point(prompt, Views(inputs["pixel_values"]), inputs["question_mask"])
        counts = model.model.choose("blocks", glance, torch.tensor([2]), torch.tensor([20])).sum(1).tolist()
    whole, parts = counts.count(16), tuple(count for count in counts if 0 < count < 16)
    assert parts and whole + len(parts) == 1 + int(selection.tiles)
    length, question = selection.keep_indices.shape[1], int(inputs["question_mask"].sum())
    expected = estimate_flops(model.config, whole, length, 5, question, parts)
    check(count_flops(model, inputs, 5, **options), expected)


def test_one_token_costs_what_all_weights_of_the_text_model_do(model):
    text = model.config.text_config
    weights = sum(p.numel() for n, p in model.named_parameters() if ("text_model.layers" in n and "proj" in n))
    weights += text.vocab_size * text.hidden_size
    assert text_flops(model.config, 1) == pytest.approx(2 * weights, rel=0.01)


def test_the_papers_table():
    """QGSA, table of cross-modal attention: 17 of the patches are left."""
    rows = {row["pixels"]: row for row in paper_table()}
    assert [row["patches"] for row in rows.values()] == [196, 441, 576, 784, 1296]
    assert rows[224]["saved"] == pytest.approx(0.913, abs=5e-4) and rows[576]["saved"] == pytest.approx(
        0.987, abs=5e-4
    )
    assert round(rows[384]["times"]) == 34 and round(rows[576]["times"]) == 76
