"""Jobs with bounded time and memory, in processes that can be killed.

A thread cannot be stopped, and holds the interpreter while a library parses. A worker is a Python script that calls
`work` and imports little, so that it starts in a tenth of a second. Jobs and results are JSON and bytes, never
pickles: whatever takes over a worker gets no further.
"""

import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO


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
    while True:
        try:
            write(results, *answer(*read(jobs)))
        except (EOFError, BrokenPipeError, MemoryError):
            os._exit(1)  # without the traceback, for which there may be no memory


class Workers:
    """Processes of one script, which take jobs from any thread. One that is killed is replaced.

    Args:
        script: the script, which calls `work`.
        count: number of processes.
        memory: address space per process in bytes, where the system can limit it (not on Windows).
    """

    def __init__(self, script: Path, count: int, memory: int):
        self.command = [sys.executable, str(script), str(memory)]
        self.idle: queue.Queue[subprocess.Popen] = queue.Queue()
        self.processes: set[subprocess.Popen] = set()
        self.closed = False
        for _ in range(count):
            self.start()

    def start(self):
        process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.processes.add(process)
        self.idle.put(process)

    def end(self, process: subprocess.Popen):
        self.processes.discard(process)
        process.kill()
        process.stdout.close()
        try:
            process.stdin.close()
        except BrokenPipeError:  # of a job that was not read to its end
            pass
        process.wait()

    def run(self, seconds: float, fields: dict, data=b"") -> tuple[dict, bytes]:
        """Run a job once a worker is idle; returns its result. Raises WorkerKilled, if need be after `seconds`."""
        process, expired = self.idle.get(), threading.Event()

        def kill():
            expired.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            write(process.stdin, fields, data)
            result = read(process.stdout)
        except (EOFError, OSError) as error:
            expired.set()
            raise WorkerKilled from error
        finally:
            timer.cancel()
            timer.join()
            if self.closed or not expired.is_set():
                self.idle.put(process)
            else:
                self.end(process)
                self.start()
        return result

    def close(self):
        """End all processes, also those at work."""
        self.closed = True
        for process in list(self.processes):
            process.kill()
        while self.processes:
            self.end(self.idle.get())
