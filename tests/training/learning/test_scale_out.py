"""Runs in several processes, and runs that are killed: whole commands, as a user types them.

python -m pytest -m slow tests/training/learning/test_scale_out.py        # about four minutes on two cores
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SCRIPT = str(ROOT / "training" / "run_qgsa.py")
SMALL = {
    "preset": "demo",
    "base_model": "tiny",
    "test_size": 10,
    "test_batch_size": 3,
    "systems": "dense random qgsa",
    "use_cpu": "true",
    "logging_steps": 1,
    "complexity_start": 0,
    "train_size": 64,
}


def command(output, *launcher, **arguments):
    fields = SMALL | arguments | {"output_dir": str(output)}
    return [*launcher, SCRIPT, *(part for name, value in fields.items() for part in (f"--{name}", str(value)))]


def environment(tmp_path):
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "HF_HOME": str(tmp_path / "home")}


def run(command, tmp_path):
    result = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), cwd=ROOT, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def results(output):
    """The rows of a run's results, without the times."""
    rows = json.loads((output / "results.json").read_text())["rows"]
    clocked = ("seconds_median", "speedup_vs_dense")
    return [{name: value for name, value in row.items() if name not in clocked} for row in rows]


def losses(output, name):
    state = max(output.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    return [entry[name] for entry in json.loads(state.read_text())["log_history"] if name in entry]


def test_two_processes_train_and_evaluate_as_one_does(tmp_path):
    """Without the answer loss, whose random budgets and noise are drawn by each process for itself."""
    arguments = {"max_steps": 3, "answer_weight": 0, "attention_share": 1, "save_steps": 3}
    alone = command(tmp_path / "one", sys.executable, per_device_train_batch_size=4, **arguments)
    # Its name notwithstanding, --multi_gpu is what starts several processes on CPUs: without it there is only one.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    together = command(tmp_path / "two", *launcher, per_device_train_batch_size=2, **arguments)
    run(alone, tmp_path)
    printed = run(together, tmp_path)
    assert printed.count("Checkpoint, card and figures") == 1, "only one process reports"
    for name in ("utility_loss", "attention_loss", "complexity_loss"):
        expected = losses(tmp_path / "one", name)
        assert len(expected) == 3
        assert losses(tmp_path / "two", name) == pytest.approx(expected, abs=2e-3), name
    for one, two in zip(results(tmp_path / "one"), results(tmp_path / "two")):
        assert sum(family["n"] for family in two["by_family"].values()) == 10, "none is asked twice, none is missing"
        for name in ("accuracy", "by_family", "loyalty"):
            assert one[name] == two[name] or one["system"] != "dense"
    assert results(tmp_path / "one")[0] == results(tmp_path / "two")[0]


def test_a_killed_run_goes_on_to_the_results_of_an_unbroken_one(tmp_path):
    arguments = {"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 2, "save_total_limit": 2}
    run(command(tmp_path / "unbroken", sys.executable, **arguments), tmp_path)
    broken = command(tmp_path / "broken", sys.executable, **arguments)
    process = subprocess.Popen(
        broken, env=environment(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "broken" / "checkpoint-2" / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "broken" / "results.json").exists()
    # What a kill in the middle of saving leaves behind.
    (tmp_path / "broken" / "checkpoint-9").mkdir()
    run(broken, tmp_path)
    assert results(tmp_path / "broken") == results(tmp_path / "unbroken")
    for name in ("answer_loss", "utility_loss", "complexity_loss"):
        assert losses(tmp_path / "broken", name) == losses(tmp_path / "unbroken", name)


def test_a_folder_of_another_run_is_left_as_it_is(tmp_path):
    arguments = {"max_steps": 1, "per_device_train_batch_size": 2}
    run(command(tmp_path / "run", sys.executable, **arguments), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    other = subprocess.run(
        command(tmp_path / "run", sys.executable, **arguments, max_tiles=2),
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        cwd=ROOT,
        timeout=300,
    )
    assert other.returncode != 0
    assert "belongs to a run with max_tiles 8, but this run has 2" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    text = run(command(tmp_path / "run", sys.executable, **arguments, task="evaluate", test_size=4), tmp_path)
    assert "| qgsa |" in text
    assert json.loads((tmp_path / "run" / "results.json").read_text())["n"] == 4
