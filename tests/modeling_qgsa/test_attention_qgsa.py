"""Attention of chosen rows: equal to the whole eager maps, and no more work than asked for."""

from itertools import islice

import pytest
import torch

from modeling_qgsa.attention_qgsa import attention_of_rows
from modeling_qgsa.prompt_qgsa import Prompt


@pytest.fixture(params=["eager", "sdpa"])
def text_model(request, make_model, make_dense):
    return make_model(make_dense("smolvlm", request.param)).model.text_model


@pytest.fixture
def inputs(model, batch):
    """A left-padded batch as the text model gets it."""
    prompt = Prompt.of(batch["input_ids"], batch["attention_mask"])
    embeds = model.get_input_embeddings()(prompt.input_ids).detach()
    return embeds, prompt.attention_mask, prompt.position_ids


def test_rows_are_those_of_the_whole_map(text_model, inputs):
    embeds, mask, positions = inputs
    rows = torch.tensor([[4, -1], [30, 7], [60, 61]]) % embeds.shape[1] + (mask == 0).sum(1, keepdim=True)
    rows = rows.clamp(max=embeds.shape[1] - 1)
    found = list(attention_of_rows(text_model, embeds, mask, positions, rows))
    text_model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = text_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, output_attentions=True
        ).attentions
    assert len(found) == len(whole)
    for rows_of_layer, maps in zip(found, whole):
        expected = maps.gather(2, rows[:, None, :, None].expand(-1, maps.shape[1], -1, maps.shape[3]))
        assert torch.allclose(rows_of_layer, expected, atol=1e-5)
        assert torch.allclose(rows_of_layer.sum(-1), torch.ones(()), atol=1e-5)


def test_the_pass_stops_at_the_last_layer_that_is_read(text_model, inputs):
    ran = []
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(text_model.layers)
    ]
    rows = torch.full((3, 1), inputs[0].shape[1] - 1)
    assert len(list(islice(attention_of_rows(text_model, *inputs, rows), 1))) == 1 and ran == []
    assert len(list(attention_of_rows(text_model, *inputs, rows))) == 2 and ran == [0]
    for hook in hooks:
        hook.remove()


def test_no_whole_map_is_formed(text_model, inputs):
    """The largest tensor of one row's attention grows with the columns alone."""
    length = inputs[0].shape[1]
    rows = torch.full((3, 1), length - 1)
    for weights in attention_of_rows(text_model, *inputs, rows):
        assert weights.shape == (3, 4, 1, length) and weights.dtype == torch.float32
