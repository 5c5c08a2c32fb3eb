"""Training with the model alone: activation checkpointing under PEFT and plain Trainer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import Trainer, TrainingArguments

from training.data.collator import QuestionCollator


OWN = ["selector", "complexity_estimator"]
REENTRANT = {"use_reentrant": True}

# PEFT, and these tests for the sake of older versions, use former names of transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_)?gradient_checkpointing(_enable|_kwargs)?. is deprecated:FutureWarning"
)


@pytest.fixture
def trainable(make_model):
    return make_model().train()


@pytest.fixture(scope="module")
def labelled(stock_processor, make_image):
    return QuestionCollator(stock_processor)(
        [
            {"image": make_image(3), "question": "what shape is on the red card?", "answer": "star"},
            {"image": make_image(4, 256, 64), "question": "where is it?", "answer": "row 1 column 3"},
        ]
    )


def own_weights(model):
    """Trained weights of selector and estimator, by name."""
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: weight for name, weight in named.items() if any(f"{own}." in name for own in OWN)}


def gradients(model, inputs, **options):
    torch.manual_seed(5)
    model.zero_grad()
    loss = model(**inputs, **options).loss
    loss.backward()
    return {name: None if weight.grad is None else weight.grad.clone() for name, weight in own_weights(model).items()}


# Activation checkpointing


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, REENTRANT])
def test_checkpointing_has_the_gradients_of_none(options, trainable, labelled):
    expected = gradients(trainable, labelled)
    enable = getattr(trainable, "activation_checkpointing_enable", trainable.gradient_checkpointing_enable)
    enable(options)
    assert trainable.model.text_model.layers[0].gradient_checkpointing
    found = gradients(trainable, labelled)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_the_base_model_checkpoints_alike(trainable, labelled):
    expected = gradients(trainable, labelled)
    enable = getattr(trainable.model, "activation_checkpointing_enable", trainable.model.gradient_checkpointing_enable)
    enable(REENTRANT)
    found = gradients(trainable, labelled)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_a_change_to_non_reentrant_is_said_once(trainable, caplog):
    enable = getattr(trainable, "activation_checkpointing_enable", trainable.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    assert "use_reentrant" not in caplog.text
    for _ in range(2):
        enable(REENTRANT)
    said = [record for record in caplog.records if "use_reentrant (True)" in record.getMessage()]
    assert len(said) <= 1  # none if another test was the first


def test_a_model_prepared_for_quantized_training_trains_its_selector(make_model, labelled):
    def adapted(prepare):
        model = make_model()
        if prepare:  # of a quantized model, the only kind for which PEFT turns on checkpointing
            model.is_loaded_in_8bit = True
            model = prepare_model_for_kbit_training(model)
        torch.manual_seed(6)
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=OWN)).train()

    expected, found = (gradients(adapted(prepare), labelled) for prepare in (False, True))
    assert set(found) == set(expected) and any(gradient.any() for gradient in found.values())
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_trainer_trains_alike_with_reentrant_checkpointing(make_model, labelled, tmp_path):
    rows = [{name: value[row] for name, value in labelled.items()} for row in range(2)]
    weights = []
    for checkpointing in (False, True):
        args = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=REENTRANT,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        model = make_model()
        before = model.model.selector.query.weight.clone()
        Trainer(model, args, train_dataset=rows).train()
        weights.append(model.model.selector.query.weight)
    assert torch.allclose(*weights, atol=1e-5) and not torch.allclose(weights[0], before, atol=1e-5)
