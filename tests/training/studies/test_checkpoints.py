"""The checkpoints of a study, and how it fails without them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from training.studies import adaptive, pareto
from training.studies.checkpoints import RENAMED, base_model_of


ROOT = Path(__file__).parents[3]


def test_the_dense_checkpoint_is_given_or_recorded(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"base_model": "some/base"}))
    assert base_model_of(str(tmp_path)) == "some/base"
    assert base_model_of(str(tmp_path), "another/base") == "another/base"
    for run in ("{}", None):
        (tmp_path / "run.json").write_text(run) if run else (tmp_path / "run.json").unlink()
        with pytest.raises(ValueError, match=r"base_model \(None\): .*run.json does not name it; .* --base_model"):
            base_model_of(str(tmp_path))


ERRORS = [
    (["--model", "hub_cards/tiny-qgsa"], "base_model (None)"),
    (["--model", "./nowhere", "--base_model", "hub_cards/tiny-dense"], "nowhere is neither a local folder"),
    (
        ["--checkpoint", "hub_cards/tiny-qgsa", "--base_model", "hub_cards/tiny-dense", "--split", "dev"],
        "split ('dev'): choose from",
    ),
]


@pytest.mark.parametrize("study", [pareto, adaptive], ids=["pareto", "adaptive"])
@pytest.mark.parametrize("arguments, complaint", ERRORS)
def test_a_users_mistake_is_told_in_one_line(study, arguments, complaint, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        study.main()
    message = stopped.value.code
    assert message.startswith("error: ") and complaint in message and "\n" not in message
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == sum(argument in RENAMED for argument in arguments)


@pytest.mark.parametrize("study", ["pareto", "adaptive", "ablation", "canvases"])
def test_a_study_runs_as_a_script(study):
    command = [sys.executable, f"training/studies/{study}.py", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "--base_model" in run.stdout, run.stderr
