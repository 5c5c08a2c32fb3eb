"""Fixtures of all tests: tiny random models, a processor, and prompts over small generated images."""

import logging
import os
from contextlib import contextmanager


os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.standins.tiny import build_processor


DENSE = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}


class DeprecationGuard(logging.Handler):
    """Fails any test in which transformers logs a deprecation."""

    def emit(self, record):
        if "deprecat" in record.getMessage().lower():
            raise AssertionError(f"transformers: {record.getMessage()}")


def pytest_configure(config):
    for category in ("FutureWarning", "DeprecationWarning"):
        for module in ("transformers", "modeling_qgsa"):
            config.addinivalue_line("filterwarnings", f"error::{category}:{module}")
    logging.getLogger("transformers").addHandler(DeprecationGuard())
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a test before may have tuned a model


@pytest.fixture(scope="session")
def stock_processor():
    return build_processor()


@pytest.fixture(scope="session")
def processor(stock_processor):
    parts = {"image_seq_len": 16, "chat_template": stock_processor.chat_template}
    return QGSAProcessor(stock_processor.image_processor, stock_processor.tokenizer, **parts)


@pytest.fixture(scope="session")
def tokenizer(processor):
    return processor.tokenizer


@pytest.fixture(scope="session")
def make_dense(processor, tokenizer):
    """Makes the stock model of a kind: 16 visual tokens per tile. Large weights, so that every token matters."""

    def make(kind="smolvlm", attention="sdpa"):
        config_class, model_class = DENSE[kind]
        config = config_class(
            image_token_id=processor.image_token_id,
            scale_factor=2,
            tie_word_embeddings=False,
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 8,
                "initializer_range": 0.2,
            },
            text_config={
                "model_type": "llama",
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
                "initializer_range": 0.2,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": None,
                "pad_token_id": tokenizer.pad_token_id,
            },
        )
        torch.manual_seed(1)
        model = model_class._from_config(config, attn_implementation=attention).eval()
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    return make


@pytest.fixture(scope="session")
def make_model(make_dense, tokenizer):
    """Makes a QGSA model in eval mode whose selector makes clear choices, as if it had been trained."""

    def make(dense=None, **fields):
        dense = make_dense() if dense is None else dense
        fields = {"selector_hidden_size": 32, "min_visual_tokens": 8, "max_visual_tokens": 48} | fields
        fields = {"pointer": "selector"} | fields
        torch.manual_seed(2)
        model = QGSASmolVLMForConditionalGeneration.from_dense(dense, tokenizer, **fields).eval()
        with torch.no_grad():
            model.model.selector.relevance.weight.mul_(3)
            model.model.selector.cell_position.normal_()
            model.model.selector.word_position.normal_()
            torch.manual_seed(4)
            for layer in model.model.complexity_estimator.network[::2]:
                layer.weight.normal_()
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model):
    """The default variant, shared: do not modify it."""
    return make_model()


@pytest.fixture(scope="session")
def make_image():
    """Makes an image of coloured blocks; 256 x 256 px make 4 x 4 tiles, 256 x 64 px one row of four."""

    def make(seed=0, width=256, height=256):
        blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)

    return make


@pytest.fixture(scope="session")
def prepare(processor):
    """Processes samples, each a (question, images), into one left-padded batch that asks for an answer."""

    def make(*samples, **kwargs):
        messages = [
            [{"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]}]
            for question, images in samples
        ]
        texts = [processor.apply_chat_template(message, add_generation_prompt=True) for message in messages]
        images = [images for _, images in samples]
        images = images if any(images) else None
        return dict(processor(text=texts, images=images, padding=True, return_tensors="pt", **kwargs))

    return make


@pytest.fixture(scope="session")
def samples(make_image):
    """Three samples with grids of 4 x 4, 1 x 4 and 4 x 2 tiles, and prompts of different lengths."""
    return [
        ("what shape is on the red card?", [make_image(0)]),
        ("where is the blue card?", [make_image(1, 256, 64)]),
        ("how many cards are there?", [make_image(2, 64, 128)]),
    ]


@pytest.fixture(scope="session")
def batch(prepare, samples):
    return prepare(*samples)


@pytest.fixture(scope="session")
def single(prepare, samples):
    return prepare(samples[0])


@pytest.fixture(scope="session")
def stock_inputs():
    """Removes from a batch the inputs that the stock model does not know."""
    return lambda inputs: {name: value for name, value in inputs.items() if name != "question_mask"}


@pytest.fixture(scope="session")
def tiles_encoded():
    """Context manager that lists how many tiles each call of the vision encoder got."""

    @contextmanager
    def count(model):
        counts = []
        hook = model.model.vision_model.register_forward_pre_hook(
            lambda module, args, kwargs: counts.append(len(kwargs["pixel_values"])), with_kwargs=True
        )
        try:
            yield counts
        finally:
            hook.remove()

    return count
