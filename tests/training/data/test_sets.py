"""The list of data sets, and the samples that the options ask for."""

import re
from pathlib import Path

import pytest
import yaml

from training.data.arguments import DataArguments
from training.data.sets import DATASETS, get_dataset, load_data, load_eval


PRESETS = Path(__file__).parents[3] / "training" / "presets"


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_is_found_by_its_name(name):
    assert get_dataset(name) is DATASETS[name]
    assert get_dataset(name).name == name
    assert get_dataset(name).graded_by


def test_an_unknown_data_set_lists_the_names():
    for load in (get_dataset, lambda name: load_data(DataArguments(name), seed=0)):
        with pytest.raises(ValueError, match=r"dataset \('imagenet'\): choose from cards, vqa_rad, aokvqa, refcoco"):
            load("imagenet")


def test_the_help_names_every_data_set():
    named = DataArguments.__dataclass_fields__["dataset"].metadata["help"]
    assert re.findall(r"\w+", named.partition(":")[2].replace(" or ", " ")) == list(DATASETS)


@pytest.mark.parametrize("name", DATASETS)
def test_presets_evaluate_what_harnesses_evaluate(name):
    presets = [yaml.safe_load(path.read_text()) for path in PRESETS.glob("*.yaml")]
    published = [preset for preset in presets if preset.get("dataset", "cards") == name and "split_by" not in preset]
    defaults = {"eval_split": DataArguments.eval_split, "test_size": DataArguments.test_size}
    evaluated = {((defaults | preset)["eval_split"], (defaults | preset)["test_size"]) for preset in published}
    assert evaluated == {(get_dataset(name).eval_split, get_dataset(name).eval_size)}


def test_training_cards_depend_on_the_seed_and_evaluated_ones_do_not():
    arguments = DataArguments(train_size=7, test_size=5)
    (train, test), (other_train, other_test) = (load_data(arguments, seed) for seed in (1, 2))
    assert (len(train), len(test)) == (7, 5)
    assert train[0]["image"].tobytes() != other_train[0]["image"].tobytes()
    assert test[0]["image"].tobytes() == other_test[0]["image"].tobytes() == load_eval(arguments)[0]["image"].tobytes()


def test_canvases_of_training_leave_the_evaluated_cards_alone():
    arguments = DataArguments(train_size=6, test_size=3, train_canvases=["2x4", "4x4", "3x4"])
    train, test = load_data(arguments, seed=1)
    assert [train[index]["image"].size for index in range(6)] == 2 * [(256, 128), (256, 256), (256, 192)]
    square, published = load_data(DataArguments(train_size=6, test_size=3), seed=1)
    assert {sample["image"].size for sample in [*map(square.__getitem__, range(6)), *test]} == {(256, 256)}
    assert [sample["question"] for sample in test] == [sample["question"] for sample in published]
    with pytest.raises(ValueError, match=r"canvas \('wide'\): must be rows x columns in tiles"):
        load_data(DataArguments(train_canvases=["wide"]), seed=1)
