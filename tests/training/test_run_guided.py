"""The door to pairs of models: from a command line to results and a pair that can be loaded."""

import json
import sys

import pytest
import torch

import training.run_guided as run_guided
from modeling_qgsa import GuidedVLM


@pytest.fixture(scope="module")
def folders(make_dense, processor, tmp_path_factory):
    """A guide, and a target of twelve layers, as dense checkpoints."""
    folders = []
    for name, layers in (("guide", 2), ("target", 12)):
        dense = make_dense()
        config = dense.config
        config.text_config.num_hidden_layers = layers
        torch.manual_seed(layers)
        dense = type(dense)._from_config(config).eval()
        dense.generation_config.pad_token_id = 2
        folders.append(tmp_path_factory.mktemp(name))
        dense.save_pretrained(folders[-1])
        processor.save_pretrained(folders[-1])
    return folders


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run_guided.py", *map(str, arguments)])
    run_guided.main()


def test_a_pair_is_evaluated(folders, tmp_path, monkeypatch, capsys):
    guide, target = folders
    options = ("--test_size", 3, "--calibration_size", 20, "--max_new_tokens", 1, "--flops_questions", 1)
    run(monkeypatch, "--guide", guide, "--target", target, "--output_dir", tmp_path, *options)
    results = json.loads((tmp_path / "sgl_cards.json").read_text())
    rows = {row["system"]: row for row in results["rows"]}
    assert results["n"] == 3 and "dense" in rows and "guide" in rows
    assert rows["sgl-exit"]["exit_curve"][0]["accuracy"] == rows["dense"]["accuracy"]
    for pair, alone in (("sgl-exit", "guide"), ("sgl-exit, glance", "guide, glance")):
        assert rows[pair]["exit_curve"][-1]["accuracy"] == rows[alone]["accuracy"]
    assert rows["guide, glance"]["answered_by_guide"] == 1
    assert rows["sgl-exit"]["calibration"]["samples"] == 20
    printed = capsys.readouterr().out
    table, families, exits = printed.strip().split("\n\n")[:3]
    assert table.count("\n| sgl") == sum(name.startswith("sgl") for name in rows)
    assert families.count("\n| sgl") == 6 and exits.count("\n| sgl") == 4
    assert (tmp_path / "sgl_cards_exits.png").stat().st_size > 1000
    pair = GuidedVLM.from_pretrained(tmp_path / "pair")
    assert pair.guidance.calibration == rows["sgl-exit, glance, coverage"]["calibration"]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "guide (''): required"),
        (["--guide", "a/b"], "target (''): required"),
        (["--guide", "a/b", "--target", "a/b", "--calibration_size", "3"], "calibration_size (3) must be at least 20"),
        (["--guide", "./nowhere", "--target", "./nowhere"], "nowhere"),
        (["--guide", "a/b", "--target", "a/b", "--coverge", "1"], "--coverge: did you mean --coverage?"),
    ],
)
def test_bad_options_end_in_one_line(arguments, complaint, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert complaint in str(ended.value) and "\n" not in str(ended.value)
