"""Real input: the published processor and config of SmolVLM-256M, without its weights, on an image of VQA-RAD."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from modeling_qgsa import QGSAConfig, QGSAProcessor, QGSASmolVLMForConditionalGeneration
from modeling_qgsa.conversion_qgsa import marker_ids
from modeling_qgsa.layout_qgsa import VisualLayout
from training.data.collator import QuestionCollator
from training.data.vqa_rad import load_vqa_rad


SHARED = Path(__file__).parents[2].parent / "shared"
CHECKPOINT = SHARED / "checkpoints" / "smolvlm-256m-instruct"
DATA = SHARED / "data" / "vqa_rad"

pytestmark = [
    pytest.mark.skipif(
        not CHECKPOINT.is_dir(), reason="SmolVLM's files are not at ../shared/checkpoints/smolvlm-256m-instruct"
    ),
    pytest.mark.skipif(not DATA.is_dir(), reason="VQA-RAD is not at ../shared/data/vqa_rad"),
]


@pytest.fixture(scope="module")
def real_processor():
    return QGSAProcessor.from_pretrained(CHECKPOINT, backend="pil")


@pytest.fixture(scope="module")
def sample():
    return load_vqa_rad(DATA, "test")[0]


@pytest.fixture(scope="module")
def inputs(real_processor, sample):
    return QuestionCollator(real_processor, with_answer=False)([sample])


@pytest.fixture(scope="module")
def small(real_processor):
    """The published architecture with one layer each side; no tokenizer, as our ids are those published."""
    config = AutoConfig.from_pretrained(CHECKPOINT)
    config.text_config.num_hidden_layers = 1
    config.vision_config.num_hidden_layers = 1
    torch.manual_seed(0)
    dense = AutoModelForImageTextToText.from_config(config).float().eval()
    return QGSASmolVLMForConditionalGeneration.from_dense(dense).eval()


def test_the_defaults_of_the_config_are_the_published_ids(real_processor):
    config = QGSAConfig()
    for name, value in marker_ids(real_processor.tokenizer).items():
        assert getattr(config, name) == value, name


def test_the_layout_of_a_real_prompt(small, inputs):
    assert small.config.tokens_per_tile == 64
    layout = VisualLayout.of(small.config, inputs["input_ids"])
    rows, columns = layout.grids[0].tolist()
    assert 1 < rows * columns <= 16
    assert len(layout.tile_sample) == rows * columns + 1 == inputs["pixel_values"].shape[1]
    assert layout.is_global.tolist() == [False] * (rows * columns) + [True]
    assert inputs["pixel_values"].shape[-2:] == (512, 512)


def test_the_question_of_a_real_prompt_is_marked(inputs, real_processor, sample):
    marked = inputs["input_ids"][0][inputs["question_mask"][0].bool()]
    assert sample["question"] in real_processor.decode(marked)


def test_a_real_answer_is_labelled(real_processor, sample):
    batch = QuestionCollator(real_processor)([sample])
    labelled = batch["input_ids"][0][batch["labels"][0] != -100]
    assert real_processor.decode(labelled) == f" {sample['answer']}<end_of_utterance>"
    assert not (batch["question_mask"][0].bool() & (batch["labels"][0] != -100)).any()


def test_one_glance_and_m_tiles_are_encoded(small, inputs, real_processor, tiles_encoded):
    budget = {"min_tiles": 2, "max_tiles": 2, "min_visual_tokens": 80, "max_visual_tokens": 80}
    with tiles_encoded(small) as counts:
        output = small.generate(
            **inputs, **budget, do_sample=False, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True
        )
    assert counts == [1, 2]
    length = inputs["input_ids"].shape[1]
    assert output.sequences.shape == (1, length + 3)
    assert torch.equal(output.sequences[:, :length], inputs["input_ids"])
    assert output.selection.visual_tokens.tolist() == [80]
    assert output.selection.tiles.tolist() == [2]
    assert isinstance(real_processor.decode(output.sequences[0, length:]), str)


def test_the_selection_is_drawn_on_the_real_image(small, inputs, real_processor, sample):
    drawn = real_processor.draw_selection(sample["image"], small.select(**inputs, min_tiles=1, max_tiles=1))
    assert drawn.size == sample["image"].size
