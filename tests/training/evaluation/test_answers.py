"""Answers: those of `generate` whatever the batch, the blank image, and the regions that were kept."""

import numpy as np
import pytest
from PIL import Image

import training.evaluation.answers as answering
from training.data.collator import QuestionCollator
from training.evaluation.answers import answer, kept_regions, without_image
from training.evaluation.systems import DENSE, System
from training.methods import METHODS


def test_boxes_are_told_in_shares_of_the_image():
    sample = {"image": Image.new("RGB", (200, 50)), "question": "what?", "boxes": [[20, 5, 100, 50]]}
    assert without_image(sample) == {"question": "what?", "boxes": [[0.1, 0.1, 0.5, 1.0]]}


def test_regions_are_those_of_the_kept_tokens(model, batch):
    selection = model.select(**batch, min_tiles=1, max_tiles=1, min_visual_tokens=8, max_visual_tokens=8)
    for row, (rows, columns) in enumerate(selection.grids.tolist()):
        tile = int(selection.kept_tiles[row].nonzero()[0])
        tokens = selection.kept_tokens[row].view(-1, 16)[tile].nonzero()[:, 0].tolist()
        top, left = divmod(tile, columns)
        expected = {((left + (token % 4) / 4) / columns, (top + (token // 4) / 4) / rows) for token in tokens}
        found = kept_regions(selection, row, 16)
        assert {(round(x0, 9), round(y0, 9)) for x0, y0, *_ in found} == {
            (round(x, 9), round(y, 9)) for x, y in expected
        }
        assert all(x1 - x0 == pytest.approx(1 / 4 / columns) for x0, _, x1, _ in found)


def test_the_blank_image_replaces_the_image_and_nothing_else(model, processor, questions, monkeypatch):
    shown = []

    class Recorder(QuestionCollator):
        def __call__(self, samples):
            shown.append(samples)
            return super().__call__(samples)

    monkeypatch.setattr(answering, "QuestionCollator", Recorder)
    answer([System("dense", model, DENSE, blank=blank) for blank in (False, True)], questions, processor, 8, 1)
    seen, blank = shown
    for index in range(8):
        assert seen[index]["image"].tobytes() == questions[index]["image"].tobytes()
        assert np.unique(np.asarray(blank[index]["image"])).tolist() == [128]
        assert blank[index]["image"].size == questions[index]["image"].size
        assert blank[index]["question"] == questions[index]["question"]


def test_answers_are_those_of_generate_whatever_the_batch(model, processor, questions, collate):
    random = System("random", model, method=METHODS["random"])
    (beside, answers), samples = answer([random, System("qgsa", model)], questions, processor, 3, 4)
    assert [sample["question"] for sample in samples] == [questions[index]["question"] for index in range(8)]
    assert beside.predictions == answer([random], questions, processor, 3, 4)[0][0].predictions, (
        "other systems in the run change nothing"
    )
    for name in ("predictions", "visual_tokens", "tiles", "relevance", "kept", "seconds"):
        assert len(getattr(answers, name)) == 8
    for index in range(8):
        inputs = collate([questions[index]])
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        text = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        assert answers.predictions[index] == text.strip()
        selection = model.select(**inputs)
        assert answers.visual_tokens[index] == selection.visual_tokens.item()
        assert answers.tiles[index] == selection.tiles.item()
        assert np.allclose(answers.relevance[index], selection.relevance[0], atol=1e-6)
        assert answers.kept[index] == kept_regions(selection, 0, 16)
