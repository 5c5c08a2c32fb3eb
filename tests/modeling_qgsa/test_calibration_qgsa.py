"""Calibration: its arithmetic on made-up observations, its promises on a random model."""

import copy
import dataclasses
import json

import pytest
import torch

import modeling_qgsa.calibration_qgsa as calibration
from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from modeling_qgsa.calibration_qgsa import (
    Observation,
    Spending,
    Trials,
    bootstrap_interval,
    check_promise,
    choose_spending,
    cross_fitted_scores,
    describe,
    fit_weights,
    measure,
    observe,
    prepare,
    scores_of,
)
from modeling_qgsa.layout_qgsa import VisualLayout, tile_relevance


@pytest.fixture(scope="module")
def samples(make_image):
    """Questions about images of 4 x 4, 2 x 4 and 4 x 2 tiles."""
    shapes = [(256, 256), (256, 128), (128, 256), (256, 256), (256, 128)]
    words = ("what shape is on the red card?", "where is the blue card?", "how many cards are there?")
    return [{"image": make_image(number, *shapes[number % 5]), "question": words[number % 3]} for number in range(12)]


@pytest.fixture
def untrained(make_dense, tokenizer):
    torch.manual_seed(0)
    return QGSASmolVLMForConditionalGeneration.from_dense(make_dense(), tokenizer).eval()


@pytest.fixture(scope="module")
def made(make_dense, tokenizer, processor, samples):
    """Made-up observations: in layer 1 the answer's row points at the useful tile, all else is noise."""
    model = QGSASmolVLMForConditionalGeneration.from_dense(make_dense(), tokenizer).eval()
    generator = torch.Generator().manual_seed(0)
    observations = []
    for inputs in prepare(samples, processor):
        ids = inputs["input_ids"]
        layout = VisualLayout.of(model.config, ids)
        maps = torch.rand(1, 2, 2, 16, generator=generator)
        cell = int(torch.randint(16, (), generator=generator))
        maps[0, 1, 1, cell] += 6
        maps = maps / maps.sum(-1, keepdim=True)
        utility = 4 * tile_relevance(maps[:, 1, 1], layout) / tile_relevance(maps[:, 1, 1], layout).max()
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 1, -100)
        features = torch.zeros(len(layout.tile_row), 16, model.config.text_config.hidden_size)
        utility = utility.masked_fill(layout.is_global, float("-inf"))
        observations.append(Observation(ids, labels, features, maps, utility, -0.1))
    return model, observations


def fields_of(observation):
    return {each.name: getattr(observation, each.name) for each in dataclasses.fields(observation)}


def test_weights_find_the_row_that_points(made):
    model, observations = made
    weights = torch.tensor(fit_weights(observations, model.config))
    assert weights.shape == (2, 2)
    assert weights[1, 1] > 5 * weights.flatten()[:3].abs().max()


def test_relevance_is_the_share_of_utility(made, monkeypatch):
    """Without a penalty, the relevance of the tiles is as sharp as what they add to the answer."""
    model, observations = made
    monkeypatch.setattr(calibration, "PENALTY", 1e-3)
    found = []
    for factor in (1.0, 0.3):
        softer = [Observation(**{**fields_of(each), "utility": each.utility * factor}) for each in observations]
        scores = scores_of(softer, fit_weights(softer, model.config))
        trials = Trials(model, softer, scores)
        for number, each in enumerate(softer):
            tiles = ~trials.layouts[number].is_global
            found.append((factor, trials.mass(number, 1.0)[tiles].max(), each.utility[tiles].softmax(0).max()))
    for factor in (1.0, 0.3):
        ours, wanted = (torch.stack([each[part] for each in found if each[0] == factor]).mean() for part in (1, 2))
        assert ours == pytest.approx(float(wanted), abs=0.1)


def test_scores_of_a_sample_do_not_depend_on_it(made):
    model, observations = made
    other = Observation(**{**fields_of(observations[3]), "utility": -observations[3].utility.nan_to_num(neginf=4.0)})
    changed = [*observations[:3], other, *observations[4:]]
    before, after = (cross_fitted_scores(each, model.config) for each in (observations, changed))
    assert torch.equal(before[3], after[3]) and not torch.equal(before[4], after[4])


def test_guesses_do_not_count(made):
    """An answer that the dense model does not believe in teaches nothing, whatever the tiles do to it."""
    model, observations = made
    weights = fit_weights(observations, model.config)
    guess = copy.copy(observations[0])
    guess = Observation(
        *(getattr(guess, name) for name in ("input_ids", "labels", "features", "maps")),
        -guess.utility.nan_to_num(neginf=float("inf")),
        -40.0,
    )
    assert torch.allclose(
        torch.tensor(fit_weights([*observations, guess], model.config)), torch.tensor(weights), rtol=0.05, atol=0.05
    )


