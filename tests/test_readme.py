"""The README's tables are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

from training.ablation import format_ablation
from training.adaptive import best_fixed, format_adaptive, format_spending
from training.flops import paper_table
from training.pareto import format_pareto
from training.report import format_families, format_table
from training.speed_report import format_headline, format_speed


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "hub_cards" / "results"


def adaptive_tables(rows):
    return [format_adaptive(rows), format_spending(rows[1], best_fixed(rows[2:], rows[1]))]


def headline_tables(rows):
    cards = json.loads((RESULTS / "pareto_cards.json").read_text())["rows"]
    return [format_headline(rows, cards, 2048), format_speed(rows, 2048)]


def lines_of_sizes(rows):
    """A line for each image size, of the seconds of five systems."""
    columns = ("dense-native-size", "qgsa-native-size", "dense-tuned", "qgsa", "qgsa-blocks")
    by = {(row["longest_edge"], row["system"]): row["seconds_median"] for row in rows}
    return [f"| {edge} | " + " | ".join(f"{by[edge, c]:.2f}" for c in columns) + " |" for edge in {e for e, _ in by}]


TABLES = {
    "cards": lambda rows: [format_table(rows), format_families(rows)],
    "ablation_cards": lambda rows: [format_ablation(rows)],
    "adaptive_cards": adaptive_tables,
    "vqa_rad": lambda rows: [format_table(rows)],
    "vqa_rad_published": lambda rows: [format_table(rows)],
    "pareto_cards": lambda rows: [format_pareto(rows)],
    "speed_256m_cpu": headline_tables,
    "speed_500m_cpu": lambda rows: [format_speed(rows, 2048)],
    "speed_sizes_cpu": lines_of_sizes,
}


@pytest.mark.parametrize("name", TABLES)
def test_readme_holds_the_tables_of_the_results(name):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    readme = (ROOT / "README.md").read_text()
    for table in TABLES[name](rows):
        assert table in readme


def test_readme_holds_the_flops_of_the_formula():
    results = json.loads((RESULTS / "flops.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert results["paper"] == paper_table()
    for name, rows in results["answers"].items():
        for row in rows:
            parts = ("cross_modal_attention", "vision", "prefill", "decode", "total")
            flops = " | ".join(f"{row['flops'][part] / 1e9:.2f}" for part in parts)
            assert f"| {name} | {row['system']} | {flops} |" in readme


def test_all_results_are_told():
    assert {path.stem for path in RESULTS.glob("*.json")} == set(TABLES) | {"flops"}


def test_readme_names_only_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\(([^):]+)\)", readme)
    named = re.findall(r"\b(?:training|modeling_qgsa|hub_cards|tests)/[\w/.-]*\w", readme)
    assert {"LOG.md", "CONTRIBUTING.md"} <= set(linked) and "training/run_qgsa.py" in named
    for name in linked + named:
        assert (ROOT / name).exists(), name
