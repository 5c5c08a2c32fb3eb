"""The output folder: used by one run at a time, and never by a different one."""

import json
from contextlib import nullcontext

import pytest
from transformers import TrainingArguments

from training import run_qgsa
from training.cli.groups import FeatureArguments, ModelArguments, SelectionArguments, StandInArguments
from training.data.arguments import DataArguments
from training.learning.output import claimed, field_names, identity, last_checkpoint
from training.learning.training_arguments import LossArguments, QGSATrainingArguments
from training.run_stand_in import ADDED


WANTED = {"seed": 1, "dataset": "cards"}

# `run.json` of the demo as earlier versions wrote it, with the options of the stand-in next to those of run_qgsa.py.
FORMER_RUN = {
    "base_model": "hub_cards/tiny-dense",
    "longest_edge": 256,
    "random_weights": False,
    "dataset": "cards",
    "data_dir": None,
    "split_by": "published",
    "form": "multiple_choice",
    "train_split": "train",
    "train_size": 100000,
    "lora_rank": 8,
    "lora_targets": r".*text_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    "quantization": "none",
    "selection": "before_encoder",
    "min_visual_tokens": 8,
    "max_visual_tokens": 60,
    "min_tiles": 0,
    "max_tiles": 8,
    "clip_model": "local-dir:hub_cards/tiny-clip",
    "clip_pretrained": None,
    "words": "2x2:9600 2x2,3x3,4x4,4x4:12800",
    "tower_samples": 160000,
    "pictures": "4x4:8000",
    "validation_size": 400,
    "start_temperature": 1.0,
    "end_temperature": 0.1,
    "answer_weight": 1.0,
    "utility_weight": 1.0,
    "utility_temperature": 0.5,
    "attention_weight": 1.0,
    "attention_share": 0.25,
    "neutral_question": None,
    "contrastive_weight": 0.0,
    "patch_word_weight": 0.0,
    "patch_word_temperature": 0.5,
    "complexity_weight": 0.1,
    "complexity_learning_rate": 0.003,
    "adapter_learning_rate": 0.0003,
    "complexity_start": 0.3,
    "complexity_tolerance": 0.1,
    "target_visual_tokens": None,
    "budget_weight": 1.0,
    "seed": 1,
    "learning_rate": 0.0015,
    "per_device_train_batch_size": 24,
    "gradient_accumulation_steps": 1,
}


def test_a_run_may_go_on_in_its_folder(tmp_path):
    for _ in range(2):
        with claimed(tmp_path / "run", WANTED):
            pass
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == WANTED


@pytest.mark.parametrize("other", [{"seed": 2, "dataset": "cards"}, {"seed": 1}, WANTED | {"form": "x"}])
def test_the_folder_of_another_run_is_refused_and_left_as_it_is(other, tmp_path):
    with claimed(tmp_path, WANTED):
        (tmp_path / "results.json").write_text("figures")
    with pytest.raises(ValueError, match="belongs to a run with (seed 1, but this run has 2|dataset|form)"):
        with claimed(tmp_path, other):
            raise AssertionError("this must not be reached")
    assert (tmp_path / "results.json").read_text() == "figures"
    assert json.loads((tmp_path / "run.json").read_text()) == WANTED


def test_two_runs_at_once(tmp_path):
    with claimed(tmp_path, WANTED):
        with pytest.raises(ValueError, match=r"output_dir \(.*\): another run is writing to it"):
            with claimed(tmp_path, WANTED):
                raise AssertionError("this must not be reached")
        with claimed(tmp_path, WANTED, main_process=False):  # another process of the same run
            pass
    with claimed(tmp_path, WANTED):
        pass


def test_what_makes_a_run(tmp_path):
    def made(*groups, **arguments):
        return identity(list(groups), QGSATrainingArguments(str(tmp_path), use_cpu=True, **arguments))

    same = made(DataArguments(), SelectionArguments(), FeatureArguments())
    assert json.loads(json.dumps(same)) == same
    free = (
        DataArguments(test_size=3, eval_split="validation"),
        SelectionArguments(),
        FeatureArguments("somewhere", 1.0),
    )
    assert made(*free, logging_steps=3, max_steps=7) == same
    for other in (
        made(DataArguments(dataset="vqa_rad"), SelectionArguments(), FeatureArguments()),
        made(DataArguments(), SelectionArguments(max_tiles=2), FeatureArguments()),
        made(DataArguments(), SelectionArguments(), FeatureArguments(), seed=3),
        made(DataArguments(), SelectionArguments(), FeatureArguments(), utility_weight=0.0),
    ):
        assert other != same


@pytest.fixture
def demo(tmp_path):
    """The identity of the demo, with some options changed."""

    def make(base_model="hub_cards/tiny-dense", max_tiles=8):
        args = QGSATrainingArguments(
            str(tmp_path),
            use_cpu=True,
            seed=1,
            learning_rate=1.5e-3,
            per_device_train_batch_size=24,
            complexity_start=0.3,
        )
        budget = SelectionArguments(min_visual_tokens=8, max_visual_tokens=60, max_tiles=max_tiles)
        features = FeatureArguments(clip_model="local-dir:hub_cards/tiny-clip")
        return identity([ModelArguments(base_model=base_model), DataArguments(), budget, features], args)

    return make


def test_a_run_of_an_earlier_version_may_go_on(demo, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(FORMER_RUN))
    with claimed(tmp_path, demo(), former=field_names(StandInArguments), added=run_qgsa.ADDED):
        pass
    assert json.loads((tmp_path / "run.json").read_text()) == demo()
    assert FORMER_RUN.keys() - demo().keys() == field_names(StandInArguments) - ADDED.keys()


@pytest.mark.parametrize("change", [{"max_tiles": 2}, {"base_model": "outputs/other"}])
def test_a_different_run_of_an_earlier_version_is_refused(change, demo, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(FORMER_RUN))
    with pytest.raises(ValueError, match=f"belongs to a run with {next(iter(change))}"):
        with claimed(tmp_path, demo(**change), former=field_names(StandInArguments), added=run_qgsa.ADDED):
            raise AssertionError("this must not be reached")
    assert json.loads((tmp_path / "run.json").read_text()) == FORMER_RUN


@pytest.mark.parametrize(("pictures", "same"), [("4x4:8000", True), ("4x4:16", False)])
def test_a_stand_in_of_an_earlier_version(pictures, same, tmp_path):
    former = field_names(ModelArguments, SelectionArguments, FeatureArguments, LossArguments)
    args = TrainingArguments(str(tmp_path), use_cpu=True, seed=1, learning_rate=1.5e-3, per_device_train_batch_size=24)
    wanted = identity([StandInArguments(pictures=pictures), DataArguments()], args)
    (tmp_path / "run.json").write_text(json.dumps(FORMER_RUN | {"base_model": "tiny"}))
    with nullcontext() if same else pytest.raises(ValueError, match="belongs to a run with pictures"):
        with claimed(tmp_path, wanted, former=former, added=ADDED):
            pass
    assert (json.loads((tmp_path / "run.json").read_text()) == wanted) is same


def test_the_last_complete_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step, complete in ((9, True), (10, True), (11, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize(
    "saved, free",
    [(None, True), ("checkpoint-2", False), ("distillation/checkpoint-2", False), ("model.safetensors", False)],
)
def test_a_run_that_fails_before_it_saves_anything_leaves_the_folder_to_others(saved, free, tmp_path):
    with pytest.raises(OSError):
        with claimed(tmp_path, WANTED):
            if saved:
                (tmp_path / saved).mkdir(parents=True)
            raise OSError("no such data")
    assert (tmp_path / "run.json").exists() is not free
