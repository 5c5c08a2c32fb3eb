"""The promises of the model on an accelerator, in the precision that is used there."""

import copy

import pytest
import torch

from modeling_qgsa import QGSASmolVLMForConditionalGeneration, VisualCache
from training.costs.counter import count_flops


pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
SELECTIONS = ("before_encoder", "after_encoder", "blocks")
BUDGET = {"min_tiles": 2, "max_tiles": 2, "min_visual_tokens": 20, "max_visual_tokens": 20}


@pytest.fixture(scope="module")
def device():
    return torch.accelerator.current_accelerator()


@pytest.fixture(scope="module", params=["selector", "attention"])
def pair(request, device, make_model):
    """The same model on the CPU and on the accelerator, in float32."""
    model = make_model(pointer=request.param, **BUDGET)
    return model, copy.deepcopy(model).to(device)


def moved(inputs, device):
    return {name: value.to(device) for name, value in inputs.items()}


def answer(model, inputs, **options):
    return model.generate(**moved(inputs, model.device), do_sample=False, max_new_tokens=6, **options).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_is_stock_bit_for_bit(dtype, device, make_dense, make_model, batch, stock_inputs):
    dense = make_dense()
    model = make_model(dense).to(device, dtype)
    dense = dense.to(device, dtype)
    with torch.no_grad():
        expected = dense(**moved(stock_inputs(batch), device)).logits
        found = model(**moved(batch, device), selection="dense").logits
    real = batch["attention_mask"].bool()
    assert torch.equal(found.cpu()[real], expected.cpu()[real])
    assert torch.equal(answer(model, batch, selection="dense"), answer(dense, stock_inputs(batch)))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_cpu_chooses_and_answers_alike(selection, pair, batch, device):
    ours, moved_there = pair
    here = ours.select(**batch, selection=selection)
    there = moved_there.select(**moved(batch, device), selection=selection)
    assert torch.equal(here.keep_indices, there.keep_indices.cpu())
    assert torch.allclose(here.relevance, there.relevance.cpu(), atol=1e-3)
    assert torch.equal(answer(ours, batch, selection=selection), answer(moved_there, batch, selection=selection))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_batched_equals_single(selection, pair, prepare, samples, batch):
    model = pair[1]
    together = answer(model, batch, selection=selection)[:, -6:]
    apart = [answer(model, prepare(sample), selection=selection)[:, -6:] for sample in samples]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize(
    "options",
    [
        {"vision_budget": "FC"},
        {"max_image_tokens": 16},
        {"positions_per_image": 30},
        {"use_cache": False},
        {"glance_downscale": 2},
        {"positions": "compact"},
    ],
)
def test_options_give_what_they_give_on_the_cpu(options, device, make_model, batch):
    fields = {name: options[name] for name in ("glance_downscale", "positions") if name in options}
    model = make_model(**BUDGET, **fields)
    options = {name: value for name, value in options.items() if name not in fields}
    expected = answer(model, batch, **options)
    assert torch.equal(answer(model.to(device), batch, **options), expected)


def test_a_cache_of_encoded_tiles_gives_the_same(pair, single):
    model, cache = pair[1], VisualCache()
    expected = answer(model, single)
    assert torch.equal(answer(model, single, visual_cache=cache), expected)
    assert torch.equal(answer(model, single, visual_cache=cache), expected)


def test_lazy_tiles_give_the_same(pair, prepare, samples, batch):
    model = pair[1]
    lazy = prepare(*samples, lazy_tiles=True)
    tiles = {name: value for name, value in lazy.items() if not isinstance(value, torch.Tensor)}
    given = moved({name: value for name, value in lazy.items() if name not in tiles}, model.device) | tiles
    ids = model.generate(**given, do_sample=False, max_new_tokens=6)
    assert torch.equal(ids.cpu(), answer(model, batch))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_step_of_training_in_bfloat16(selection, device, make_model, labelled):
    model = make_model(selection=selection).to(device).train()
    with torch.autocast(device.type, torch.bfloat16):
        loss = model(**moved(labelled, device)).loss
    loss.backward()
    gradients = [weight.grad for weight in model.model.selector.parameters() if weight.grad is not None]
    assert loss.isfinite() and gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_losses_are_those_of_the_cpu(device, make_model, labelled):
    model = make_model().eval()
    expected = model(**labelled).loss
    assert torch.allclose(model.to(device)(**moved(labelled, device)).loss.cpu(), expected, atol=1e-4)


def test_tuning_measures_the_accelerator(device, make_model, batch, capsys, tmp_path):
    model = make_model().to(device)
    model.tune(saved=tmp_path / "tuning.json")
    assert "encoder tuned: " in capsys.readouterr().out and (tmp_path / "tuning.json").is_file()
    assert answer(model, batch).shape[0] == len(batch["input_ids"])


def test_calibration_runs_there(device, make_dense, tokenizer, processor, make_image):
    model = QGSASmolVLMForConditionalGeneration.from_dense(make_dense(), tokenizer).eval().to(device)
    samples = [{"image": make_image(seed), "question": "where is the blue card?"} for seed in range(12)]
    record = model.calibrate(samples, processor)
    assert record == model.config.calibration and model.device.type == device.type


def test_the_flops_counted_are_those_of_the_cpu(pair, single, device):
    counted = [count_flops(model, moved(single, model.device), 3) for model in pair]
    assert counted[0] == counted[1]
