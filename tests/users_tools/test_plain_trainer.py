"""transformers' own Trainer, as notebooks use it: losses, gradients and metrics are those of the model by hand."""

import pytest
import torch
from recording import Recorder, assert_close, assert_gradients_equal, gradients_of, token_losses
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from modeling_qgsa.compat_qgsa import CACHE, features_field
from training.data.collator import QuestionCollator


# peft and transformers read an attribute that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

SELECTOR = "model.selector.relevance.weight"
CHECKPOINTING = {
    "plain": {},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
}


class Questions(Dataset):
    """A map-style data set of samples; the collator makes inputs of them."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def make_trainer(model, processor, questions, folder, callbacks=(), **arguments):
    options = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
    } | arguments
    return Trainer(
        model=model,
        args=TrainingArguments(
            str(folder), use_cpu=True, report_to=[], disable_tqdm=True, remove_unused_columns=False, **options
        ),
        train_dataset=Questions(questions),
        eval_dataset=Questions(questions),
        data_collator=QuestionCollator(processor),
        callbacks=list(callbacks),
    )


def step_of(model, processor, questions, folder, **arguments):
    """One recorded optimizer step: the record and the logged loss."""
    record = Recorder(model)
    trainer = make_trainer(model, processor, questions, folder, [record], **arguments)
    trainer.train()
    return record, trainer.state.log_history[0]["loss"]


def mean_loss(labels):
    """The loss that users expect: the mean over all labelled tokens of a step."""
    count = (labels[:, 1:] != -100).sum()
    return lambda logits, inputs: token_losses(logits, inputs["labels"]).sum() / count


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_loss_and_gradients(checkpointing, tool_model, tool_processor, questions, labelled, kind, tmp_path):
    record, loss = step_of(tool_model, tool_processor, questions, tmp_path, **CHECKPOINTING[checkpointing])
    expected, gradients = record.expect(mean_loss(labelled["labels"]))
    assert loss == pytest.approx(expected, abs=1e-4)
    assert_gradients_equal(record.gradients, gradients)
    if kind not in ("stock", "dense"):
        assert record.gradients[SELECTOR].any(), "the answer teaches the selector"


def test_accumulated_steps(tool_model, tool_processor, questions, labelled, tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    record, loss = step_of(tool_model, tool_processor, questions, tmp_path, **options)
    assert len(record.calls) == 2
    expected, gradients = record.expect(mean_loss(labelled["labels"]))
    assert loss == pytest.approx(expected, abs=1e-4)
    assert_gradients_equal(record.gradients, gradients)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_dense_trains_as_stock_does(checkpointing, make_kind, make_processor, questions, tmp_path):
    losses, gradients = [], []
    for kind in ("stock", "dense"):
        torch.manual_seed(0)
        record, loss = step_of(
            make_kind(kind), make_processor(kind), questions, tmp_path, **CHECKPOINTING[checkpointing]
        )
        losses.append(loss)
        gradients.append(record.gradients)
    assert losses[0] == losses[1]
    assert_gradients_equal(gradients[1], gradients[0], atol=1e-6)


def test_every_trained_weight_gets_a_gradient(tool_model, labelled):
    """DDP waits for each of them, also where nothing teaches it."""
    tool_model.train()(**labelled).loss.backward()
    without = [name for name, weight in tool_model.named_parameters() if weight.grad is None]
    # SmolVLM's pooling head and the last norm's siblings have none in stock either.
    assert not [name for name in without if name.startswith(("model.selector.", "model.complexity_estimator."))]


def test_metrics_see_prompt_positions(tool_model, tool_processor, questions, labelled, tmp_path):
    seen = {}

    def compute_metrics(prediction):
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        seen["logits"], seen["labels"] = torch.tensor(logits), torch.tensor(prediction.label_ids)
        right = (seen["logits"][:, :-1].argmax(-1) == seen["labels"][:, 1:])[seen["labels"][:, 1:] != -100]
        return {"token_accuracy": right.float().mean().item()}

    trainer = make_trainer(tool_model, tool_processor, questions, tmp_path, per_device_eval_batch_size=2)
    trainer.compute_metrics = compute_metrics
    metrics = trainer.evaluate()
    assert torch.equal(seen["labels"], labelled["labels"])
    assert seen["logits"].shape[:2] == labelled["input_ids"].shape
    assert metrics["eval_token_accuracy"] == 1.0, "the shipped model knows both answers"
    losses = token_losses(seen["logits"], labelled["labels"])
    assert metrics["eval_loss"] == pytest.approx((losses.sum() / (losses != 0).sum()).item(), abs=1e-4)


def test_predictions_of_batches_of_different_lengths_are_joined(tool_model, tool_processor, questions, tmp_path):
    """Prompts differ in length from batch to batch, kept positions too: padding joins them."""
    trainer = make_trainer(tool_model, tool_processor, questions, tmp_path, per_device_eval_batch_size=1)
    ignored = [CACHE, *features_field(torch.zeros(0)), "selection"]
    output = trainer.predict(trainer.eval_dataset, ignore_keys=ignored)
    assert output.predictions.shape[:2] == output.label_ids.shape
    collate = QuestionCollator(tool_processor)
    for row, question in enumerate(questions):
        inputs = collate([question])
        with torch.no_grad():
            expected = tool_model.eval()(**inputs).logits[0]
        found = torch.tensor(output.predictions[row, : len(expected)])
        labelled_next = torch.cat([inputs["labels"][0, 1:], torch.tensor([-100])]) != -100
        assert_close(found[labelled_next], expected[labelled_next])


def smoothed(logits, labels, epsilon=0.1):
    """Label smoothing by hand: a share `epsilon` of the probability is spread over the vocabulary."""
    log_probs = logits[:, :-1].log_softmax(-1)
    mask = labels[:, 1:] != -100
    spread = -log_probs.mean(-1)[mask]
    return ((1 - epsilon) * token_losses(logits, labels)[mask] + epsilon * spread).mean()


@pytest.mark.parametrize("training", [False, True])
def test_label_smoothing(training, tool_model, labelled):
    model = tool_model.train(training)
    output = model(**{name: value for name, value in labelled.items() if name != "labels"})
    loss = LabelSmoother(0.1)(output, labelled["labels"], shift_labels=True)
    assert loss.item() == pytest.approx(smoothed(output.logits, labelled["labels"]).item(), abs=1e-4)
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients_of(model).values())


def test_label_smoothing_in_the_trainer(tool_model, tool_processor, questions, labelled, tmp_path):
    """Trainer smooths without a shift for classes outside its list of causal language models, stock's among them."""
    record, loss = step_of(tool_model, tool_processor, questions, tmp_path, label_smoothing_factor=0.1)
    count = (labelled["labels"][:, 1:] != -100).sum()
    expected, gradients = record.expect(
        lambda logits, inputs: LabelSmoother(0.1)({"logits": logits}, labelled["labels"], num_items_in_batch=count)
    )
    assert loss == pytest.approx(expected, abs=1e-4)
    assert_gradients_equal(record.gradients, gradients)


def test_labels_over_the_whole_prompt(tool_model, tool_processor, questions):
    """As most notebooks do: `labels = input_ids.clone()`, -100 on padding and placeholders."""
    inputs = QuestionCollator(tool_processor)(questions)
    labels = inputs["input_ids"].clone()
    labels[(inputs["attention_mask"] == 0) | (labels == tool_model.config.image_token_id)] = -100
    with torch.no_grad():
        output = tool_model(**inputs | {"labels": labels})
        partly = tool_model(**inputs)
    assert output.logits.shape[:2] == labels.shape
    assert output.loss.isfinite() and output.loss != partly.loss
    answer = torch.cat([inputs["labels"][:, 1:], torch.full_like(labels[:, :1], -100)], 1) != -100
    assert_close(output.logits[answer], partly.logits[answer])  # the same selection
