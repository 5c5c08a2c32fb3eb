"""The policy chooses how deep vision goes by question; samples of several schedules share a batch and a cache."""

import copy
import math

import pytest
import torch
from transformers import DynamicCache

from modeling_qgsa import policy_qgsa
from modeling_qgsa.compat_qgsa import CACHE
from modeling_qgsa.policy_qgsa import Observed, at, fit_estimator, observe_depth
from modeling_qgsa.schedule_qgsa import parse_schedule, vision_share
from modeling_qgsa.selector_qgsa import ComplexityEstimator


SHORTLIST = ["CTTT", "FCTT", "FFCC", "FFFF"]
WHOLE = {"selection": "after_encoder", "min_visual_tokens": 9999, "max_visual_tokens": 9999}
DEPTHS = torch.tensor([0.0, 1.0, 0.34])  # of three samples: CTTT, FFFF, FCTT


@pytest.fixture(scope="module")
def deep(make_deep):
    return make_deep(vision_schedules=SHORTLIST, vision_policy=True)


def chosen(complexity):
    return SHORTLIST[round(complexity * (len(SHORTLIST) - 1))]


# One batch, several schedules


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"num_beams": 2, "use_cache": False}])
def test_every_sample_is_read_as_if_alone(deep, batch, samples, prepare, options):
    options = {**WHOLE, **options, "max_new_tokens": 5}
    together = deep.generate(**batch, **options, complexity=DEPTHS)
    for row, sample in enumerate(samples):
        alone = deep.generate(**prepare(sample), **options, vision_budget=chosen(float(DEPTHS[row])))
        assert torch.equal(together[row, -5:], alone[0, -5:])


def test_logits_and_shares_of_a_mixed_batch(deep, batch, samples, prepare):
    with torch.no_grad():
        outputs = deep(**batch, **WHOLE, complexity=DEPTHS)
        for row, sample in enumerate(samples):
            alone = deep(**prepare(sample), **WHOLE, vision_budget=chosen(float(DEPTHS[row])))
            assert torch.allclose(outputs.logits[row, -1], alone.logits[0, -1], atol=1e-5)
            assert outputs.selection.vision_share[row] == alone.selection.vision_share[0]
    shares = [vision_share(parse_schedule("", chosen(depth), 4), deep.config) for depth in DEPTHS.tolist()]
    assert outputs.selection.vision_share.tolist() == pytest.approx(shares)


def test_a_mixed_batch_with_a_selection_and_pruning(deep, batch, samples, prepare):
    options = {"min_tiles": 2, "max_tiles": 2, "min_visual_tokens": 9, "max_visual_tokens": 9, "max_new_tokens": 4}
    options |= {"selection": "after_encoder", "prune_layer": 1}
    together = deep.generate(**batch, **options, complexity=DEPTHS)
    for row, sample in enumerate(samples):
        alone = deep.generate(**prepare(sample), **options, vision_budget=chosen(float(DEPTHS[row])))
        assert torch.equal(together[row, -4:], alone[0, -4:])


def test_layers_hold_the_longest_of_their_samples(deep, batch):
    with torch.no_grad():
        cache = deep(**batch, **WHOLE, complexity=torch.tensor([0.0, 0.0, 0.34]))[CACHE]
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths[0] > 17 * 16 > lengths[1] > 9 * 16 > lengths[2] == lengths[3]  # CTTT, CTTT (17 tiles), FCTT (9)


def test_a_given_cache_is_filled(deep, batch):
    cache = DynamicCache(config=deep.config.text_config)
    with torch.no_grad():
        outputs = deep(**batch, **WHOLE, complexity=DEPTHS, past_key_values=cache)
        assert outputs[CACHE] is cache
        token = outputs.logits[:, -1:].argmax(-1)
        following = deep(input_ids=token, past_key_values=cache).logits
    expected = deep.generate(**batch, **WHOLE, complexity=DEPTHS, max_new_tokens=2)
    assert torch.equal(following[:, -1].argmax(-1), expected[:, -1])


def test_turns_of_a_mixed_batch(deep, prepare, make_image, tokenizer):
    """A second image on the cache is read with the schedules of the first, in view of all that is held."""
    firsts = [("what is it?", [make_image(0, 128, 64)]), ("what is the thing here?", [make_image(1, 128, 64)])]
    second = prepare(("and where?", [make_image(2, 128, 64)]))
    depths = torch.tensor([0.0, 1.0])
    with torch.no_grad():
        together = prepare(*firsts)
        outputs = deep(**together, **WHOLE, complexity=depths)
        more = {name: value.expand(2, *value.shape[1:]) for name, value in second.items() if name != "attention_mask"}
        mask = torch.cat([together["attention_mask"], torch.ones_like(more["input_ids"])], 1)
        later = deep(**more, attention_mask=mask, **WHOLE, past_key_values=outputs[CACHE]).logits[:, -1]
        word = deep(input_ids=later.argmax(-1)[:, None], past_key_values=outputs[CACHE]).logits[:, -1]
        for row, first in enumerate(firsts):
            kinds = chosen(float(depths[row]))
            cache = deep(**prepare(first), **WHOLE, vision_budget=kinds)[CACHE]
            alone = {name: value for name, value in second.items() if name != "attention_mask"}
            expected = deep(**alone, **WHOLE, past_key_values=cache, vision_budget=kinds).logits[0, -1]
            assert torch.allclose(later[row], expected, atol=1e-5)
            expected = deep(input_ids=expected.argmax()[None, None], past_key_values=cache).logits[0, -1]
            assert torch.allclose(word[row], expected, atol=1e-5)


