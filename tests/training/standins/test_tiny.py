"""The tiny stand-in for SmolVLM: how it is built, and the trained checkpoint that is shipped."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Idefics3ForConditionalGeneration

from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from training.data.cards import Cards
from training.data.collator import QuestionCollator
from training.standins.tiny import SPECIAL_TOKENS, VOCABULARY, build_model, build_processor, build_tokenizer


SHIPPED = Path(__file__).parents[3] / "hub_cards" / "tiny-dense"

needs_checkpoint = pytest.mark.skipif(not SHIPPED.is_dir(), reason="hub_cards/tiny-dense is not there yet")


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED).eval()
    return model, AutoProcessor.from_pretrained(SHIPPED, backend="pil")


@pytest.fixture(scope="module")
def open_questions():
    cards = Cards("test", 1000)
    samples = (cards[index] for index in range(1000))
    return [sample for sample, _ in zip((s for s in samples if s["family"] == "open"), range(50))]


@pytest.fixture(scope="module")
def answers(shipped, open_questions):
    """New ids of each answer to the open questions, asked in one batch."""
    model, processor = shipped
    inputs = QuestionCollator(processor, with_answer=False)(open_questions)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return ids[:, inputs["input_ids"].shape[1] :]


# Built from nothing


def test_the_tokenizer_is_the_same_every_time_and_knows_the_markers(tokenizer):
    again = build_tokenizer()
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) <= VOCABULARY
    for token in SPECIAL_TOKENS:
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]


def test_the_words_of_cards_survive_the_tokenizer(tokenizer):
    for index in range(30):
        sample = Cards("test", 30)[index]
        for text in (sample["question"], sample["answer"]):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text
    assert len(tokenizer(" star", add_special_tokens=False)["input_ids"]) == 1


def test_the_prompt_is_that_of_smolvlm(processor):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "that"}]},
        {"role": "user", "content": [{"type": "text", "text": "why?"}]},
    ]
    end = "<end_of_utterance>\n"
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        f"<|im_start|>User:<image>what?{end}Assistant: that{end}User: why?{end}Assistant:"
    )


def test_the_model_is_small_and_takes_its_seed_from_torch():
    processor = build_processor()
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build_model(processor).state_dict())
    assert 1e6 < sum(weight.numel() for name, weight in models[0].items() if name != "lm_head.weight") < 2e6
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not all(torch.equal(models[0][name], models[2][name]) for name in models[0])


# As shipped


@needs_checkpoint
def test_the_checkpoint_is_small_and_loads_as_any_other(shipped):
    model, processor = shipped
    assert isinstance(model, Idefics3ForConditionalGeneration)
    assert processor.image_seq_len == 16
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 10e6
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in SHIPPED.iterdir()}
    assert not any(path.name.startswith("checkpoint-") for path in SHIPPED.iterdir())


@needs_checkpoint
def test_the_checkpoints_answers_end(shipped, answers):
    model, processor = shipped
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert model.generation_config.eos_token_id == end
    ends = answers == end
    assert ends.any(1).float().mean() >= 0.95
    first = ends.int().argmax(1)
    for row in ends.any(1).nonzero()[:, 0].tolist():
        assert (answers[row, first[row] + 1 :] == processor.tokenizer.pad_token_id).all()


@needs_checkpoint
def test_the_checkpoint_sees_the_figures(shipped, answers, open_questions):
    _, processor = shipped
    texts = processor.batch_decode(answers, skip_special_tokens=True)
    right = sum(text.strip() == sample["answer"] for text, sample in zip(texts, open_questions))
    assert len(open_questions) == 50
    assert right >= 40, f"{right} of 50 figures are named, chance is 6"


@needs_checkpoint
def test_dense_selection_answers_as_the_checkpoint_does(shipped, answers, open_questions):
    model, processor = shipped
    qgsa = QGSASmolVLMForConditionalGeneration.from_dense(model, processor.tokenizer)
    inputs = QuestionCollator(processor, with_answer=False)(open_questions[:8])
    ids = qgsa.generate(**inputs, selection="dense", do_sample=False, max_new_tokens=8)
    texts = [
        processor.batch_decode(new, skip_special_tokens=True)
        for new in (ids[:, inputs["input_ids"].shape[1] :], answers[:8])
    ]
    assert texts[0] == texts[1]
