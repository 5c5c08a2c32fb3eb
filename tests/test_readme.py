"""The README's tables are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

from training.ablation import format_ablation
from training.adaptive import best_fixed, format_adaptive, format_spending
from training.report import format_families, format_table


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "hub_cards" / "results"


def adaptive_tables(rows):
    return [format_adaptive(rows), format_spending(rows[1], best_fixed(rows[2:], rows[1]))]


TABLES = {
    "cards": lambda rows: [format_table(rows), format_families(rows)],
    "ablation_cards": lambda rows: [format_ablation(rows)],
    "adaptive_cards": adaptive_tables,
}


@pytest.mark.parametrize("name", TABLES)
def test_readme_holds_the_tables_of_the_results(name):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    readme = (ROOT / "README.md").read_text()
    for table in TABLES[name](rows):
        assert table in readme


def test_all_results_are_told():
    assert {path.stem for path in RESULTS.glob("*.json")} == set(TABLES)


def test_readme_names_only_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\(([^):]+)\)", readme)
    named = re.findall(r"\b(?:training|modeling_qgsa|hub_cards|tests)/[\w/.-]*\w", readme)
    assert {"LOG.md", "CONTRIBUTING.md"} <= set(linked) and "training/run_qgsa.py" in named
    for name in linked + named:
        assert (ROOT / name).exists(), name
