"""The output folder: one run at a time, and never another one's."""

import json

import pytest

from training.learning.output import claimed, identity
from training.learning.trainer import QGSATrainingArguments
from training.run_qgsa import RunArguments


WANTED = {"seed": 1, "dataset": "cards"}


def test_a_run_may_go_on_in_its_folder(tmp_path):
    for _ in range(2):
        with claimed(tmp_path / "run", WANTED):
            pass
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == WANTED


@pytest.mark.parametrize("other", [{"seed": 2, "dataset": "cards"}, {"seed": 1}, WANTED | {"form": "x"}])
def test_the_folder_of_another_run_is_refused_and_left_as_it_is(other, tmp_path):
    with claimed(tmp_path, WANTED):
        (tmp_path / "results.json").write_text("figures")
    with pytest.raises(ValueError, match="is of a run with (seed 1, this one has 2|dataset|form)"):
        with claimed(tmp_path, other):
            raise AssertionError("it may not come so far")
    assert (tmp_path / "results.json").read_text() == "figures"
    assert json.loads((tmp_path / "run.json").read_text()) == WANTED


def test_two_runs_at_once(tmp_path):
    with claimed(tmp_path, WANTED):
        with pytest.raises(ValueError, match="another run is writing to output_dir"):
            with claimed(tmp_path, WANTED):
                raise AssertionError("it may not come so far")
        with claimed(tmp_path, WANTED, main_process=False):  # another process of the same run
            pass
    with claimed(tmp_path, WANTED):
        pass


def test_what_makes_a_run(tmp_path):
    def of(run=None, **arguments):
        return identity(RunArguments(**(run or {})), QGSATrainingArguments(str(tmp_path), use_cpu=True, **arguments))

    same = of()
    assert json.loads(json.dumps(same)) == same
    assert of({"test_size": 3, "systems": "dense qgsa", "task": "evaluate"}, logging_steps=3, max_steps=7) == same
    for other in (of({"dataset": "vqa_rad"}), of({"max_tiles": 2}), of(seed=3), of(utility_weight=0.0)):
        assert other != same


@pytest.mark.parametrize("saved, free", [(None, True), ("checkpoint-2", False), ("model.safetensors", False)])
def test_a_run_that_fails_before_it_saves_anything_leaves_the_folder_to_others(saved, free, tmp_path):
    with pytest.raises(OSError):
        with claimed(tmp_path, WANTED):
            if saved:
                (tmp_path / saved).mkdir()
            raise OSError("no such data")
    assert (tmp_path / "run.json").exists() is not free