def test_other_schedules_on_a_mixed_cache_are_refused(deep, prepare, make_image):
    first, second = (prepare(*[("what is it?", [make_image(seed, 128, 64)])] * 2) for seed in (0, 1))
    del second["attention_mask"]
    with torch.no_grad():
        cache = deep(**first, **WHOLE, complexity=torch.tensor([0.0, 1.0]))[CACHE]
        with pytest.raises(ValueError, match="past_key_values was filled with others"):
            deep(**second, **WHOLE, past_key_values=cache, vision_budget="FCTT")


# What decides


def test_the_estimator_decides(deep, batch, samples, prepare):
    """Per sample, as if asked alone; a fixed budget, a schedule and training come first."""
    model = copy.deepcopy(deep)
    torch.manual_seed(0)
    network = model.model.complexity_estimator.network
    with torch.no_grad():
        network[2].weight.normal_(std=3)
    together = model.select(**batch, **WHOLE)
    assert len(set(together.vision_share.tolist())) > 1, "the test needs different decisions"
    for row, sample in enumerate(samples):
        assert model.select(**prepare(sample), **WHOLE).vision_share[0] == together.vision_share[row]
    assert model.select(**batch, **WHOLE, vision_budget="FFFF").vision_share.tolist() == [1.0] * 3
    model.config.vision_policy = False
    assert model.select(**batch, **WHOLE).vision_share.tolist() == [1.0] * 3


def test_images_of_a_sample_are_read_as_deep_as_the_deepest(deep, prepare, make_image):
    inputs = prepare(("what is it?", [make_image(0), make_image(1, 128, 64)]))
    shares = deep.select(**inputs, **WHOLE, complexity=torch.tensor([0.34, 0.0])).vision_share
    assert shares[0] == pytest.approx(vision_share(parse_schedule("", "FCTT", 4), deep.config))


def test_the_policy_is_saved(deep, batch, tmp_path):
    deep.save_pretrained(tmp_path)
    loaded = type(deep).from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(**batch, max_new_tokens=4), deep.generate(**batch, max_new_tokens=4))
    assert loaded.config.vision_policy and loaded.config.vision_schedules == SHORTLIST


def test_an_untrained_budget_is_said(deep, single, caplog):
    deep.generate(**single, vision_budget="CCCT", max_new_tokens=1)
    assert "vision_budget (CCCT): this checkpoint was not trained for it" in caplog.text


# Training


def test_each_step_draws_a_schedule(deep, labelled):
    model = copy.deepcopy(deep).train()
    losses = {kinds: float(model(**labelled, **WHOLE, vision_budget=kinds).loss.detach()) for kinds in SHORTLIST}
    drawn = {round(float(model(**labelled, **WHOLE).loss.detach()), 5) for _ in range(30)}
    assert drawn == {round(loss, 5) for loss in losses.values()}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("kinds", SHORTLIST)
def test_checkpointing_has_the_gradients_of_none(deep, labelled, kinds):
    found = []
    for checkpointing in (False, True):
        model = copy.deepcopy(deep).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**labelled, **WHOLE, vision_budget=kinds).loss.backward()
        layers = model.model.text_model.layers.named_parameters()
        found.append({name: weight.grad for name, weight in layers})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-5), name


@pytest.mark.parametrize("kinds", ["FCTF", "CCCC"])
def test_gates_of_the_relaxed_selection(make_model, deep, labelled, kinds):
    """As if every gate were added to the attention of a plain pass; the gradient reaches the selector."""
    model = copy.deepcopy(deep).train()
    model.config.pointer = "selector"
    budget = {"selection": "after_encoder", "min_visual_tokens": 5, "max_visual_tokens": 5}
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(model(**labelled, **budget, vision_budget=kinds).loss)
    assert losses[0] == losses[1]
    losses[0].backward()
    assert any(weight.grad.any() for weight in model.model.selector.parameters())
    torch.manual_seed(1)
    sharp = model(**labelled, **budget, vision_budget=kinds, gumbel_temperature=1e-6)
    torch.manual_seed(1)
    other = model(**labelled, **budget, vision_budget="FFFF", gumbel_temperature=1e-6)
    assert sharp.loss != other.loss and sharp.loss.isfinite()


def test_full_layers_with_gates_equal_the_gated_mask(deep, labelled):
    """The two ways to gate: 4D masks of the stock pass, and columns that carry their gates."""
    model = copy.deepcopy(deep).train()
    model.config.pointer = "selector"
    budget = {"selection": "after_encoder", "min_visual_tokens": 5, "max_visual_tokens": 5}
    torch.manual_seed(1)
    expected = model(**labelled, **budget, vision_budget="FFFF").loss
    torch.manual_seed(1)  # what the last layer makes of visual tokens, nothing reads
    assert torch.allclose(model(**labelled, **budget, vision_budget="FFFC").loss, expected, atol=1e-5)


