"""Results files, tables and figures of a run."""

import json
from pathlib import Path

import pytest
from PIL import Image

from training.data.cards import Cards
from training.data.collator import QuestionCollator
from training.evaluation.report import format_table, plot_accuracy, plot_selections, write_results


RESULTS = Path(__file__).parents[3] / "hub_cards" / "results"


@pytest.fixture(scope="module", params=["cards", "vqa_rad"])
def rows(request):
    return json.loads((RESULTS / f"{request.param}.json").read_text())["rows"]


def test_results_are_written_in_one_step(rows, tmp_path):
    path = tmp_path / "results.json"
    write_results(path, "demo", "cards", 8, 1, rows)
    written = json.loads(path.read_text())
    assert set(written) == {"preset", "dataset", "split", "n", "seed", "environment", "rows"}
    assert written["split"] == "test"
    assert written["rows"] == rows
    assert (written["preset"], written["dataset"], written["n"], written["seed"]) == ("demo", "cards", 8, 1)
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


def test_the_table_has_a_line_for_every_system_and_dashes_for_what_was_not_measured(rows):
    header, rule, *lines = format_table(rows).split("\n")
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [row["system"] for row in rows]
    assert {line.count("|") for line in (header, rule, *lines)} == {header.count("|")}
    bare = {name: value for name, value in rows[0].items() if name != "flops"}
    assert format_table([bare]).split("\n")[2].count("–") == 2


def test_figures_are_drawn(rows, model, processor, tmp_path):
    collate, questions = QuestionCollator(processor, with_answer=False), Cards("test", 2)
    plot_accuracy(rows, tmp_path / "accuracy.png")
    plot_selections(model, processor, [questions[0], questions[1]], collate, tmp_path / "selections.png")
    for name in ("accuracy", "selections"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 200
