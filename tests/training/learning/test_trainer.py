"""The trainer: what it changes, leaves and refuses, and that a stopped run resumes as if never interrupted."""

from types import SimpleNamespace

import pytest
import torch
from former import to_former_names
from peft import PeftModel
from transformers import TrainerCallback
from transformers.utils import is_bitsandbytes_available

import training.learning.trainer
from training.cli.groups import FeatureArguments, ModelArguments, SelectionArguments
from training.data.cards import Cards
from training.data.collator import QuestionCollator
from training.learning.feature_cache import open_feature_cache
from training.learning.teachers import visual_attention
from training.learning.train import add_adapters, train_selection
from training.learning.trainer import QGSATrainer
from training.learning.training_arguments import QGSATrainingArguments


OWN = ("selector.", "complexity_estimator.")


class Stop(TrainerCallback):
    """Stops a run after some steps, as if it had been interrupted after a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.fixture
def make_trainer(make_model, processor, tmp_path):
    """Makes a trainer of a fresh model, the same one every time, on questions of cards."""

    def make(folder="run", rank=4, collate=None, callbacks=(), fields=None, own=None, **arguments):
        model = make_model(**({"min_tiles": 0, "max_tiles": 3, "max_visual_tokens": 32} | (fields or {})))
        torch.manual_seed(5)
        arguments = {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
        } | arguments
        return QGSATrainer(
            model=add_adapters(model, rank, ModelArguments.lora_targets),
            args=QGSATrainingArguments(
                output_dir=str(tmp_path / folder),
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                **arguments,
            ),
            train_dataset=Cards("train", 16),
            data_collator=collate or QuestionCollator(processor),
            callbacks=list(callbacks),
            **(own or {}),
        )

    return make


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def is_own(name):
    """Whether a weight of a model with adapters is one that is to be trained."""
    return "lora_" in name or "modules_to_save" in name


# Steps


@pytest.mark.parametrize("selection", ["before_encoder", "after_encoder"])
def test_steps_have_finite_losses_and_change_selector_estimator_and_adapters_only(selection, make_trainer):
    trainer = make_trainer(max_steps=3, fields={"selection": selection})
    before = weights_of(trainer.model)
    result = trainer.train()
    assert result.global_step == 3
    assert torch.isfinite(torch.tensor(result.training_loss))
    after = weights_of(trainer.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if is_own(name)} - changed <= {
        name
        for name in before
        if name.endswith("relevance.bias")  # shifts all cells alike, which changes nothing
    }
    assert {name for name in changed if not is_own(name)} == set()
    assert all(torch.isfinite(weight).all() for weight in after.values())
    for part in ("lora_A", "lora_B", *OWN):
        assert any(part in name for name in changed), part


def test_without_adapters_selector_and_estimator_change_only(make_trainer):
    trainer = make_trainer(rank=0)
    before = weights_of(trainer.model)
    trainer.train()
    changed = {name for name, weight in weights_of(trainer.model).items() if not torch.equal(before[name], weight)}
    assert changed and all(name.startswith(("model.selector.", "model.complexity_estimator.")) for name in changed)


def test_merged_adapters_keep_the_dense_weights_but_for_attention(make_trainer, make_model):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    merged, fresh = trainer.model.merge_and_unload(), make_model()
    assert set(merged.state_dict()) == set(fresh.state_dict())
    differs = {
        name for name, weight in merged.state_dict().items() if not torch.equal(fresh.state_dict()[name], weight)
    }
    assert "model.selector.relevance.weight" in differs
    assert "model.complexity_estimator.network.0.weight" in differs
    assert "model.text_model.layers.0.self_attn.q_proj.weight" in differs
    for name in differs:
        assert any(part in name for part in (*OWN, "text_model.layers.0.self_attn", "text_model.layers.1.self_attn"))


def test_adapters_saved_and_loaded_and_merged_answer_alike(make_trainer, make_model, batch, tmp_path):
    fields = {"min_tiles": 1, "max_tiles": 2, "max_visual_tokens": 32}
    trainer = make_trainer(max_steps=3, fields=fields)
    trainer.train()
    tuned = trainer.model.eval()
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_model(**fields), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected, fresh = tuned(**batch), make_model(**fields)(**batch)
        assert not torch.equal(fresh.selection.relevance, expected.selection.relevance)
        found = loaded(**batch)
        assert torch.equal(found.logits, expected.logits)
        assert torch.allclose(found.selection.relevance, expected.selection.relevance, atol=1e-6)
        merged = loaded.merge_and_unload()(**batch)
    assert torch.equal(merged.selection.kept_tokens, expected.selection.kept_tokens)
    assert torch.allclose(merged.logits, expected.logits, atol=1e-4)


def test_every_loss_is_logged_with_its_weight(make_trainer):
    trainer = make_trainer(max_steps=1, utility_weight=0.0, complexity_start=0.0)
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert {"answer_loss", "attention_loss", "complexity_loss", "visual_tokens", "tiles"} <= logged
    assert "utility_loss" not in logged
    trainer = make_trainer(max_steps=1, complexity_weight=0.0, attention_weight=0.0)
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert "utility_loss" in logged and not {"complexity_loss", "attention_loss"} & logged


@pytest.mark.parametrize(("share", "expected"), [(0.25, 1), (0.5, 2), (0.51, 3), (1.0, 4)])
def test_the_attention_teacher_is_asked_about_its_share_of_a_batch(share, expected, make_trainer, monkeypatch):
    asked = []

    def listen(model, glance, features, prompt, samples, neutral_ids):
        asked.append(samples)
        return visual_attention(model, glance, features, prompt, samples, neutral_ids)

    monkeypatch.setattr(training.learning.trainer, "visual_attention", listen)
    make_trainer(max_steps=1, attention_share=share, per_device_train_batch_size=4).train()
    assert asked == [expected]


def test_estimator_and_adapters_have_learning_rates_of_their_own(make_trainer):
    trainer = make_trainer(
        learning_rate=1e-3, complexity_learning_rate=0.5, adapter_learning_rate=0.25, lr_scheduler_type="constant"
    )
    trainer.train()
    rates = {weight: group["lr"] for group in trainer.optimizer.param_groups for weight in group["params"]}
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert set(rates) == set(trained.values())
    for name, weight in trained.items():
        expected = 0.5 if ".complexity_estimator." in name else 0.25 if ".lora_" in name else 1e-3
        assert rates[weight] == expected, name


def test_a_step_lowers_the_losses_of_its_own_batch(make_trainer):
    trainer = make_trainer(
        max_steps=30,
        learning_rate=3e-3,
        train_sampling_strategy="sequential",
        answer_weight=0.0,
        lr_scheduler_type="constant",
    )
    trainer.train_dataset = torch.utils.data.Subset(trainer.train_dataset, [0, 1])
    trainer.train()
    for name in ("utility_loss", "attention_loss"):
        losses = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert losses[-1] < losses[0], name


def test_a_batch_without_an_image_has_the_answer_loss_only(make_trainer, processor):
    def words_only(samples):
        ids = processor.tokenizer(["how many cards are there? four"] * len(samples), return_tensors="pt")["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    assert torch.isfinite(torch.tensor(make_trainer(collate=words_only).train().training_loss))


def test_the_estimator_has_a_gradient_before_it_is_taught(make_trainer):
    """DDP waits for a gradient of every weight in use."""
    trainer = make_trainer(max_steps=1, complexity_weight=0.0)
    gradients = {}
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            weight.register_hook(lambda gradient, name=name: gradients.setdefault(name, gradient.clone()))
    trainer.train()
    assert set(gradients) == {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert all(not value.any() for name, value in gradients.items() if ".complexity_estimator." in name)


def test_temperature_falls_geometrically(make_trainer):
    trainer = make_trainer(start_temperature=2.0, end_temperature=0.02)
    temperatures = []
    for step in (0, 50, 100):
        trainer.state = SimpleNamespace(global_step=step, max_steps=100)
        temperatures.append(trainer.temperature())
    assert temperatures == pytest.approx([2.0, 0.2, 0.02])


def test_the_model_gets_the_temperature_of_its_step(make_trainer):
    trainer = make_trainer(max_steps=2, start_temperature=1.0, end_temperature=0.25)
    given = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["gumbel_temperature"]), with_kwargs=True
    )
    trainer.train()
    assert given == pytest.approx([1.0, 0.5])


# Grounding, the budget, and features from a cache


def words_of(samples):
    """Stands in for a frozen CLIP: the first cell is like the words of every question."""
    return torch.eye(16)[torch.zeros(len(samples), dtype=torch.long)]


def test_the_grounding_losses_teach_the_selector_alone(make_trainer, processor):
    collate = QuestionCollator(processor, alignment=SimpleNamespace(similarity=words_of))
    silent = {"answer_weight": 0.0, "utility_weight": 0.0, "attention_weight": 0.0, "complexity_weight": 0.0}
    for name in ("contrastive", "patch_word"):
        trainer = make_trainer(collate=collate, max_steps=1, rank=0, **silent, **{f"{name}_weight": 1.0})
        before = weights_of(trainer.model)
        trainer.train()
        assert f"{name}_loss" in set().union(*trainer.state.log_history)
        changed = {each for each, weight in weights_of(trainer.model).items() if not torch.equal(weight, before[each])}
        assert any(".selector.relevance." in each for each in changed)
        assert all(".selector." in each for each in changed), changed


def test_patch_words_draw_the_relevance_to_their_cells(make_trainer, processor):
    collate = QuestionCollator(processor, alignment=SimpleNamespace(similarity=words_of))
    silent = {"answer_weight": 0.0, "utility_weight": 0.0, "attention_weight": 0.0, "complexity_weight": 0.0}
    trainer = make_trainer(
        collate=collate, max_steps=20, patch_word_weight=1.0, patch_word_temperature=0.1, rank=0, **silent
    )
    trainer.train()
    inputs = collate([Cards("test", 1)[0]])
    del inputs["patch_words"]
    with torch.no_grad():
        relevance = trainer.model.eval()(**inputs).selection.relevance
    assert relevance.flatten().argmax() == 0


def test_without_utility_attention_teaches_the_tiles_too(make_trainer):
    silent = {"answer_weight": 0.0, "utility_weight": 0.0, "complexity_weight": 0.0, "attention_share": 1.0}
    trainer = make_trainer(max_steps=1, rank=0, **silent)
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    assert any(not torch.equal(after[name], before[name]) for name in before if ".selector.relevance." in name)


def test_a_neutral_question_changes_what_attention_teaches(make_trainer, tokenizer):
    losses = []
    for ids in ((), tuple(tokenizer("what is it?", add_special_tokens=False)["input_ids"])):
        trainer = make_trainer(max_steps=1, own={"neutral_ids": ids})
        trainer.train()
        losses.append(next(entry["attention_loss"] for entry in trainer.state.log_history))
    assert losses[0] != losses[1]


def test_the_budget_is_held_to_its_target(make_trainer):
    trainer = make_trainer(
        max_steps=60,
        per_device_train_batch_size=4,
        complexity_weight=0.0,
        complexity_start=0.0,
        answer_weight=0.0,
        utility_weight=0.0,
        attention_weight=0.0,
        target_visual_tokens=20.0,
        complexity_learning_rate=1e-2,
        lr_scheduler_type="constant",
    )
    for name, module in trainer.model.named_modules():
        if "complexity_estimator" in name and isinstance(module, torch.nn.Linear):
            module.reset_parameters()  # the fixture's estimator is too sure to be taught
    trainer.train()
    tokens = [entry["visual_tokens"] for entry in trainer.state.log_history if "visual_tokens" in entry]
    assert abs(tokens[0] - 20) > 4 and sum(tokens[-20:]) / 20 == pytest.approx(20, abs=1.5)


def test_features_from_a_cache_train_as_encoded_ones_do(make_trainer, processor, tiles_encoded, tmp_path):
    model = make_trainer().model.get_base_model()
    store = open_feature_cache(tmp_path / "features", model, processor, 10**8)
    plain = make_trainer()
    plain.train()
    cached = make_trainer(own={"feature_cache": store})
    cached.train()
    again = make_trainer(own={"feature_cache": store})
    with tiles_encoded(again.model.get_base_model()) as counts:
        again.train()
    assert counts == []
    for one, two, three in zip(plain.state.log_history, cached.state.log_history, again.state.log_history):
        for name in ("answer_loss", "utility_loss", "attention_loss"):
            if name in one:
                assert two[name] == pytest.approx(one[name], abs=2e-3)
                assert three[name] == pytest.approx(one[name], abs=2e-3)


# Refused arguments


@pytest.mark.parametrize("target", [7.0, 33.0])
def test_a_target_outside_of_the_budget(target, make_trainer):
    with pytest.raises(ValueError, match=rf"target_visual_tokens \({target}\): .*\(8\) and max_visual_tokens \(32\)"):
        make_trainer(target_visual_tokens=target)


def test_dense_has_no_selection_to_train(make_trainer):
    with pytest.raises(ValueError, match=r"selection \('dense'\)"):
        make_trainer(fields={"selection": "dense"})


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_an_attention_share_that_is_none(share, make_trainer):
    with pytest.raises(ValueError, match=rf"attention_share \({share}\)"):
        make_trainer(attention_share=share)


def test_several_gpus_in_one_process(make_trainer, monkeypatch):
    monkeypatch.setattr(QGSATrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"n_gpu \(2\)"):
        make_trainer()


def test_pixels_that_are_not_numbers_end_the_run_with_an_error(make_trainer, processor):
    collate = QuestionCollator(processor)

    def damaged(samples):
        inputs = collate(samples)
        inputs["pixel_values"][0, 0] = float("nan")
        return inputs

    with pytest.raises(ValueError, match="sample 0: pixel_values holds NaN"):
        make_trainer(collate=damaged).train()


def test_a_loss_that_is_no_number_ends_the_run_with_an_error(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"loss \(nan at step 0\).*answer_loss"):
        trainer.train()


# Resuming


@pytest.mark.parametrize("rank", [0, 4])
def test_a_stopped_run_goes_on_as_if_unbroken(rank, make_trainer, tmp_path):
    save = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rank": rank, "lr_scheduler_type": "cosine"}
    unbroken = make_trainer("unbroken", **save)
    unbroken.train()
    stopped = make_trainer("stopped", callbacks=[Stop(2)], **save)
    stopped.train()
    assert stopped.state.global_step == 2
    resumed = make_trainer("stopped", **save)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    expected, weights = weights_of(unbroken.model), weights_of(resumed.model)
    assert set(expected) == set(weights)
    for name in expected:
        assert torch.equal(expected[name], weights[name]), name
    halfway = weights_of(stopped.model)
    assert not all(torch.equal(expected[name], halfway[name]) for name in expected)


def test_a_stopped_run_of_version_0_2_goes_on(make_dense, processor, tmp_path):
    """Its checkpoints name weights of the selector as before; everything else is found where it was."""
    selection = SelectionArguments(min_visual_tokens=8, max_visual_tokens=32, max_tiles=3)

    def run(folder, **options):
        args = QGSATrainingArguments(
            str(tmp_path / folder),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
            **options,
        )
        groups = ModelArguments(), selection, FeatureArguments()
        return weights_of(train_selection(make_dense("idefics3"), processor, Cards("train", 16), *groups, args))

    expected, half = run("unbroken"), tmp_path / "unbroken" / "checkpoint-1"
    to_former_names(half / "adapter_model.safetensors")
    found = run("resumed", resume_from_checkpoint=str(half))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


# Quantized bases


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_adapters_train_on_a_quantized_base_and_merge_into_the_plain_one(
    quantization, make_dense, processor, tmp_path
):
    selection = SelectionArguments(min_visual_tokens=8, max_visual_tokens=32, max_tiles=3)
    args = QGSATrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, remove_unused_columns=False, max_steps=2
    )
    dense = make_dense("idefics3")
    before = weights_of(dense)
    options = ModelArguments(quantization=quantization), selection, FeatureArguments()
    tuned = train_selection(dense, processor, Cards("train", 16), *options, args)
    after = weights_of(tuned)
    assert {str(weight.dtype) for weight in after.values()} == {"torch.float32"}
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed and all("text_model" in name and "self_attn" in name for name in changed)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("fields", "complaint"), [({"quantization": "2bit"}, "'2bit'"), ({"lora_rank": 0}, r"lora_rank \(0\)")]
)
def test_a_quantization_that_cannot_be(fields, complaint, make_dense, processor, tmp_path):
    args = QGSATrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    options = ModelArguments(**({"quantization": "4bit"} | fields)), SelectionArguments(), FeatureArguments()
    with pytest.raises(ValueError, match=complaint):
        train_selection(make_dense("idefics3"), processor, Cards("train", 16), *options, args)


def test_adapters_that_match_nothing(make_model):
    with pytest.raises(ValueError, match="no_such_layer'\\): it must match at least one of the model"):
        add_adapters(make_model(), 4, ".*no_such_layer")
