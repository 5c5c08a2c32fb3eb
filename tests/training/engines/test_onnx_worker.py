"""ONNX Runtime as an engine beside torch, on the tiny model."""

import sys
from pathlib import Path

import export
import pytest

from training.costs.systems import SYSTEMS
from training.engines.protocol import Worker
from training.studies.engines import ENGINES


pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
ROOT = Path(__file__).parents[3]
PARTS = {"processing", "vision", "prefill", "decode"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of `make engines`, of the tiny model."""
    folder, dense = tmp_path_factory.mktemp("engine") / "onnx", str(ROOT / "hub_cards" / "tiny-dense")
    wanted = {"onnx_pointers": ["attention", "selector"], "glance_downscale": 2, "random_weights": True}
    export.export(export.ExportArguments(dense, str(folder), "onnx", ["fp32"], **wanted))
    return folder


@pytest.fixture
def work(make_image, tmp_path):
    """A request, but for its system."""
    make_image(0).save(tmp_path / "image.png")
    question = {"image": str(tmp_path / "image.png"), "question": "what is it?"}
    return question | {"tiles": 2, "tokens": 17, "new_tokens": 4}


def check_seconds(seconds):
    assert seconds.keys() == PARTS | {"total"} and min(seconds.values()) > 0
    assert sum(seconds[part] for part in PARTS) == pytest.approx(seconds["total"])


def test_it_answers_in_a_process_of_its_own(folder, work, tmp_path):
    arguments = [str(folder), "fp32", "1"]
    worker = Worker("training.engines.onnx_worker", arguments, sys.executable, tmp_path / "log", (folder,))
    check_seconds(worker.ask(**work, system="dense-global-only"))
    worker.close()
    assert worker.version.startswith("onnxruntime ") and worker.weight_bytes > 1e6


@pytest.mark.parametrize("system", ["qgsa", "qgsa-attention-blocks-half-glance"])
def test_later_questions_are_timed_one_by_one(system, folder, work):
    from training.engines.onnx_worker import load

    answer, _ = load(str(folder), "fp32", "1")
    found = answer(**work, system=system, later=["where is it?", "is it red?"])
    assert found.keys() == {"later"} and len(found["later"]) == 2 and min(found["later"]) > 0


def test_every_system_encodes_its_tiles(folder, work, monkeypatch):
    from training.engines.onnx_worker import TimedModel, load

    answers, graphs, generate = {}, {}, TimedModel.generate

    def note(model, *args, **given):
        answers[system] = generate(model, *args, **given).selection
        graphs[system] = {name for name, *_ in model.spans}

    monkeypatch.setattr(TimedModel, "generate", note)
    answer, description = load(str(folder), "fp32", "1")
    for system in ENGINES["onnxruntime-float32"].systems:
        check_seconds(answer(**work, system=system))
    tiles = {system: int(each.tiles.sum()) for system, each in answers.items()}
    assert (tiles["dense"], tiles["dense-global-only"], tiles["qgsa"], tiles["qgsa-attention"]) == (17, 1, 3, 3)
    tokens = {system: int(each.kept.sum()) for system, each in answers.items()}
    assert (tokens.pop("dense"), tokens.pop("dense-global-only")) == (272, 16) and set(tokens.values()) == {17}
    for system in tokens:
        timed, pointer = SYSTEMS[system], {"selector": "selector", "attention": "attention_pointer"}
        assert pointer[timed.pointer] in graphs[system] and graphs[system].isdisjoint(
            {"selector", "attention_pointer"} - {pointer[timed.pointer]}
        )
        assert ("glance_encoder" in graphs[system]) == (timed.model == "half")
        assert ("block_encoder" in graphs[system]) == (timed.selection == "blocks")
    assert description["weight_bytes"] == sum(path.stat().st_size for path in (folder / "onnx").iterdir())
