"""Processes of other engines, one of which is made up: requests, replies, memory, and every way to fail."""

import sys

import pytest

from training.engines.protocol import EngineError, Worker


MADE_UP = """
import os
import sys
import time
from training.engines.protocol import serve

def load(weight_bytes):
    print("loading")  # not a reply
    if weight_bytes == "bad":
        raise OSError("no such\\n  model")

    def answer(**request):
        if request.get("fail"):
            raise ValueError("cannot answer")
        if request.get("end"):
            os.dup2(2, 3)  # the pipe of its replies closes well before its last words
            time.sleep(0.3)
            sys.exit("out of luck")
        held = bytearray(request.get("size", 0))
        held[::4096] = b"x" * len(held[::4096])
        return {"total": 1.5, "question": request.get("question")}

    return answer, {"version": "made-up 1", "weight_bytes": int(weight_bytes)}

serve(load)
"""


@pytest.fixture
def start(tmp_path):
    """Starts the made-up engine with arguments of its own; ends all of them after the test."""
    (tmp_path / "made_up.py").write_text(MADE_UP)
    started = []

    def start(*arguments, module="made_up"):
        worker = Worker(module, list(arguments), sys.executable, tmp_path / f"log{len(started)}", (tmp_path,))
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.close()


def test_it_answers_one_request_after_another(start):
    worker = start("7")
    assert (worker.version, worker.weight_bytes) == ("made-up 1", 7)
    for question in ("what?", "ein Wort\nmehr", "is it 3 × 4?"):
        assert worker.ask(question=question) == {"total": 1.5, "question": question}
    assert worker.log.read_text() == "loading\n"


def test_its_memory_is_that_of_the_request(start):
    worker = start("7")
    assert 150e6 < worker.peak_memory(size=200_000_000) < 300e6
    assert worker.peak_memory(size=0) < 50e6


def test_an_engine_that_does_not_start_says_why(start):
    with pytest.raises(EngineError, match="^OSError: no such model$"):
        start("bad")
    with pytest.raises(EngineError, match=r"No module named missing_engine \(see .*log0\)"):
        start(module="missing_engine")


def test_an_engine_that_fails_says_why(start):
    with pytest.raises(EngineError, match="^ValueError: cannot answer$"):
        start("7").ask(fail=True)
    worker = start("7")
    for _ in range(2):  # also when it has ended already
        with pytest.raises(EngineError, match="out of luck"):
            worker.ask(end=True)