def test_the_cheapest_budget_that_agrees_is_chosen(made, monkeypatch):
    """If each answer needs three tiles, three are chosen; if all of them, nothing below dense is."""
    model, observations = made
    scores = scores_of(observations, fit_weights(observations, model.config))
    monkeypatch.setattr(Trials, "agrees", lambda self, number, tiles, _: int(tiles) >= 3)
    trials = Trials(model, observations, scores)
    spent = choose_spending(trials, 1.0)
    assert int(torch.cat(trials.tiles(spent)).min()) == 3
    measured = describe([measure(trials, spent)] * 2)
    assert measured["loyalty"] == measured["loyalty_unweighted"] == 1 and measured["held_out_samples"] == 24
    monkeypatch.setattr(Trials, "agrees", lambda self, number, tiles, _: tiles >= self.layouts[number].grids.prod())
    assert choose_spending(Trials(model, observations, scores), 1.0) is None
    monkeypatch.setattr(Trials, "agrees", lambda *_: False)
    assert choose_spending(Trials(model, observations, scores), 0.5) is None


def test_a_question_about_nothing_gets_no_tiles(made, monkeypatch):
    """Where the tiles are alike and none is needed, looking nowhere has a score, and pointed questions keep tiles."""
    model, observations = made
    blind = [
        Observation(**{**fields_of(each), "maps": torch.full_like(each.maps, 1 / 16)}) for each in observations[:6]
    ]
    weights = fit_weights(observations, model.config)
    trials = Trials(model, [*blind, *observations[6:]], scores_of([*blind, *observations[6:]], weights))
    monkeypatch.setattr(Trials, "agrees", lambda self, number, tiles, _: number < 6 or int(tiles) >= 1)
    spent = choose_spending(trials, 1.0)
    tiles = torch.cat(trials.tiles(spent))
    assert spent.nowhere is not None
    assert int(tiles[:6].max()) < 16 * spent.coverage and int(tiles[6:].min()) >= 1


def test_loyalty_stops_where_it_cannot_be_reached(made, monkeypatch):
    model, observations = made
    asked = []
    monkeypatch.setattr(Trials, "agrees", lambda self, number, *_: bool(asked.append(number)))
    trials = Trials(model, observations, scores_of(observations, fit_weights(observations, model.config)))
    assert trials.loyalty(Spending(1.0, 0.5, None), target=0.85) is None
    assert len(asked) == 2  # 1.45 of twelve may differ
    assert trials.loyalty(Spending(1.0, 0.5, None)).tolist() == [False] * 12


def test_the_interval_is_that_of_the_weights():
    agreed = torch.tensor([True] * 90 + [False] * 10)
    low, high = bootstrap_interval(agreed, torch.ones(100, dtype=torch.float64))
    assert 0.8 < low < 0.88 and 0.92 < high < 0.99
    ignored = torch.where(agreed, 1.0, 0.0).double()
    assert bootstrap_interval(agreed, ignored) == [1, 1]


# On a random model


@torch.no_grad()
def test_an_observation_is_what_the_model_does(untrained, processor, samples):
    (inputs,) = prepare(samples[:1], processor)
    seen = observe(untrained, inputs)
    dense = untrained.generate(**inputs, selection="dense", max_new_tokens=16, do_sample=False)
    assert torch.equal(seen.input_ids, dense)
    assert seen.features.shape[:2] == (17, 16) and seen.maps.shape == (1, 2, 2, 16)
    logits = untrained(**{**inputs, "input_ids": dense, "attention_mask": torch.ones_like(dense)}, selection="dense")
    new = dense[0, inputs["input_ids"].shape[1] :]
    scores = logits.logits[0, -len(new) - 1 : -1].log_softmax(-1)
    assert seen.dense == pytest.approx(float(scores.gather(1, new[:, None]).sum()), abs=1e-3)
    assert seen.utility.isfinite().tolist() == [True] * 16 + [False]


def test_what_is_counted_as_agreement_is_what_users_get(untrained, processor, samples):
    """The teacher-forced trial of a budget, against `generate` with the calibrated config."""
    untrained.calibrate(samples, processor, target_loyalty=0.3)
    record, config = check_promise(untrained, samples, processor), untrained.config
    same = []
    for inputs in prepare(samples, processor):
        options = {"max_new_tokens": 16, "do_sample": False}
        dense = untrained.generate(**inputs, selection="dense", **options)
        same.append(torch.equal(dense, untrained.generate(**inputs, selection="before_encoder", **options)))
    if config.selection != "dense":
        assert sum(same) / len(same) == pytest.approx(record["loyalty_unweighted"])


