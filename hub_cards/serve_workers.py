"""Jobs with bounded time and memory, in processes that can be killed.

A thread cannot be stopped, and holds the interpreter while a library parses. A worker is a Python script that calls
`work`, and imports little (never torch), so that it starts soon. Jobs and results are JSON and bytes: a pickle from a
worker could run code in the server.
"""

import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


SECONDS_TO_START = 60  # on a busy machine; a tenth to two seconds otherwise
LENGTHS = struct.Struct("<QQ")  # of the JSON and of the bytes behind it


class WorkerKilled(Exception):
    """A job took more time or memory than it may, or crashed its worker."""


def write(stream: IO[bytes], fields: dict, data=b""):
    """Write one message; `data` is bytes or a view of them."""
    head = json.dumps(fields).encode()
    stream.write(LENGTHS.pack(len(head), len(data)) + head)
    stream.write(data)
    stream.flush()


def read(stream: IO[bytes]) -> tuple[dict, bytes]:
    """Read one message as `(fields, data)`. Raises EOFError if the other side has ended."""
    lengths = LENGTHS.unpack(read_exactly(stream, LENGTHS.size))
    head, data = (read_exactly(stream, length) for length in lengths)
    return json.loads(head), data


def read_exactly(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return data


def work(answer: Callable[[dict, bytes], tuple[dict, bytes]]):
    """Main loop of a worker: `answer` jobs from standard input within the memory (bytes) given on the command line."""
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then closes the input
    jobs, results = sys.stdin.buffer, sys.stdout.buffer
    try:
        write(results, {})  # all is imported
        while True:
            write(results, *answer(*read(jobs)))
    except (EOFError, BrokenPipeError, MemoryError):
        os._exit(1)  # without the traceback, for which there may be no memory


class Worker:
    """One process, which may be started long before its first job. It is `alive` until it has been killed."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.alive, self.ready = True, False

    def ask(self, seconds: float, fields: dict, data) -> tuple[dict, bytes]:
        """Do a job. Raises WorkerKilled."""
        if not self.ready:
            with self.killed_after(SECONDS_TO_START):
                read(self.process.stdout)
            self.ready = True
        with self.killed_after(seconds):
            write(self.process.stdin, fields, data)
            return read(self.process.stdout)

    @contextmanager
    def killed_after(self, seconds: float) -> Iterator[None]:
        timer = threading.Timer(seconds, self.kill)
        timer.start()
        try:
            yield
        except (EOFError, OSError) as error:
            self.kill()
            raise WorkerKilled from error
        finally:
            timer.cancel()
            timer.join()

    def kill(self):
        """Kill the process, from any thread."""
        self.alive = False
        self.process.kill()

    def end(self):
        """Kill the process and free all that it holds."""
        self.kill()
        self.process.stdout.close()
        try:
            self.process.stdin.close()
        except BrokenPipeError:  # of a job that was not read to its end
            pass
        self.process.wait()


class Workers:
    """Processes of one script, which take jobs from any thread. One that is killed is replaced.

    Args:
        script: the script, which calls `work`.
        count: number of processes.
        memory: address space per process in bytes, where the system can limit it (not on Windows).
    """

    def __init__(self, script: Path, count: int, memory: int):
        self.command = [sys.executable, str(script), str(memory)]
        self.all = [Worker(self.command) for _ in range(count)]
        self.idle: queue.Queue[Worker] = queue.Queue()
        for worker in self.all:
            self.idle.put(worker)
        self.closed = False

    def run(self, seconds: float, fields: dict, data=b"") -> tuple[dict, bytes]:
        """Run a job once a worker is idle; returns its result. Raises WorkerKilled, if need be after `seconds`."""
        worker = self.idle.get()
        try:
            if self.closed:
                raise WorkerKilled
            if worker.process.poll() is not None:  # killed from outside while it was idle
                worker = self.replace(worker)
            return worker.ask(seconds, fields, data)
        finally:
            if not worker.alive and not self.closed:
                worker = self.replace(worker)
            self.idle.put(worker)

    def replace(self, worker: Worker) -> Worker:
        worker.end()
        self.all.remove(worker)
        self.all.append(Worker(self.command))
        return self.all[-1]

    def close(self):
        """End all workers, and with them the jobs that they have or will get."""
        self.closed = True
        for worker in list(self.all):
            worker.kill()
        ended = [self.idle.get() for _ in list(self.all)]
        for worker in ended:
            worker.end()
            self.idle.put(worker)
