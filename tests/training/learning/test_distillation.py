"""Distillation of the smaller glance: what it teaches, what it leaves alone, and that it resumes."""

from types import SimpleNamespace

import pytest
import torch

from training.cli.groups import FeatureArguments, ModelArguments, SelectionArguments
from training.data.cards import Cards
from training.learning.distillation import GlanceCollator, GlanceDistillation, distil_glance, relative_error
from training.learning.train import check_training, train_selection
from training.learning.training_arguments import QGSATrainingArguments


@pytest.fixture
def samples():
    return Cards("train", 8, seed=3)


@pytest.fixture
def pixels(processor, samples):
    """Pixels of four global views, and of a tile of each image."""
    torch.manual_seed(0)
    return GlanceCollator(processor)([samples[index] for index in range(4)])


@pytest.fixture
def make_args(tmp_path):
    def make(**changes):
        given = {
            "max_steps": 1,
            "distillation_steps": 20,
            "distillation_learning_rate": 3e-3,
            "per_device_train_batch_size": 4,
            "train_sampling_strategy": "sequential",
            "save_steps": 10,
            "logging_steps": 5,
        } | changes
        return QGSATrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            **given,
        )

    return make


def errors_of(student, pixels):
    with torch.no_grad():
        return {name: error.item() for name, error in student(**pixels).items()}


def test_a_relative_error_is_zero_for_equal_features_and_one_for_zeros():
    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert relative_error(features, features) == 0
    assert relative_error(0 * features, features) == 1
    assert relative_error(1.5 * features, features) == pytest.approx(0.25)


def test_the_global_view_is_the_glance_and_the_tile_is_another_one(processor, samples):
    torch.manual_seed(1)
    batch = GlanceCollator(processor)([samples[0], samples[1]])
    for row in range(2):
        every = processor.image_processor([[samples[row]["image"]]], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(batch["glances"][row], every[-1])
        assert any(torch.equal(batch["tiles"][row], tile) for tile in every[:-1])


def test_an_image_that_is_not_split_has_its_global_view_twice():
    only = torch.rand(1, 1, 3, 8, 8)
    batch = GlanceCollator(SimpleNamespace(image_processor=lambda *_, **__: {"pixel_values": only}))([{"image": None}])
    assert torch.equal(batch["glances"], only[0])
    assert torch.equal(batch["tiles"], only[0])


def test_before_the_first_step_tiles_are_those_of_the_teacher(make_model, pixels):
    errors = errors_of(GlanceDistillation(make_model(glance_downscale=2).model), pixels)
    assert errors["tile_error"] == pytest.approx(0, abs=1e-10)
    assert errors["glance_error"] > 1e-3
    assert errors["loss"] == pytest.approx(errors["glance_error"] + errors["tile_error"])


def test_a_glance_at_its_own_size_has_no_error(make_model, pixels):
    errors = errors_of(GlanceDistillation(make_model(glance_downscale=1).model), pixels)
    assert errors["glance_error"] == pytest.approx(0, abs=1e-10)


def test_the_smaller_glance_comes_closer_and_nothing_but_the_encoder_changes(
    make_model, processor, samples, pixels, make_args
):
    model = make_model(glance_downscale=2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    judge = GlanceDistillation(make_model(glance_downscale=2).model)  # its teacher is the encoder before
    wrong = errors_of(judge, pixels)["glance_error"]
    distil_glance(model, processor, samples, make_args())
    judge.student = model.model
    after = errors_of(judge, pixels)
    assert after["glance_error"] < 0.7 * wrong
    assert after["tile_error"] < 0.3 * wrong
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert all(name.startswith(("model.vision_model.", "model.connector.")) for name in changed)
    assert not model.training
    assert all(weight.requires_grad for weight in model.parameters())


def test_it_trains_under_autocast(make_model, processor, samples, pixels, make_args):
    model = make_model(glance_downscale=2)
    before = errors_of(GlanceDistillation(make_model(glance_downscale=2).model), pixels)
    judge = GlanceDistillation(make_model(glance_downscale=2).model)
    distil_glance(model, processor, samples, make_args(bf16=True))
    judge.student = model.model
    assert errors_of(judge, pixels)["glance_error"] < 0.7 * before["glance_error"]
    assert model.dtype == torch.float32


def test_it_continues_from_its_last_checkpoint(make_model, processor, samples, make_args):
    whole = make_model(glance_downscale=2)
    distil_glance(whole, processor, samples, make_args())
    again = make_model(glance_downscale=2)
    with torch.no_grad():
        again.model.connector.modality_projection.proj.weight.mul_(2)
    distil_glance(
        again, processor, samples, make_args()
    )  # all steps are done: only the checkpoint can make them equal
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


def test_training_starts_with_it_and_leaves_the_dense_model_alone(make_dense, processor, samples, make_args, tmp_path):
    dense = make_dense()
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    selection = SelectionArguments(min_visual_tokens=8, max_visual_tokens=16, glance_downscale=2)
    tuned = train_selection(
        dense, processor, samples, ModelArguments(lora_rank=2), selection, FeatureArguments(), make_args()
    )
    assert (tmp_path / "distillation" / "checkpoint-20").is_dir()
    assert all(torch.equal(weight, before[name]) for name, weight in dense.state_dict().items())
    own = tuned.model.vision_model.state_dict()
    assert any(not torch.equal(weight, dense.model.vision_model.state_dict()[name]) for name, weight in own.items())


def test_a_whole_glance_needs_no_distillation(make_args):
    with pytest.raises(ValueError, match=r"distillation_steps \(20\).*glance_downscale is 1"):
        check_training(SelectionArguments(), FeatureArguments(), make_args())
    check_training(SelectionArguments(glance_downscale=2), FeatureArguments(), make_args())
    check_training(SelectionArguments(), FeatureArguments(), make_args(distillation_steps=0))


def test_a_negative_number_of_steps_is_refused(make_args):
    with pytest.raises(ValueError, match=r"distillation_steps \(-1\): must be at least 0"):
        check_training(SelectionArguments(glance_downscale=2), FeatureArguments(), make_args(distillation_steps=-1))
