"""Workers of hub_cards/serve.py: killed in time, replaced, and ended."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serve_workers import WorkerKilled, Workers


FOLDER = Path(__file__).resolve().parents[2] / "hub_cards"
SCRIPT = """
import os, time
from serve_workers import work

def answer(job, data):
    time.sleep(job.get("sleep", 0))
    if job.get("crash"):
        os._exit(1)
    return {**job, "process": os.getpid(), "got": len(bytearray(job.get("memory", 0)))}, data[::-1]

work(answer)
"""


@pytest.fixture
def workers(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    (tmp_path / "script.py").write_text(SCRIPT)
    workers = Workers(tmp_path / "script.py", 2, 2**29)
    yield workers
    workers.close()
    assert all(worker.process.returncode is not None for worker in workers.all)


def test_jobs_and_results(workers):
    data = bytes(range(256)) * 40_000
    fields, got = workers.run(30, {"a": [1, "\N{SNOWMAN}"]}, data)
    assert fields["a"] == [1, "\N{SNOWMAN}"] and got == data[::-1]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda number: workers.run(30, {"number": number})[0], range(40)))
    assert [result["number"] for result in results] == list(range(40))
    assert len({result["process"] for result in results}) <= 2


@pytest.mark.parametrize("job", [{"sleep": 60}, {"crash": True}, {"memory": 2**30}])
def test_a_worker_that_is_killed_is_replaced(job, workers):
    before = {workers.run(30, {})[0]["process"] for _ in range(4)}
    started = time.perf_counter()
    for _ in range(3):
        with pytest.raises(WorkerKilled):
            workers.run(0.3, job)
    assert time.perf_counter() - started < 20
    after = {workers.run(30, {})[0]["process"] for _ in range(4)}
    assert len(after) == len(workers.all) == 2 and not before & after


def test_a_worker_that_was_killed_from_outside_is_replaced(workers):
    for _ in range(4):
        workers.run(30, {})
    for worker in workers.all:
        worker.process.kill()
        worker.process.wait()
    assert workers.run(30, {})[0]["got"] == 0


def test_jobs_end_with_the_workers(workers):
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(workers.run, 60, {"sleep": 60})
        time.sleep(0.5)
        workers.close()
        with pytest.raises(WorkerKilled):
            job.result(10)
        with pytest.raises(WorkerKilled):
            workers.run(60, {})
