"""The load on replicas: outcomes of requests, processes, and the table of hub_cards/serve_ray_load.py."""

import asyncio
import inspect
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import serve_processes
import serve_ray_load
from serve_processes import Running, process_tree
from serve_ray_load import RayLoadArguments, ask_all, cpu_seconds, format_ray_load, kill_after, measure_all, memory
from serving import serving, wait_until


DONE, ERROR = b"data: [DONE]\n\n", b'data: {"error": {"code": "replica_lost"}}\n\n'


@pytest.mark.parametrize(
    "status, pieces, kind",
    [
        (200, [b"data: a\n\n", DONE], "answered"),
        (200, [b'{"id":"a","object":"chat.completion"}'], "answered"),
        (200, [b"data: a\n\n", ERROR], "refused"),
        (503, [b'{"error": {}}'], "refused"),
        (500, [b"Internal Server Error"], "lost"),
        (200, [b"data: a\n\n"], "lost"),  # the stream ends without saying so
        (200, [b"data: a\n\n", None], "lost"),  # the connection breaks
    ],
)
def test_outcomes_of_requests(status, pieces, kind):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": []})
        for piece in pieces:
            if piece is None:
                return
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    seen = []
    with serving(app, lifespan="off") as url:
        found = asyncio.run(ask_all(url, [b"{}"], 2, 5, seen.append))
    assert [(each.kind, each.status) for each in found] == [(kind, status)] * 5 and seen == [1, 2, 3, 4, 5]


def test_work_and_memory_are_those_below_a_process():
    sleep = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]).wait()"
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: process_tree(process.pid)[1:])
    _, child = process_tree(process.pid)
    assert memory(process.pid) > 0 and 0 <= cpu_seconds(process.pid)[child] < 60
    kill_after(3, process.pid, 2)
    assert process.poll() is None
    kill_after(3, process.pid, 3)
    assert process.wait(20) == -9
    os.kill(child, 9)


def test_every_server_is_measured(tmp_path, monkeypatch):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": DONE})

    run = RayLoadArguments(clients=[2], requests=6, output_dir=str(tmp_path))
    started, signature = [], inspect.signature(serve_processes.started)
    with (
        serving(app, lifespan="off") as url,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim,
    ):

        @contextmanager
        def server(*given):
            command = signature.bind(*given).arguments["command"]
            started.append(command.words[2:])
            yield Running(url, os.getpid(), tmp_path)

        @contextmanager
        def fleet(log, replicas, args):
            started.append(replicas)
            yield SimpleNamespace(url=url, ray=SimpleNamespace(pid=0), wait_for=lambda count: 1.5)

        monkeypatch.setattr(serve_ray_load, "started", server)
        monkeypatch.setattr(serve_ray_load, "started_fleet", fleet)
        monkeypatch.setattr(serve_ray_load, "replica_pids", lambda pid: [victim.pid])
        rows = measure_all(run)
    assert started == [(f"--model={run.model}", "--max_batch_size=8", "--max_waiting=2"), 1, 2]
    assert [row["system"] for row in rows] == ["serve.py", "1 replica", "2 replicas", "2 replicas, one killed"]
    assert {row["answered"] for row in rows} == {6} and victim.returncode == -9
    assert [row["seconds_to_recover"] for row in rows] == [None, None, None, 1.5]


@pytest.mark.parametrize("fields", [{"batch_sizes": [1, 8]}, {"repeats": 3}])
def test_options_of_other_scripts_are_refused(fields):
    with pytest.raises(ValueError, match="must be one batch size and one turn"):
        RayLoadArguments(**fields)


def test_the_table_counts_what_was_lost():
    parts = dict.fromkeys(("first_p50", "first_p99", "seconds_p50", "seconds_p99"), 0.1)
    counts = {
        "requests_per_second": 2.5,
        "answered": 9,
        "refused": 1,
        "lost": 0,
        "memory_gb": 2.04,
        "cpu_seconds_per_request": 0.03,
    }
    *_, row = format_ray_load([{"system": "s", "clients": 8, **counts, **parts}]).splitlines()
    assert row == "| 8 | s | 2.5 | 9 | 1 | 0 | 100 | 100 | 100 | 100 | 30 | 2.0 |"
