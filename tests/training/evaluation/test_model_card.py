"""Model cards: every number of the results, and no other."""

import json
import sys
from pathlib import Path

import pytest

from training.data.cards import FAMILIES
from training.evaluation.card import (
    CardContent,
    budgets_in_words,
    format_flops,
    format_kept,
    pointer_share,
    write_card,
    write_dense_card,
)
from training.evaluation.report import format_families, format_table, write_results
from training.model_card import main


RESULTS = Path(__file__).parents[3] / "hub_cards" / "results"


@pytest.fixture(scope="module")
def rows():
    return json.loads((RESULTS / "cards.json").read_text())["rows"]


def test_the_card_has_every_number_of_the_tables(rows, tmp_path):
    results = write_results(tmp_path / "results.json", "demo", "cards", 8, 1, rows)
    content = CardContent(
        "qgsa-demo", "outputs/demo", "some/base", None, "1 to 2", "python run.py", 0.02, True, accuracy=results
    )
    write_card(tmp_path, content)
    card = (tmp_path / "README.md").read_text()
    for table in (format_table(rows), format_families(rows), format_kept(rows[-1]), format_flops(rows)):
        assert table in card
    for row in rows:
        line = next(line for line in card.split("\n") if line.startswith(f"| {row['system']} |"))
        for number in (
            f"{row['accuracy']:.1%}",
            f"{row['delta_vs_dense_pp']:+.1f}",
            f"{row['visual_tokens_mean']:.1f}",
            f"{row['tiles_mean']:.2f}",
            f"{row['flops']['total'] / 1e9:.2f}",
            f"{1000 * row['seconds_median']:.1f}",
        ):
            assert number in line
    assert "qgsa-demo" in card and "some/base" in card and "python run.py" in card
    assert "{{" not in card and "{%" not in card


def test_the_card_of_the_dense_model_sums_its_families_up(rows, tmp_path):
    needed = {family: tiles for family, (tiles, _) in FAMILIES.items()}
    table = write_dense_card(tmp_path, "tiny-dense", 1_234_567, 8, rows[0], needed, "python training/run_qgsa.py")
    card = (tmp_path / "README.md").read_text()
    assert table in card and "1,234,567 parameters" in card
    for family, scores in rows[0]["by_family"].items():
        assert f"| {family} | {needed[family]} | {scores['n']} | {scores['accuracy']:.1%} |" in card
    assert f"| **all** | | 8 | **{rows[0]['accuracy']:.1%}** |" in card


@pytest.fixture
def run(model, rows, tmp_path, monkeypatch):
    """Output folder of a run, as given to the script with `--model`."""
    model.config.save_pretrained(tmp_path)
    write_results(tmp_path / "results.json", "demo", "cards", 8, 1, rows)
    (tmp_path / "run.json").write_text(json.dumps({"base_model": "some/base"}))
    monkeypatch.setattr(sys, "argv", ["model_card.py", "--model", str(tmp_path)])
    return tmp_path


def test_the_script_writes_the_card_of_a_run(run, model, rows):
    main()
    content = CardContent(
        name="qgsa-demo",
        repo_id=str(run),
        made_from="some/base",
        base_model="some/base",
        budgets=budgets_in_words(model.config),
        command="python training/run_qgsa.py --preset demo",
        pointer_cost=pointer_share(model.config),
        trained=True,
        accuracy=json.loads((run / "results.json").read_text()),
    )
    written = (run / "README.md").read_text()
    write_card(run, content)
    assert written == (run / "README.md").read_text() and format_table(rows) in written


@pytest.mark.parametrize(
    "name, remedy", [("results.json", "--task evaluate"), ("run.json", "give --base_model")], ids=["results", "run"]
)
def test_a_missing_file_of_the_run_is_one_line(run, name, remedy):
    (run / name).unlink()
    with pytest.raises(SystemExit) as stopped:
        main()
    message = str(stopped.value)
    assert message.startswith(f"error: model ({run}): has no {name}; ") and remedy in message and "\n" not in message
    assert not (run / "README.md").exists()
