"""TRL's trainers: losses and gradients are those of the model by hand, and stock's where everything is kept.

TRL runs the base model itself, without labels, and reads its last hidden states in prompt positions.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from recording import Recorder, assert_gradients_equal, token_losses
from torch.nn.functional import logsigmoid


trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")

# peft and TRL use names that transformers has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
]

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}
CHECKPOINTING = {
    "plain": {},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}
# Dense is compared with stock, at the end.
KINDS = ("stock", "before_encoder", "blocks", "after_encoder")
each_kind = pytest.mark.parametrize("kind", KINDS, indirect=True)
selecting = pytest.mark.parametrize("kind", KINDS[1:], indirect=True)
each_kind_and_checkpointing = pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [(kind, "plain") for kind in KINDS]
    + [("before_encoder", "reentrant")]
    + [
        pytest.param(kind, checkpointing, marks=pytest.mark.slow)
        for kind in KINDS
        for checkpointing in ("reentrant", "non-reentrant")
        if (kind, checkpointing) != ("before_encoder", "reentrant")
    ],
    indirect=["kind"],
)
SELECTOR = "model.selector.relevance.weight"


def said(role, words):
    return [{"role": role, "content": words}]


def prompt_completion(question, answer):
    return {"prompt": said("user", question), "completion": said("assistant", answer)}


def messages(question, answer):
    return {"messages": said("user", question) + said("assistant", answer)}


def preference(question, answer):
    rejected = "star" if answer != "star" else "moon"
    return {
        "prompt": said("user", question),
        "chosen": said("assistant", answer),
        "rejected": said("assistant", f"{rejected} and {rejected}"),
    }


def prompt_only(question, answer):
    return {"prompt": said("user", question)}


def trained(trainer, record):
    """The logged loss after the trainer's only step."""
    trainer.add_callback(record)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


# SFT

COLUMNS = {"prompt-completion": prompt_completion, "messages": messages}


def supervised(model, processor, conversations, folder, columns="prompt-completion", **options):
    record = Recorder(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(folder), **COMMON | {"max_length": None} | options),
        train_dataset=conversations(COLUMNS[columns]),
        eval_dataset=conversations(COLUMNS[columns]),
        processing_class=processor,
    )
    return trainer, record


def mean_loss(record):
    count = sum((inputs["labels"][:, 1:] != -100).sum() for inputs, _ in record.calls)
    return lambda logits, inputs: token_losses(logits, inputs["labels"]).sum() / count


@each_kind_and_checkpointing
@pytest.mark.parametrize("columns", COLUMNS)
def test_sft(columns, checkpointing, kind, tool_model, tool_processor, conversations, tmp_path):
    options = CHECKPOINTING[checkpointing]
    trainer, record = supervised(tool_model, tool_processor, conversations, tmp_path, columns, **options)
    loss = trained(trainer, record)
    expected, gradients = record.expect(mean_loss(record))
    assert loss == pytest.approx(expected, abs=1e-4)
    assert_gradients_equal(record.gradients, gradients)
    if kind != "stock":
        assert record.gradients[SELECTOR].any(), "the answer teaches the selector"
    assert {"mean_token_accuracy", "entropy"} <= set(trainer.state.log_history[0])


@each_kind
def test_sft_with_adapters(tool_model, tool_processor, conversations, tmp_path):
    """TRL's own defaults: checkpointing, and LoRA on a model that is given."""
    torch.manual_seed(3)
    model = get_peft_model(tool_model, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    trainer, record = supervised(model, tool_processor, conversations, tmp_path, **CHECKPOINTING["non-reentrant"])
    loss = trained(trainer, record)
    expected, gradients = record.expect(mean_loss(record))
    assert loss == pytest.approx(expected, abs=1e-4)
    assert_gradients_equal(record.gradients, gradients)


@each_kind
@pytest.mark.parametrize("columns", COLUMNS)
def test_sft_evaluates(columns, tool_model, tool_processor, conversations, tmp_path):
    trainer, _ = supervised(tool_model, tool_processor, conversations, tmp_path, columns, eval_strategy="no")
    inputs = next(iter(trainer.get_eval_dataloader()))
    metrics = trainer.evaluate()
    with torch.no_grad():
        logits = tool_model.eval()(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    losses, mask = token_losses(logits, inputs["labels"]), inputs["labels"][:, 1:] != -100
    right = (logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:])[mask]
    assert metrics["eval_loss"] == pytest.approx(losses[mask].mean().item(), abs=1e-4)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(right.float().mean().item(), abs=1e-6)


@selecting
@pytest.mark.parametrize("columns", COLUMNS)
def test_sft_with_the_stock_processor(columns, kind, make_kind, make_processor, conversations, tmp_path):
    """The question is found by the same rule: inputs without a question mask select and train alike."""
    losses, gradients = [], []
    for processor in (make_processor("stock"), make_processor(kind)):
        torch.manual_seed(0)
        trainer, record = supervised(make_kind(kind), processor, conversations, tmp_path, columns)
        losses.append(trained(trainer, record))
        gradients.append(record.gradients)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert_gradients_equal(gradients[0], gradients[1])


# DPO


def preferring(kind, make_kind, processor, conversations, folder, model=None, **options):
    model = make_kind(kind) if model is None else model
    record = Recorder(model)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=None if "peft" in type(model).__module__ else make_kind(kind),
        args=trl.DPOConfig(str(folder), **COMMON | {"max_length": None, "beta": 0.1} | options),
        train_dataset=conversations(preference),
        processing_class=processor,
    )
    return trainer, record


