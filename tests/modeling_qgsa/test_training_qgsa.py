"""Training with the model alone: gradients of every weight, checkpointing, plain Trainer, several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import Trainer, TrainingArguments


ROOT = Path(__file__).parents[2]
OWN = ["selector", "complexity_estimator"]
VARIANTS = ["before_encoder", "after_encoder", "blocks", "dense"]
REENTRANT = {"use_reentrant": True}

# PEFT, and these tests for the sake of older versions, use former names of transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_)?gradient_checkpointing(_enable|_kwargs)?. is deprecated:FutureWarning"
)


@pytest.fixture(scope="module")
def text_only(tokenizer):
    inputs = dict(tokenizer(["<|im_start|>User: hello<end_of_utterance>\nAssistant: hi"], return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    return inputs | {"labels": inputs["input_ids"].clone()}


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


# Every trained weight has a gradient


@pytest.mark.parametrize("selection", VARIANTS)
def test_every_own_weight_gets_a_gradient(selection, trainable, labelled):
    found = gradients(trainable, labelled, selection=selection)
    assert found and all(gradient is not None for gradient in found.values())
    estimator = [gradient for name, gradient in found.items() if "estimator" in name]
    assert not any(gradient.any() for gradient in estimator), "nothing teaches the estimator here"
    assert any(gradient.any() for gradient in found.values()) == (selection != "dense")


def test_every_own_weight_gets_a_gradient_without_images(trainable, text_only):
    found = gradients(trainable, text_only)
    assert found and all(gradient is not None and not gradient.any() for gradient in found.values())


def test_every_own_weight_gets_a_gradient_with_given_scores(trainable, labelled):
    scores = torch.rand(2, int((labelled["input_ids"] == trainable.config.image_token_id).sum(1).max()))
    found = gradients(trainable, labelled, visual_token_scores=scores)
    assert all(gradient is not None for gradient in found.values())


@pytest.mark.parametrize("selection", VARIANTS)
def test_every_own_weight_gets_a_gradient_from_a_loss_on_logits(selection, trainable, labelled):
    """Label smoothing and preference losses take the logits and compute their loss themselves."""
    inputs = {name: value for name, value in labelled.items() if name != "labels"}
    trainable(**inputs, selection=selection).logits.float().log_softmax(-1).mean().backward()
    assert all(weight.grad is not None for weight in own_weights(trainable).values())


@pytest.mark.parametrize("selection", ["before_encoder", "dense"])
def test_adapters_and_trained_copies_get_gradients(selection, make_model, labelled):
    for config in (
        LoraConfig(target_modules=["q_proj"], modules_to_save=OWN),
        LoraConfig(target_modules="all-linear", r=2),
    ):
        adapted = get_peft_model(make_model(), config).train()
        found = gradients(adapted, labelled, selection=selection)
        assert len(found) > 10 and all(gradient is not None for gradient in found.values())


@pytest.mark.parametrize("fields", [{}, {"glance_downscale": 2}, {"pointer": "attention"}])
@pytest.mark.parametrize("selection", VARIANTS)
def test_mixed_precision_trains(selection, fields, make_model, labelled):
    model = make_model(selection=selection, **fields).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**labelled).loss
    loss.backward()
    assert torch.allclose(loss, model(**labelled).loss, rtol=0.05)
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("selection", VARIANTS)
def test_the_value_of_the_loss_is_not_changed(selection, trainable, labelled, monkeypatch):
    torch.manual_seed(5)
    loss = trainable(**labelled, selection=selection).loss
    monkeypatch.setattr("modeling_qgsa.modeling_qgsa.pointer_zero", lambda *_: torch.zeros(()))
    torch.manual_seed(5)
    assert torch.equal(trainable(**labelled, selection=selection).loss, loss)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_broken_selector_does_not_reach_the_loss_of_dense(number, trainable, labelled):
    expected = trainable(**labelled, selection="dense").loss
    with torch.no_grad():
        trainable.model.selector.relevance.weight.fill_(number)
    assert torch.equal(trainable(**labelled, selection="dense").loss, expected)


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


# Several processes


DISTRIBUTED = """
import json, sys
import torch
from transformers import Trainer, TrainingArguments
from modeling_qgsa import QGSASmolVLMForConditionalGeneration

folder, report = sys.argv[1], []
torch.set_num_threads(1)
with_images, without = torch.load(f"{folder}/batches.pt")
for selection in ("before_encoder", "dense"):
    for checkpointing, encoder, smoothing in ((False, True, 0.1), (False, False, 0.0), (True, False, 0.0)):
        args = TrainingArguments(
            folder, max_steps=2, learning_rate=1e-3, use_cpu=True, per_device_train_batch_size=1, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            train_sampling_strategy="sequential", gradient_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": True}, label_smoothing_factor=smoothing,
        )
        model = QGSASmolVLMForConditionalGeneration.from_pretrained(folder, selection=selection)
        model.model.vision_model.requires_grad_(encoder)
        model.model.connector.requires_grad_(encoder)
        rows = [with_images, with_images if encoder else without] * 2
        trainer = Trainer(model, args, train_dataset=rows, data_collator=lambda rows: rows[0])
        before = model.model.selector.query.weight.clone()
        trainer.train()
        weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        both = [torch.zeros_like(weights) for _ in range(args.world_size)]
        torch.distributed.all_gather(both, weights)
        report.append({
            "processes": args.world_size,
            "same": torch.equal(*both),
            "trained": not torch.equal(model.model.selector.query.weight, before),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        })
if args.process_index == 0:
    print(json.dumps(report))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_plain_trainer_in_two_processes(make_model, labelled, text_only, tmp_path):
    """Without `find_unused_parameters`, one process with images and the other without.

    The encoder is frozen there: a trained one has no gradient without images, in stock either.
    """
    make_model().save_pretrained(tmp_path / "model")
    torch.save([labelled, text_only], tmp_path / "model" / "batches.pt")
    (tmp_path / "run.py").write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert [each["trained"] for each in report] == [True, True, True, False, False, False]
    for each in report:
        assert each["processes"] == 2 and each["same"] and len(each["losses"]) == 2
