"""ONNX Runtime as an engine beside torch, on the tiny model."""

import sys
from pathlib import Path

import export
import pytest

from training.engines.protocol import Worker


pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
ROOT = Path(__file__).parents[3]
PARTS = {"processing", "vision", "prefill", "decode"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "onnx"
    export.export(export.ExportArguments(str(ROOT / "hub_cards" / "tiny-dense"), str(folder), "onnx", ["fp32"]))
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


def test_every_system_encodes_its_tiles(folder, work, monkeypatch):
    from training.engines.onnx_worker import TimedModel, load

    answers, generate = [], TimedModel.generate
    monkeypatch.setattr(TimedModel, "generate", lambda *args, **given: answers.append(generate(*args, **given)))
    answer, _ = load(str(folder), "fp32", "1")
    for system in ("dense", "dense-global-only", "qgsa-attention"):
        check_seconds(answer(**work, system=system))
    assert [int(each.selection.tiles.sum()) for each in answers] == [17, 1, 3]
    assert [int(each.selection.kept.sum()) for each in answers] == [272, 16, 17]
    assert [len(each.ids) for each in answers] == [4, 4, 4]