def dpo_loss(reference):
    """DPO by hand against the log-probabilities of the `reference` model."""

    def loss_of(logits, inputs):
        given = {name: value for name, value in inputs.items() if name not in ("labels", "fused_lm_head", "use_cache")}
        with torch.no_grad():
            expected = reference.eval()(**given).logits
        gains = token_losses(expected, inputs["labels"]).sum(1) - token_losses(logits, inputs["labels"]).sum(1)
        chosen, rejected = gains.chunk(2)
        return -logsigmoid(0.1 * (chosen - rejected)).mean()

    return loss_of


@each_kind_and_checkpointing
def test_dpo(checkpointing, kind, make_kind, tool_processor, conversations, tmp_path):
    options = CHECKPOINTING[checkpointing]
    trainer, record = preferring(kind, make_kind, tool_processor, conversations, tmp_path, **options)
    loss = trained(trainer, record)
    expected, gradients = record.expect(dpo_loss(make_kind(kind)))
    assert loss == pytest.approx(expected, abs=1e-4)
    assert_gradients_equal(record.gradients, gradients)
    if kind == "stock":
        rewards = trainer.state.log_history[0]
        assert loss == pytest.approx(0.6931, abs=1e-3), "policy and reference agree before the first step"
        assert rewards["logps/chosen"] > rewards["logps/rejected"]


@selecting
def test_chosen_and_rejected_are_read_with_the_same_selection(
    kind, make_kind, make_processor, conversations, tmp_path
):
    """One question, one image: what the answers are, and their length, must not decide what is looked at."""
    model = make_kind(kind)
    for processor in (make_processor("stock"), make_processor(kind)):
        trainer, _ = preferring(kind, make_kind, processor, conversations, tmp_path)
        inputs = next(iter(trainer.get_train_dataloader()))
        kept = {"completion_mask", "labels"}
        kept = model.select(**{name: value for name, value in inputs.items() if name not in kept}).kept_tokens
        chosen, rejected = kept.chunk(2)
        assert torch.equal(chosen, rejected)


# GRPO


def rewarding(model, processor, conversations, folder, **options):
    record = Recorder(model)
    seen = []

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.extend(completion_ids)
        return [1.0, 0.0] * (len(completions) // 2)

    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(
            str(folder), **COMMON | {"num_generations": 2, "max_completion_length": 4, "temperature": 1.0} | options
        ),
        train_dataset=conversations(prompt_only),
        processing_class=processor,
    )
    return trainer, record, seen


def policy_gradient(logits, inputs):
    """The gradient of GRPO's first step: the ratio is 1, the advantages are those of rewards 1 and 0."""
    advantages = torch.tensor([1.0, -1.0]) * 0.5 / (0.5**0.5 + 1e-4)
    losses, count = token_losses(logits, inputs["labels"]), (inputs["labels"][:, 1:] != -100).sum()
    return (advantages[:, None] * losses).sum() / count


@each_kind_and_checkpointing
def test_grpo(checkpointing, kind, tool_model, tool_processor, conversations, tmp_path):
    options = CHECKPOINTING[checkpointing]
    trainer, record, seen = rewarding(tool_model, tool_processor, conversations, tmp_path, **options)
    trained(trainer, record)
    (inputs, _), *rest = record.calls
    assert not rest
    answers = [ids[labels != -100].tolist() for ids, labels in zip(inputs["input_ids"], inputs["labels"])]
    assert answers == seen
    _, gradients = record.expect(policy_gradient)
    assert_gradients_equal(record.gradients, gradients)


# Dense


@pytest.mark.parametrize("tool", ["sft", "dpo", "grpo"])
def test_dense_trains_as_stock_does(tool, make_kind, make_processor, conversations, tmp_path):
    gradients, losses = [], []
    for kind in ("stock", "dense"):
        torch.manual_seed(0)
        model, processor = make_kind(kind), make_processor(kind)
        if tool == "sft":
            trainer, record = supervised(model, processor, conversations, tmp_path)
        elif tool == "dpo":
            trainer, record = preferring(kind, make_kind, processor, conversations, tmp_path, copy.deepcopy(model))
        else:
            trainer, record, _ = rewarding(model, processor, conversations, tmp_path)
        losses.append(trained(trainer, record))
        gradients.append(record.gradients)
    assert losses[0] == losses[1]
    assert_gradients_equal(gradients[1], gradients[0], atol=1e-6)
