"""Servers as processes: started, watched and ended by hub_cards/serve_processes.py."""

import os
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import serve_processes
from serve_processes import Command, MemoryWatch, Running, end, process_tree, resident_memory, started, vllm
from serving import serving


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "held = b'1' * 100_000_000; input()"], stdin=subprocess.PIPE)
{}
"""
WEB = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1].partition("=")[2])), Handler).serve_forever()
"""


def python(code, **environment):
    return Command("a server", (sys.executable, "-c", code), environment)


def is_running(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_a_server_is_ended_with_all_below_it(tmp_path):
    with started(python(PARENT.format(WEB)), tmp_path / "log") as server:
        pids = process_tree(server.pid)
        assert len(pids) == 2 and pids[0] == server.pid
        assert server.metric("missing") == 0
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline


def test_a_process_that_has_the_id_of_an_ended_one_is_left_alone(monkeypatch):
    """Ids are used again: what was below a server may be another program by the time that the server has ended."""
    process = subprocess.Popen([sys.executable, "-c", PARENT.format("input()")], stdin=subprocess.PIPE)
    while len(process_tree(process.pid)) < 2:
        time.sleep(0.01)
    _, child = process_tree(process.pid)
    clock = iter(("1", "2"))
    monkeypatch.setattr(serve_processes, "born", lambda pid: next(clock))
    end(process)
    assert process.returncode == -15 and is_running(child)
    os.kill(child, 9)


def test_memory_is_that_of_all_processes():
    process = subprocess.Popen([sys.executable, "-c", PARENT.format("input()")], stdin=subprocess.PIPE)
    try:
        with MemoryWatch(process.pid, 0.01) as memory:
            deadline = time.monotonic() + 20
            while memory.samples[-1] < 105e6:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert max(memory.samples) < 300e6
        (_, child) = process_tree(process.pid)
        assert resident_memory(child) > 90e6 > resident_memory(process.pid) - resident_memory(child)
    finally:
        process.communicate()
    assert resident_memory(process.pid) == 0


def test_a_server_that_does_not_start_gives_its_last_words(tmp_path):
    command = python("import os, sys; sys.exit('no ' + os.environ['WHAT'])", WHAT="model")
    with pytest.raises(OSError, match=r"a server did not start: \['no model'\]"), started(command, tmp_path / "log"):
        pass


def test_metrics_are_summed_over_labels(tmp_path):
    text = b'# HELP n of it\nn{engine="0"} 2.0\nn{engine="1"} 3.5\nn_created{engine="0"} 9\nbare 1e2\n'

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": text})

    with serving(app, lifespan="off") as url:
        server = Running(url, 0, tmp_path)
        assert (server.metric("n"), server.metric("bare"), server.metric("other")) == (5.5, 100, 0)


def test_vllm_that_is_missing_names_what_sets_it_up(tmp_path):
    with pytest.raises(OSError, match=r"vLLM is not set up \(\S*python is missing\): make vllm"):
        vllm(str(tmp_path / "python"), "model")
