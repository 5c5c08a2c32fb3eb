"""Attention of chosen rows, and masks that an attention implementation can read."""

from itertools import islice

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from modeling_qgsa import QGSAConfig
from modeling_qgsa.attention_qgsa import attention_of_rows, check_reads_4d_masks
from modeling_qgsa.prompt_qgsa import Prompt
from training.data.collator import QuestionCollator


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


# Which masks an implementation reads


MASKS = []  # those that the stand-in for flash attention got


def flash_stand_in(module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
    """Flash attention on a CPU: it reads padding masks, `(B, L)`, and nothing else."""
    MASKS.append(attention_mask)
    assert attention_mask is None or attention_mask.dim() == 2, "flash attention cannot unpad a 4D mask"
    assert all(query.shape), "flash attention refuses empty inputs"
    rows, columns = query.shape[2], key.shape[2]
    seen = torch.ones(rows, columns, dtype=torch.bool)
    if module.is_causal if is_causal is None else is_causal:
        seen = seen.tril(columns - rows)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :].bool() | torch.eye(rows, columns, dtype=torch.bool)
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register("reads_2d_masks", flash_stand_in)
AttentionMaskInterface.register("reads_2d_masks", flash_attention_mask)
AttentionInterface.register("reads_no_mask", flash_stand_in)


@pytest.fixture
def flash(make_model):
    model = make_model()
    model.set_attn_implementation("reads_2d_masks")
    MASKS.clear()
    return model


@pytest.fixture(scope="module")
def labelled(stock_processor, make_image):
    samples = [{"image": make_image(seed), "question": "what is on the card?", "answer": "star"} for seed in (3, 4)]
    return QuestionCollator(stock_processor)(samples)


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder", "dense"])
def test_flash_attention_answers_alike_from_padding_masks(selection, model, flash, batch):
    options = {"selection": selection, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**batch, **options)
    assert torch.equal(flash.generate(**batch, **options), expected)
    assert MASKS and all(mask is None or mask.dim() == 2 for mask in MASKS)
    assert any(mask is not None for mask in MASKS), "the batch is padded"


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder", "blocks"])
def test_flash_attention_cannot_train_the_gates(selection, flash, labelled, tiles_encoded):
    with tiles_encoded(flash) as encoded, pytest.raises(ValueError) as error:
        flash.train()(**labelled, selection=selection)
    assert str(error.value).startswith("attn_implementation ('reads_2d_masks' in text_config): training")
    assert '"sdpa" or "eager"' in str(error.value) and not encoded and not MASKS


def test_flash_attention_cannot_encode_several_tiles_in_blocks(flash, batch, single, tiles_encoded):
    for inputs, tiles in ((single, 2), (batch, 1)):
        for call in (flash, flash.generate, flash.select):
            with tiles_encoded(flash) as encoded, pytest.raises(ValueError, match="in vision_config.: .*blocks"):
                call(**inputs, selection="blocks", max_tiles=tiles)
            assert not encoded and not MASKS


def test_flash_attention_encodes_one_tile_in_blocks(model, flash, single):
    options = {"selection": "blocks", "min_tiles": 1, "max_tiles": 1, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(flash.generate(**single, **options), model.generate(**single, **options))


def test_the_remedy_is_one(flash, labelled, batch):
    flash.set_attn_implementation({"text_config": "sdpa"})
    flash.train()(**labelled).loss.backward()
    flash.set_attn_implementation({"vision_config": "sdpa"})
    flash.eval().generate(**batch, selection="blocks", max_new_tokens=2)


def test_flash_attention_trains_where_nothing_is_gated(flash, labelled):
    flash.train()(**labelled, selection="dense").loss.backward()
    assert MASKS and all(mask is None or mask.dim() == 2 for mask in MASKS)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention"])
def test_implementations_that_read_4d_masks_pass(name):
    check_reads_4d_masks(QGSAConfig(attn_implementation=name), "text_config", "this")


@pytest.mark.parametrize("name", ["flash_attention_2", "reads_2d_masks"])
def test_implementations_that_read_2d_masks_do_not(name):
    with pytest.raises(ValueError, match=rf"\('{name}' in text_config\): this needs a 4D attention mask"):
        check_reads_4d_masks(QGSAConfig(attn_implementation=name), "text_config", "this")


def test_an_implementation_without_masks_is_refused_alike(make_model, labelled):
    model = make_model().train()
    model.set_attn_implementation("reads_no_mask")
    with pytest.raises(ValueError, match="reads_no_mask"):
        model(**labelled)