def test_the_config_is_written_and_saved(untrained, processor, samples, tmp_path):
    untrained.train()
    record = untrained.calibrate(samples, processor, target_loyalty=0.5)
    assert untrained.training
    config = untrained.config
    assert config.pointer == "attention" and len(config.attention_weights) == 2
    assert (config.min_tiles, config.max_tiles) == (0, 36)
    assert (config.min_visual_tokens, config.max_visual_tokens) == (16, 37 * 16)
    assert record["samples"] == 12 and record["held_out_samples"] == 12 and record["target_loyalty"] == 0.5
    low, high = record["loyalty_ci95"]
    assert 0 <= low <= record["loyalty"] <= high <= 1
    untrained.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["calibration"] == record
    loaded = QGSASmolVLMForConditionalGeneration.from_pretrained(tmp_path)
    (inputs,) = prepare(samples[:1], processor)
    options = {"selection": "before_encoder"}
    assert torch.equal(
        loaded.select(**inputs, **options).kept_tokens, untrained.eval().select(**inputs, **options).kept_tokens
    )


def test_a_promise_is_checked_on_calibrated_models_only(untrained, processor, samples):
    with pytest.raises(ValueError, match=r"attention_weights \(None\): the model was not calibrated"):
        check_promise(untrained, samples, processor)


def test_it_says_so_where_the_promise_cannot_be_kept(untrained, processor, samples, monkeypatch):
    monkeypatch.setattr(Trials, "agrees", lambda *_: False)
    record = untrained.calibrate(samples, processor)
    assert record["dense"] and untrained.config.selection == "dense"


def test_an_interrupted_calibration_changes_nothing_and_continues(
    untrained, processor, samples, tmp_path, tiles_encoded
):
    before = untrained.config.to_dict()
    broken = [*samples[:8], {"image": None, "question": "?"}, *samples[9:]]
    with pytest.raises(ValueError, match="sample 8 of 12 cannot be read"):
        untrained.calibrate(broken, processor, folder=tmp_path)
    assert untrained.config.to_dict() == before
    assert len(list(tmp_path.glob("*.pt"))) == 8 and not list(tmp_path.glob("*.part"))
    with tiles_encoded(untrained) as counts:
        record = untrained.calibrate(samples, processor, folder=tmp_path)
    assert len(counts) == 4
    again = copy.deepcopy(untrained)
    again.config.attention_weights = None
    assert again.calibrate(samples, processor) == record


def test_another_model_observes_anew(untrained, processor, samples, tmp_path, tiles_encoded):
    untrained.calibrate(samples, processor, folder=tmp_path)
    with torch.no_grad():
        untrained.model.text_model.norm.weight.mul_(1.01)
    with tiles_encoded(untrained) as counts:
        untrained.calibrate(samples, processor, folder=tmp_path)
    assert len(counts) == 12


@pytest.mark.parametrize("loyalty", [0, -0.1, 1.2])
def test_a_loyalty_that_is_no_share_is_refused(untrained, processor, samples, loyalty):
    with pytest.raises(ValueError, match=rf"target_loyalty \({loyalty}\) must be in \(0, 1\]"):
        untrained.calibrate(samples, processor, target_loyalty=loyalty)


def test_too_few_samples_are_refused(untrained, processor, samples):
    with pytest.raises(ValueError, match=r"samples \(7\) must be at least 8: half of them fit 4 weights"):
        untrained.calibrate(samples[:7], processor)


def test_images_of_one_tile_are_refused(untrained, processor, make_image):
    small = [{"image": make_image(number, 64, 64), "question": "what is it?"} for number in range(8)]
    before = untrained.config.to_dict()
    with pytest.raises(ValueError, match=r"samples \(8\): every image has one tile only"):
        untrained.calibrate(small, _without_splitting(processor))
    assert untrained.config.to_dict() == before


def _without_splitting(processor):
    processor = copy.deepcopy(processor)
    processor.image_processor.do_image_splitting = False
    return processor


def test_the_time_is_estimated_first(untrained, processor, samples, caplog, monkeypatch):
    said = []
    monkeypatch.setattr(calibration.logger, "warning", said.append)
    untrained.calibrate(samples, processor, target_loyalty=0.3)
    assert said[0].startswith("calibration: about ") and said[0].endswith("minutes for 12 samples")
