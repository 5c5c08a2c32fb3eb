"""Presets: how they are read, and that every one of them is understood."""

import pytest
import torch
import yaml
from transformers import TrainingArguments

from training.cli.groups import AnswerArguments, StandInArguments
from training.cli.presets import (
    PRESETS,
    SCRIPTS,
    STAND_IN_PRESETS,
    VISOR_PRESETS,
    as_options,
    load_presets,
    parse_arguments,
    read_preset,
)
from training.data.arguments import DataArguments
from training.data.sets import DATASETS
from training.evaluation.systems import choose_systems
from training.learning.training_arguments import GROUPS, QGSATrainingArguments
from training.run_visor import parse as parse_visor
from training.standins.dense import parse_stages


KINDS = (*GROUPS, QGSATrainingArguments)
STAND_IN_KINDS = (StandInArguments, DataArguments, AnswerArguments, TrainingArguments)
SIZES = {f"{data}_{size}" for data in ("vqa_rad", "aokvqa", "refcoco") for size in ("256m", "500m")}


def parse(*arguments):
    return parse_arguments([*arguments, "--use_cpu", "true"], "", KINDS)


def test_the_command_line_wins_over_the_preset():
    _, _, data, *_, args = parse(
        "--preset", "demo", "--max_steps", "3", "--test_size", "8", "--output_dir", "elsewhere"
    )
    assert (args.max_steps, data.test_size, args.output_dir) == (3, 8, "elsewhere")
    _, _, data, *_, args = parse("--preset", "demo")
    assert (args.max_steps, data.test_size, args.output_dir) != (3, 8, "elsewhere")


def test_the_command_line_wins_over_the_lists_of_the_preset():
    *_, evaluation, _, _ = parse("--preset", "demo", "--systems", "dense", "qgsa")
    assert evaluation.systems == ["dense", "qgsa"]


def test_the_preset_wins_over_the_defaults():
    _, _, data, *_ = parse("--preset", "vqa_rad_256m")
    assert data.dataset == "vqa_rad" != DataArguments.dataset


@pytest.mark.parametrize("form", [["--preset", "vqa_rad_256m"], ["--preset=vqa_rad_256m"]])
def test_both_forms_of_naming_a_preset(form):
    name, arguments = read_preset(["--max_steps", "3", *form, "--seed=4"])
    assert name == "vqa_rad_256m"
    assert arguments[-3:] == ["--max_steps", "3", "--seed=4"]
    assert not any("preset" in argument for argument in arguments)
    assert arguments[arguments.index("--dataset") + 1] == "vqa_rad"


def test_without_a_preset_it_is_the_default():
    assert read_preset([])[0] == "demo"
    assert read_preset([], STAND_IN_PRESETS, "tiny_dense")[0] == "tiny_dense"


@pytest.mark.parametrize("name", ["dmeo", "../presets/demo", "", "vqa_rad", "vqa_rad_2b"])
def test_an_unknown_preset_names_the_known_ones(name):
    with pytest.raises(SystemExit) as error:
        read_preset(["--preset", name])
    message = str(error.value)
    assert f"unknown preset {name!r}" in message
    assert all(preset in message for preset in SIZES | {"blocks", "demo", "vqa_rad_tiny"})


def test_the_preset_of_another_script_is_refused_by_name():
    with pytest.raises(SystemExit, match="preset 'demo' belongs to another script: run_qgsa.py"):
        read_preset(["--preset", "demo"], STAND_IN_PRESETS, "tiny_dense")


def test_the_values_of_a_size_win_over_those_of_the_file(tmp_path):
    content = {"learning_rate": 0.1, "systems": ["dense", "qgsa"], "sizes": {"1b": {"learning_rate": 0.2}, "2b": {}}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "y.yaml").write_text("seed: 3")
    presets = load_presets(tmp_path)
    assert list(presets) == ["x_1b", "x_2b", "y"]
    assert [presets[name].get("learning_rate") for name in presets] == [0.2, 0.1, None]
    assert as_options(presets["x_1b"]) == ["--learning_rate", "0.2", "--systems", "dense", "qgsa"]


def test_sizes_differ_in_the_model_the_batches_and_the_folder_only():
    presets = load_presets()
    assert SIZES <= presets.keys()
    for data in ("vqa_rad", "aokvqa", "refcoco"):
        small, large = (presets[f"{data}_{size}"] for size in ("256m", "500m"))
        assert small.keys() == large.keys()
        differing = {name for name in small if small[name] != large[name]}
        batch = {"per_device_train_batch_size", "gradient_accumulation_steps"}
        assert differing == {"base_model", "output_dir"} | batch
        for values in (small, large):
            assert values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] == 16


@pytest.mark.parametrize("name", load_presets())
def test_every_preset_is_understood(name):
    preset, model, data, selection, evaluation, features, args = parse("--preset", name)
    assert preset == name
    assert model.base_model and features.clip_model
    assert (data.eval_split == "validation") == (data.dataset == "aokvqa"), "test unless its answers are not published"
    assert data.dataset in DATASETS
    assert args.output_dir.startswith("outputs/")
    assert 0 < selection.min_visual_tokens <= selection.max_visual_tokens
    assert 0 <= selection.min_tiles <= selection.max_tiles
    assert evaluation.systems[0] == "dense"
    choose_systems(evaluation.systems, None, None)


@pytest.mark.parametrize("name", load_presets(STAND_IN_PRESETS))
def test_every_preset_of_the_stand_in_is_understood(name):
    arguments = ["--preset", name, "--use_cpu", "true"]
    preset, stand_in, data, _, args = parse_arguments(arguments, "", STAND_IN_KINDS, folder=STAND_IN_PRESETS)
    assert preset == name
    assert data.dataset in DATASETS and data.eval_split == "test"
    assert args.output_dir.startswith("outputs/")
    if data.dataset == "cards":
        assert parse_stages(stand_in.words, args.per_device_train_batch_size)
        assert parse_stages(stand_in.pictures, args.per_device_train_batch_size)


@pytest.mark.parametrize("name", load_presets(VISOR_PRESETS))
def test_every_preset_of_visor_is_understood(name):
    preset, visor, data, args = parse_visor(["--preset", name, "--use_cpu", "true"])
    assert preset == name and data.dataset == "cards" and args.output_dir.startswith("outputs/")
    assert visor.base_model and visor.shares[-1] == 1 and args.max_steps > 0


def test_the_training_arguments_suit_our_collators():
    *_, args = parse("--preset", "demo", "--report_to", "tensorboard")
    assert args.remove_unused_columns is False and args.report_to == []
    *_, args = parse_arguments(["--preset", "demo"], "", KINDS)
    assert args.dataloader_pin_memory == torch.accelerator.is_available(), "without one, DataLoader warns"


def test_files_and_names_agree():
    assert {path.parent for path in PRESETS.rglob("*.yaml")} == set(SCRIPTS)
    names = [name for folder in SCRIPTS for name in load_presets(folder)]
    assert len(names) == len(set(names))
