"""The README's table is that of the committed results."""

import json
import re
from pathlib import Path

import pytest

from training.report import format_families, format_table


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "hub_cards" / "results" / "cards.json"


@pytest.mark.skipif(not RESULTS.exists(), reason="hub_cards/results/cards.json is not there yet")
def test_readme_holds_the_tables_of_the_results():
    rows = json.loads(RESULTS.read_text())["rows"]
    readme = (ROOT / "README.md").read_text()
    assert format_table(rows) in readme
    assert format_families(rows) in readme


def test_readme_names_only_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\(([^):]+)\)", readme)
    named = re.findall(r"\b(?:training|modeling_qgsa|hub_cards|tests)/[\w/.-]*\w", readme)
    assert {"LOG.md", "CONTRIBUTING.md"} <= set(linked) and "training/run_qgsa.py" in named
    for name in linked + named:
        assert (ROOT / name).exists(), name
