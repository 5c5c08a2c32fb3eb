"""Stock SmolVLM and every variant of ours with the same weights, those of the shipped checkpoint."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import Idefics3Processor, SmolVLMConfig, SmolVLMForConditionalGeneration

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.data.collator import QuestionCollator


HUB = Path(__file__).parents[2] / "hub_cards"
OWN_WEIGHTS = ("model.selector.", "model.complexity_estimator.")
VARIANTS = ("dense", "before_encoder", "blocks", "after_encoder", "scheduled")
SCHEDULE = ["full", "full", "cross", "cross", "cross", "text"]  # of "scheduled", which selects before the encoder
QUESTIONS = {"what shape is on the red card?": "moon", "how many cards are there?": "seven"}


@pytest.fixture(scope="session")
def shipped():
    """The shipped model: do not modify it."""
    return QGSASmolVLMForConditionalGeneration.from_pretrained(HUB / "tiny-qgsa").eval()


@pytest.fixture(scope="session")
def stock(shipped):
    """SmolVLM itself with the weights of the shipped model: do not modify it."""
    config = shipped.config.to_dict()
    names = ("image_token_id", "scale_factor", "tie_word_embeddings", "text_config", "vision_config")
    model = SmolVLMForConditionalGeneration(SmolVLMConfig(**{name: config[name] for name in names})).eval()
    weights = shipped.state_dict()
    model.load_state_dict({name: weights[name] for name in weights if not name.startswith(OWN_WEIGHTS)})
    model.generation_config = copy.deepcopy(shipped.generation_config)
    return model


@pytest.fixture(scope="session")
def make_kind(shipped, stock):
    """Makes a copy of stock or of one of our variants, in eval mode."""

    def make(kind):
        model = copy.deepcopy(stock if kind == "stock" else shipped)
        if kind == "scheduled":
            model.config.vision_layers = SCHEDULE
        elif kind != "stock":
            model.config.selection = kind
        return model

    return make


@pytest.fixture(params=("stock", *VARIANTS))
def kind(request):
    return request.param


@pytest.fixture
def tool_model(kind, make_kind):
    """A model of its own for each test."""
    return make_kind(kind)


@pytest.fixture(scope="session")
def make_processor():
    """Makes the processor that goes with a kind of model."""

    def make(kind):
        processor_class = Idefics3Processor if kind == "stock" else QGSAProcessor
        return processor_class.from_pretrained(HUB / "tiny-qgsa", backend="pil")

    return make


@pytest.fixture
def tool_processor(kind, make_processor):
    return make_processor(kind)


@pytest.fixture(scope="session")
def cards():
    return Image.open(HUB / "space" / "examples" / "cards_18.png").convert("RGB")


@pytest.fixture(scope="session")
def questions(cards):
    """Two questions about the same image, with their answers."""
    return [{"image": cards, "question": question, "answer": answer} for question, answer in QUESTIONS.items()]


@pytest.fixture
def labelled(tool_processor, questions):
    """Both questions with their answers and labels, padded on the right."""
    return QuestionCollator(tool_processor)(questions)


@pytest.fixture
def asked(tool_processor, questions):
    """Both questions without their answers, padded on the left."""
    return QuestionCollator(tool_processor, with_answer=False)(questions)


@pytest.fixture
def asked_alone(tool_processor, questions):
    """The first question without its answer."""
    return QuestionCollator(tool_processor, with_answer=False)(questions[:1])


@pytest.fixture(scope="session")
def conversations(questions):
    """Makes a data set of the questions: for each its image and the columns `columns(question, answer)`."""

    def make(columns):
        rows = [{"image": each["image"]} | columns(each["question"], each["answer"]) for each in questions]
        return Dataset.from_list(rows)

    return make


@pytest.fixture(scope="session")
def decode(make_processor):
    """Answers in words: the ids after a prompt of `length` positions."""
    processor = make_processor("stock")
    return lambda ids, length: [
        text.strip() for text in processor.batch_decode(ids[:, length:], skip_special_tokens=True)
    ]


@pytest.fixture(autouse=True)
def no_files_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tail_logits():
    """Logits of the last position, without a cache: what every way to decode must agree with."""

    @torch.no_grad()
    def compute(model, inputs):
        return model(**inputs, use_cache=False).logits[:, -1]

    return compute
