"""Engines beside each other, on the tiny model; the one beside torch is made up."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.evaluation.engines_report import format_engines
from training.studies import engines
from training.studies.engines import ENGINES, Engine, EnginesArguments, time_architecture


ROOT = Path(__file__).parents[3]
MADE_UP = """
from training.engines.protocol import serve

def load(folder, threads):
    def answer(image, question, system, tiles, tokens, new_tokens, later=()):
        assert (tokens, new_tokens, threads) == (17, 3, "2"), (tokens, new_tokens, threads)
        return {"later": [0.25 + len(set(later))] * len(later)} if later else {"vision": 0.5, "total": 1.0 * tiles}

    return answer, {"version": "made-up 1", "weight_bytes": 1000}

serve(load)
"""
BESIDE = {
    "made-up-int4": Engine("made_up", "made-up", systems=("dense", "qgsa"), apart=False),
    "fails-int8": Engine("missing", "made-up", systems=("dense",), apart=False),
    "absent-int8": Engine("made_up", "nothing", systems=("qgsa",), apart=False, target="make it"),
    "apart-float32": Engine("made_up", "made-up", systems=("dense",)),
}


@pytest.fixture
def given(tmp_path, make_image, monkeypatch):
    """Options of a run on the tiny model, with engines that answer, fail and are missing."""
    for folder in ("images", "files/tiny/made-up", "output"):
        (tmp_path / folder).mkdir(parents=True)
    for seed in range(2):
        make_image(seed).save(tmp_path / "images" / f"{seed}.png")
    (tmp_path / "smolvlm-tiny-instruct").symlink_to(ROOT / "hub_cards" / "tiny-dense")
    (tmp_path / "files" / "tiny" / "made-up" / "made_up.py").write_text(MADE_UP)
    monkeypatch.setattr(engines, "ENGINES", BESIDE)
    # What is fastest depends on the machine and what else it does; all engines get as many threads.
    monkeypatch.setattr(engines, "tune_alike", lambda models: torch.set_num_threads(2))
    return {
        "architectures": ["tiny"],
        "systems": ["dense", "qgsa"],
        "engines": list(BESIDE),
        "checkpoints": str(tmp_path),
        "images": str(tmp_path / "images"),
        "engine_files": str(tmp_path / "files"),
        "engine_python": str(tmp_path / ".venv" / "bin" / "python"),
        "repeats": 2,
        "questions": 3,
        "new_tokens": 3,
        "output_dir": str(tmp_path / "output"),
    }


def test_all_engines_take_turns_and_missing_ones_say_why(given):
    rows = time_architecture(EnginesArguments(**given), "tiny")
    dense, qgsa, one_tile, other, ours, ours_one_tile, *skipped = rows
    by_engine = [["dense", "qgsa", "qgsa, m = 1"]] * 2 + [["dense"], ["qgsa", "qgsa, m = 1"], ["dense"]]
    assert [row["system"] for row in rows] == sum(by_engine, [])
    assert dense["engine"].startswith("torch ") and dense["speedup_vs_dense"] == 1
    assert (other["engine"], other["precision"], other["weight_bytes"]) == ("made-up 1", "int4", 1000)
    assert other["seconds"] == {"vision": 0.5} and other["seconds_median"] == 2 and other["flops"] == dense["flops"]
    assert qgsa["seconds_later"] < dense["seconds_median"] and "seconds_later" not in dense | other
    assert ours["seconds_later"] == 2.25  # of two questions after the first
    assert (qgsa["tiles_mean"], one_tile["tiles_mean"], one_tile["visual_tokens_mean"]) == (2, 1, 17)
    assert (ours["seconds_median"], ours_one_tile["seconds_median"], ours_one_tile["tiles_mean"]) == (2, 1, 1)
    reasons = [row["skipped"] for row in skipped]
    assert "No module named missing" in reasons[0]
    assert reasons[1:] == ["no files: run make it"] * 2 + ["no environment: run make engines"]
    table = format_engines(rows, "tiny", {}).splitlines()
    assert len(table) == 2 + len(rows) and len({line.count("|") for line in table}) == 1
    assert "| dense | made-up 1 | int4 | – | 0.50 | – | – | 2.00 [2.00, 2.00] |" in table[5]
    assert table[9].startswith("| qgsa | absent | int8 | – ") and reasons[1] in table[9]
    assert format_engines(rows, "256m", {}).count("\n") == 1


def test_the_systems_of_every_engine_are_timed_in_torch_too():
    for engine in ENGINES.values():
        assert set(engine.systems) <= set(engines.COMPARED)
        assert (ROOT / f"{engine.worker.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"systems": ["dens"]}, r"systems \(dens\): unknown; choose from dense"),
        ({"engines": ["tensorrt"]}, r"engines \(tensorrt\): unknown; choose from made-up-int4"),
        ({"tiles": [2, 2]}, r"tiles \(2, 2\): must be at least 1, each number once"),
        ({"tiles": []}, r"tiles \(\): must be at least 1, each number once"),
        ({"repeats": 0}, r"repeats \(0\): must be at least 1"),
        ({"questions": 1}, r"questions \(1\): must be at least 2"),
    ],
)
def test_bad_options(given, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        EnginesArguments(**given | fields)


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--engines", "tensorrt"], "error: engines (tensorrt): unknown"),
        (["--architectures", "8b"], "error: architectures (8b): "),
        (["--accuracy", "tests"], "error: accuracy (tests): has no pareto_cards.json"),
    ],
)
def test_an_error_is_one_line_before_anything_is_timed(options, complaint, tmp_path):
    output = tmp_path / "output"
    command = [sys.executable, "training/studies/engines.py", *options, "--output_dir", str(output)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith(complaint)
    assert len(ended.stderr.splitlines()) == 1 and not output.exists()
