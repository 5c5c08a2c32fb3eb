"""The load on the server: rows, table and errors of hub_cards/serve_load.py."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serve_load import Asked, LoadArguments, ask_all, format_load, load, outcome_of, outcomes, percentiles, rates
from serving import serving


ROOT = Path(__file__).resolve().parents[2]


def run_script(*options):
    command = [sys.executable, "hub_cards/serve_load.py", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_script_writes_a_row_per_server_and_number_of_clients(tmp_path):
    options = ("--batch_sizes", 2, "--clients", 1, 3, "--requests", 4, "--repeats", 1, "--max_new_tokens", 2)
    done = run_script(*options, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("serve_*.json")
    results = json.loads(path.read_text())
    assert results["preset"] == "serve" and results["n"] == 4 and results["environment"]["processor"]
    assert [(row["max_batch_size"], row["clients"]) for row in results["rows"]] == [(2, 1), (2, 3)]
    alone, together = results["rows"]
    assert alone["batch_size_mean"] == 1 and 1 <= together["batch_size_mean"] <= 2
    for row in results["rows"]:
        assert 0 < row["first_token_p50"] <= row["seconds_p50"] <= row["seconds_p99"]
        assert row["requests_per_second"] > 0
    assert done.stdout.strip() == format_load(results["rows"])


def test_a_server_that_does_not_start_is_reported_in_one_line(tmp_path):
    done = run_script("--model", tmp_path / "nope", "--output_dir", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]  # below the progress bar
    assert error.startswith("error: serve.py did not start: ") and "nope" in error


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"requests": 0}, r"requests \(0\) must be at least 1"),
        ({"clients": [8, 0]}, r"clients \(0\) must be at least 1"),
        ({"batch_sizes": []}, r"batch_sizes \(0\) must be at least 1"),
        ({"repeats": -1}, r"repeats \(-1\)"),
    ],
)
def test_arguments_out_of_range_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LoadArguments(**fields)


@pytest.mark.parametrize("status, end", [(503, "[DONE]"), (200, '{"error": 1}')])
def test_an_answer_that_is_not_complete_is_an_error(status, end):
    """It would count as a fast one otherwise."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": f"data: a\n\ndata: {end}\n\n".encode()})

    with serving(app, lifespan="off") as url, pytest.raises(OSError, match=f"the server answered {status}: data: "):
        asyncio.run(load(url, [b"{}"], 2, 4))


def test_each_client_waits_for_its_answer():
    """As many requests as were asked for, and never more at a time than there are clients."""
    running, most, count = 0, 0, 0

    async def app(scope, receive, send):
        nonlocal running, most, count
        running, count = running + 1, count + 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: a\n\n", "more_body": True})
        await asyncio.sleep(0.05)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    with serving(app, lifespan="off") as url:
        found = asyncio.run(load(url, [b"{}"], 3, 9))
    assert most == 3 and count == 9
    assert 0.02 <= found["first_token_p50"] and found["first_token_p50"] + 0.04 <= found["seconds_p50"]
    assert found["requests_per_second"] < 3 / 0.07


@pytest.mark.parametrize(
    "status, lines, outcome",
    [
        (200, ["data: {}", "data: [DONE]"], "answered"),
        (200, ['{"choices": [],', '"usage": {}}'], "answered"),
        (503, ['{"error": {"message": "queue full"}}'], "refused"),
        (200, ['data: {"error": {"message": "broken"}}', "data: [DONE]"], "lost"),
        (200, ["data: {}"], "lost"),
        (200, ["{}"], "lost"),
        (500, ["Internal Server Error"], "lost"),
        (502, ["[]"], "lost"),
        (200, [], "lost"),
        (None, ["ReadError: "], "lost"),
    ],
)
def test_what_became_of_a_request(status, lines, outcome):
    assert outcome_of(status, lines) == outcome


def test_a_connection_that_breaks_loses_its_request():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
        await send({"type": "http.response.body", "body": b"data: a\n\n", "more_body": True})
        raise ConnectionError

    with serving(app, lifespan="off") as url:
        (found,), _ = asyncio.run(ask_all(url, [b"{}"], 1, range(1)))
    # the server closes or resets the connection: which of the two the client sees first is a race
    assert found.outcome == "lost" and re.match("no status: (RemoteProtocolError|ReadError): ", found.said)


def test_rates_are_those_of_the_answers():
    found = [Asked("answered", "200: x", 1.0, 2.0, 5), *[Asked("refused", "503: y", 0.1, 0.1)] * 2]
    assert outcomes(found) == {"answered": 1, "refused": 2, "lost": 0, "errors": ["503: y"]}
    row = rates(found, 4.0)
    assert row["requests_per_second"] == 0.25 and row["seconds_p99"] == 2.0 and row["first_token_p50"] == 1.0
    assert rates(found[1:], 4.0) == {"requests_per_second": 0.0}


def test_percentiles_lie_within_what_was_measured():
    assert percentiles([2.0]) == {"p50": 2.0, "p99": 2.0}
    assert percentiles([float(number) for number in range(101)]) == {"p50": 50.0, "p99": 99.0}


def test_the_table_compares_with_the_first_server():
    parts = dict.fromkeys(("first_token_p50", "first_token_p99", "seconds_p50", "seconds_p99"), 0.1)
    rows = [
        {"system": f"s{size}", "clients": 8, "requests_per_second": 10.0 * size, "batch_size_mean": size, **parts}
        for size in (1, 2)
    ]
    *_, first, second = format_load(rows).splitlines()
    assert first == "| 8 | s1 | 10.0 | 1.00 | 1.0 | 100 | 100 | 100 | 100 |"
    assert second == "| 8 | s2 | 20.0 | 2.00 | 2.0 | 100 | 100 | 100 | 100 |"
