"""One exported folder, several versions of transformers: the same tokens, positions and selections.

`make environments` sets up the others; without them, their tests are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from former import to_former_names

from training.data.cards import Cards


ROOT = Path(__file__).parents[2]
ANSWER = ROOT / "tests" / "compat" / "answer.py"
OTHERS = ("4.57.6", "5.4.0", "5.23.0")
TINY = ROOT / "hub_cards" / "tiny-qgsa"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny checkpoint as `hub_cards/export.py` exports it, and an image to ask about."""
    folder = tmp_path_factory.mktemp("exported")
    run = [sys.executable, ROOT / "hub_cards" / "export.py", "--base_model", TINY, "--output", folder / "qgsa-tiny"]
    subprocess.run(list(map(str, run)), check=True, capture_output=True, cwd=folder, timeout=300)
    Cards("test", 1)[0]["image"].save(folder / "image.png")
    return folder


def with_former_names(folder, name):
    """A copy of the exported folder whose weights are named as version 0.2 named them."""
    copy = shutil.copytree(folder / "qgsa-tiny", folder / name)
    to_former_names(copy / "model.safetensors")
    return copy


def ask(python, folder):
    """The report of `answer.py` under the interpreter `python`, which sees nothing of this project but the folder."""
    report = folder / f"{Path(python).parent.parent.name}.json"
    former = with_former_names(folder, f"{report.stem}-former")
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(folder / report.stem), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, [python, "-I", ANSWER, folder / "qgsa-tiny", former, folder / "image.png", report])),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def report(folder):
    return ask(sys.executable, folder)


@pytest.fixture(scope="module", params=OTHERS)
def other(request, folder):
    python = ROOT / f".venv-{request.param}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"transformers {request.param} is not set up: run make environments")
    report = ask(python, folder)
    assert report["transformers"] == request.param
    return report


def test_positions_go_on_from_the_last_of_the_prompt(report):
    for name in ("batch", "single", "lazy", "dense"):
        ids, steps = report[name]
        assert len(steps) == 6
        last = [row[-1] for row in steps[0]]
        for number, step in enumerate(steps[1:], start=1):
            assert [row[0] for row in step] == [position + number for position in last]


def test_kept_positions_have_gaps_and_dense_ones_have_none(report):
    kept, dense = report["single"][1][0][0], report["dense"][1][0][0]
    assert dense == list(range(len(dense))) and set(kept) < set(dense)


def test_lazy_tiles_answer_alike_and_a_batch_as_its_samples(report):
    assert report["lazy"] == report["batch"] and report["same pixels"]
    length = len(report["single"][0][0])
    assert report["batch"][0][0][-length:] == report["single"][0][0]


def test_the_tiny_checkpoint_answers(report):
    assert report["answers"][1].split()[0] in {"one", "two", "three", "four", "five", "six", "seven"}
    assert report["model"] == "QGSASmolVLMForConditionalGeneration" and report["processor"] == "QGSAProcessor"


def test_the_question_is_found_in_front_of_an_answer(report):
    assert report["found"]


def test_new_blocks_start_closed_and_open_ones_look(report):
    closed, found = report["blocks"]
    assert closed and found != report["scheduled"]


def test_former_names_load(report):
    assert report["former"]["missing"] == [[], []]
    assert report["former"]["logits"] == [report["logits"]] * 2


def test_another_generation_loads_former_names(other):
    test_former_names_load(other)


def test_another_generation_answers_alike(report, other):
    exact = set(report) - {"transformers", "logits", "dense_logits", "inputs", "former"}
    assert {name: other[name] for name in exact} == {name: report[name] for name in exact}
    for name in ("logits", "dense_logits"):
        assert other[name] == pytest.approx(report[name], abs=1e-4)
    assert {name: shape for name, (shape, _) in other["inputs"].items()} == {
        name: shape for name, (shape, _) in report["inputs"].items()
    }
    for name, (_, total) in other["inputs"].items():
        assert total == pytest.approx(report["inputs"][name][1], rel=1e-6)
