"""Model cards: every number of the results, and no other."""

import json
from pathlib import Path

import pytest

from training.data.cards import FAMILIES
from training.evaluation.report import format_families, format_table, write_dense_card, write_results
from training.model_card import CardContent, format_flops, format_kept, write_card


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