@pytest.mark.parametrize("how", ["half", "autocast"])
def test_bfloat16(deep, batch, labelled, how):
    """A mixed batch answers, and every kind of layer trains, in bfloat16 weights and under autocast."""
    model = copy.deepcopy(deep)
    model = model.bfloat16() if how == "half" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert model.generate(**batch, **WHOLE, complexity=DEPTHS, max_new_tokens=2).shape[0] == 3
        expected = float(deep(**labelled, **WHOLE, vision_budget="FCTT").loss.detach())
        loss = model.train()(**labelled, **WHOLE, vision_budget="FCTT").loss
    assert float(loss.detach()) == pytest.approx(expected, rel=0.05)
    loss.backward()
    assert all(layer.mlp.up_proj.weight.grad.isfinite().all() for layer in model.model.text_model.layers)


# The fit


def test_labels_are_the_cheapest_that_suffice(deep, prepare, make_image, monkeypatch):
    monkeypatch.setattr(policy_qgsa, "ANSWER_TOKENS", 2)
    inputs = prepare(("what is it?", [make_image(0, 128, 64)]))
    ids = deep.generate(**inputs, vision_budget="FFFF", do_sample=False, max_new_tokens=2)
    labels = ids.clone()
    labels[:, : inputs["input_ids"].shape[1]] = -100
    texts = {"attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}
    asked = torch.nn.functional.pad(inputs["question_mask"], (0, ids.shape[1] - inputs["question_mask"].shape[1]))
    with torch.no_grad():
        read = [
            math.exp(-2 * deep(ids, **texts, question_mask=asked, labels=labels, vision_budget=kinds).loss)
            for kinds in SHORTLIST
        ]
    falls = sorted(read[-1] - each for each in read)
    tolerance = (falls[-2] + falls[-1]) / 2  # all but the worst suffice
    enough = [each >= read[-1] - tolerance for each in read]
    assert tolerance > 0 and enough.count(False) == 1
    found = observe_depth(deep, inputs, target=1 - tolerance)
    levels = [
        SHORTLIST.index(
            "".join(kind[0].upper() for kind in at([parse_schedule("", each, 4) for each in SHORTLIST], level / 8))
        )
        for level in range(9)
    ]
    assert found.enough == [enough[number] for number in levels]
    assert found.level == found.enough.index(True) and found.shares == sorted(found.shares)
    assert observe_depth(deep, inputs, target=1e-9).level == 0


def test_the_estimator_learns(deep):
    torch.manual_seed(0)
    width = deep.config.text_config.hidden_size
    questions = torch.randn(3, 1, 1, width)
    observed = []
    for number in range(90):
        kind = number % 3
        level = (0, 4, 8)[kind]
        enough = [each >= level for each in range(9)]
        noise = 0.1 * torch.randn(1, 1, width)
        observed.append(Observed(questions[kind] + noise, torch.randn(1, 1, width), level, [0.0] * 9, enough))
    logits = fit_estimator(ComplexityEstimator(deep.config), observed)
    right = [int(row.argmax()) == each.level for row, each in zip(logits, observed)]
    assert sum(right[::5]) >= 16  # of 18 held out


@pytest.mark.parametrize("pointer", ["attention", "selector"])
def test_fit_policy(deep, make_image, processor, pointer):
    model = copy.deepcopy(deep)
    model.config.pointer, model.config.vision_policy = pointer, False
    torch.nn.init.normal_(model.model.selector.cell_position)  # as if trained
    samples = [{"image": make_image(seed, 128, 64), "question": "what is it?"} for seed in range(10)]
    found = model.fit_policy(samples, processor)
    assert found["samples"] == 10 and found["held_out"] == 2
    assert 0 < found["vision_share"] <= 1 and 0 <= found["sufficient"] <= 1
    assert model.config.vision_policy and not model.training


def test_bad_fits_change_nothing(deep, make_image, processor):
    model = copy.deepcopy(deep)
    model.config.vision_policy = False
    samples = [{"image": make_image(seed, 128, 64), "question": "what is it?"} for seed in range(10)]
    for options, complaint in (
        ({"samples": samples[:9]}, r"samples \(9\) must be at least 10"),
        ({"samples": samples, "target": 0}, r"target \(0\) must be in \(0, 1\]"),
        ({"samples": [{"question": "?"}] * 10}, "sample 0 of 10"),
    ):
        with pytest.raises(ValueError, match=complaint):
            model.fit_policy(processor=processor, **options)
    for field, value, complaint in (
        ("vision_schedules", None, r"vision_schedules \(None\)"),
        ("selection", "dense", r'selection \("dense"\)'),
        ("vision_layers", ["full"] * 4, r"vision_layers \(full"),
    ):
        other = copy.deepcopy(model)
        setattr(other.config, field, value)
        with pytest.raises(ValueError, match=complaint):
            other.fit_policy(samples, processor)
    assert not model.config.vision_policy
