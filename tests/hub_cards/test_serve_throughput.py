"""Servers beside each other: rows, table and requests of hub_cards/serve_throughput.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from serve_throughput import SYSTEMS, ThroughputArguments, command_of, format_throughput, make_requests


ROOT = Path(__file__).resolve().parents[2]
SMALL = {"clients": 2, "requests": 2, "image_size": 256, "max_new_tokens": 2}


def run_script(*options):
    command = [sys.executable, "hub_cards/serve_throughput.py", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_server_has_a_row_and_a_missing_one_says_why(tmp_path):
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    done = run_script(*options, "--vllm_python", tmp_path / "python", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "throughput_cpu.json").read_text())
    assert results["n"] == 4 and results["environment"]["processor"]
    rows = results["rows"]
    assert [row["system"] for row in rows] == list(SYSTEMS)
    for row in rows[:2]:
        assert row["skipped"] == f"vLLM is not set up ({tmp_path / 'python'} is missing): make vllm"
    for row in rows[2:]:
        assert (row["answered"], row["refused"], row["lost"], row["errors"]) == (4, 0, 0, [])
        assert row["tiles"] == 3 and row["new_tokens_mean"] == 2 and row["cache_hits"] == 0
        assert 0 < row["first_token_p50"] <= row["seconds_p50"] <= row["seconds_p99"]
        assert 1e8 < row["memory_peak_bytes"] < 1e10
    assert done.stdout.strip().endswith(format_throughput(rows))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "exported checkpoints are removed"


def test_no_request_repeats_an_image():
    run = ThroughputArguments(**SMALL)
    bodies = list(map(json.loads, make_requests(run, "vllm")))
    images = {body["messages"][0]["content"][0]["image_url"]["url"] for body in bodies}
    assert len(images) == len(bodies) == 6  # two of them warm up
    assert all(body["temperature"] == 0 and "qgsa" not in body for body in bodies)
    assert all(json.loads(body)["qgsa"] == {"min_tiles": 2, "max_tiles": 2} for body in make_requests(run, "qgsa"))


def test_the_plugin_gets_the_budget_and_stock_does_not(tmp_path):
    run = ThroughputArguments(tiles=3, vllm_python=sys.executable)
    stock, plugin, batches, single = (command_of(run, system, tmp_path).words for system in SYSTEMS)
    assert set(plugin) - set(stock) == {'--hf-overrides={"min_tiles": 3, "max_tiles": 3}'}
    assert "--max_batch_size=8" in batches and "--max_batch_size=1" in single
    assert {"--max_waiting=32"} <= set(batches) & set(single)


def test_the_table_compares_with_the_first_server_that_ran():
    row = {"answered": 2, "refused": 0, "lost": 1, "memory_peak_bytes": 2e9}
    latency = dict.fromkeys(("first_token_p50", "first_token_p99", "seconds_p50", "seconds_p99"), 1.5)
    rows = [
        {"system": "vllm", "skipped": "no vLLM"},
        {"system": "vllm-qgsa", "requests_per_second": 0.0, **row},
        {"system": "qgsa-batches", "requests_per_second": 3.0, "tiles": 3, **row, **latency},
        {"system": "qgsa-one-by-one", "requests_per_second": 1.5, "tiles": 3, **row, **latency},
    ]
    head, rule, *lines = format_throughput(rows).splitlines()
    assert {line.count("|") for line in (head, rule, *lines)} == {13}
    assert lines[0].startswith("| vLLM, stock | skipped: no vLLM | – |")
    assert lines[1] == "| vLLM, plugin | 0 | 0.0 | – | – | – | – | 2 | 0 | 1 | – | 2.00 |"
    assert lines[3] == "| serve.py, one by one | 1.5 | 0.5 | 1.50 | 1.50 | 1.50 | 1.50 | 2 | 0 | 1 | 3.0 | 2.00 |"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--systems", "tgi"], "systems (tgi): choose from vllm, vllm-qgsa, qgsa-batches, qgsa-one-by-one"),
        (["--tiles", "0"], "tiles (0) must be at least 1"),
        (["--random_weights", "true"], "random_weights (True): hub_cards/tiny-qgsa is not a dense checkpoint"),
    ],
)
def test_errors_take_one_line(options, message, tmp_path):
    done = run_script(*options, "--output_dir", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {message}"
