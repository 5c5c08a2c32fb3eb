"""The load on replicas: outcomes of requests, processes, and the table of hub_cards/serve_ray_load.py."""

import asyncio
import os
import subprocess
import sys

import pytest
from serve_ray_load import ask_all, born, cpu_seconds, descendants, end, format_ray_load, kill_after, memory
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


def test_what_is_below_a_process_ends_with_it():
    sleep = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]).wait()"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    wait_until(lambda: descendants(process.pid))
    (child,) = descendants(process.pid)
    assert {process.pid, child} <= set(descendants(os.getpid())) and memory(process.pid) > 0
    assert 0 <= cpu_seconds(process.pid)[child] < 60
    kill_after(3, process.pid, 2)
    assert process.poll() is None and born(child)
    kill_after(3, process.pid, 3)
    assert process.wait(20) == -9
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    wait_until(lambda: descendants(process.pid))
    (other,) = descendants(process.pid)
    end(process, 15)
    wait_until(lambda: not born(other))
    os.kill(child, 9)


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
