"""The notebook runs from top to bottom and is committed without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
CELLS = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_outputs_are_stripped():
    assert CODE and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


@pytest.mark.parametrize("folder", [".", "examples"])
def test_cells_run_in_order(folder):
    """Lines that begin with % (the installation) are Jupyter's own and are left out."""
    lines = [line for cell in CODE for line in [*cell["source"], "\n"] if not line.startswith("%")]
    script = "".join(lines) + "\n\nassert len(plt.get_fignums()) == 1 and len(figure.axes) == 3\n"
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-"]
    done = subprocess.run(command, cwd=ROOT / folder, input=script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, *dense = done.stdout.splitlines()
    assert first.startswith("what shape is on the red card? moon (1 tiles, ")
    assert second.startswith("what shape is on the purple card? cross (1 tiles, ")
    assert [line.split(" (")[0].split()[-1] for line in dense[:4]] == ["moon", "moon", "cross", "cross"]
    assert dense[-1] == "16 tiles, 272 visual tokens: cross"
