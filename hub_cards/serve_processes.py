"""Servers that a measurement starts, watches and ends: ours, and vLLM's."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx


SERVER = Path(__file__).resolve().with_name("serve.py")
ROOT = SERVER.parent.parent
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"  # of make vllm
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB; by default it takes most of the memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
SECONDS_TO_START = 600  # vLLM on one busy core takes two minutes
SECONDS_TO_END = 60
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Command:
    """A server that can be started.

    Args:
        name: how it is called in errors.
        words: the command, to which `--port` is added.
        environment: variables in addition to those of this process.
    """

    name: str
    words: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Args:
        url: its address.
        pid: its process, which may have others below it.
        log: file of all that it prints.
    """

    url: str
    pid: int
    log: Path

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels; 0 if the server does not have it."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False).text
        return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M)))


def ours(model: str | Path, **options) -> Command:
    """`serve.py` with a checkpoint and further options."""
    given = {"model": model, **options}
    return Command(
        SERVER.name, (sys.executable, str(SERVER), *(f"--{name}={each}" for name, each in given.items())), {}
    )


def vllm(python: str, model: str | Path, *options: str) -> Command:
    """vLLM's server on the CPU; its command line does not start in the build for CPUs, but its module does.

    Raises OSError if it is not installed.
    """
    if not Path(python).exists():
        raise OSError(f"vLLM is not set up ({python} is missing): make vllm")
    words = (python, "-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1", f"--model={model}")
    return Command("vLLM", (*words, "--enforce-eager", *options), VLLM_ENVIRONMENT)


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def started(command: Command, log: Path) -> Iterator[Running]:
    """Start a server on a free port, wait until it answers, and end it and the processes below it.

    Raises OSError if it does not start.
    """
    port = free_port()
    words, environment = [*command.words, f"--port={port}"], {**os.environ, **command.environment}
    # A file: a pipe that nobody reads would fill up, and then hold the server.
    with log.open("w") as printed, subprocess.Popen(words, stdout=printed, stderr=printed, env=environment) as process:
        running = Running(f"http://127.0.0.1:{port}", process.pid, log)
        try:
            wait_until_healthy(command.name, running, process)
            yield running
        finally:
            end(process)


def wait_until_healthy(name: str, running: Running, process: subprocess.Popen):
    """Return once `/health` has status 200. Raises OSError if the server ends, or takes too long."""
    deadline = time.monotonic() + SECONDS_TO_START
    with httpx.Client(trust_env=False) as client:
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if client.get(f"{running.url}/health").status_code == 200:
                    return
            time.sleep(0.2)
    raise OSError(f"{name} did not start: {running.log.read_text().strip().splitlines()[-1:]}")


def end(process: subprocess.Popen, sign: signal.Signals = signal.SIGTERM):
    """End a server with a signal, and kill it if it takes too long, and what is left of the processes below it."""
    below = {pid: born(pid) for pid in process_tree(process.pid)[1:]}
    process.send_signal(sign)
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid, when in below.items():
        if when and born(pid) == when:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def read_proc(pid: int, name: str) -> str:
    """A file that Linux has of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def born(pid: int) -> str:
    """When a process started, as the system counts; tells it from a later one with its id."""
    return "".join(read_proc(pid, "stat").rpartition(")")[2].split()[19:20])


def process_tree(pid: int) -> list[int]:
    """A process and all those below it; requires Linux."""
    parents, found = {}, [pid]
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def resident_memory(pid: int) -> int:
    """Resident memory of a process and all those below it, in bytes; shared pages count once per process."""
    total = 0
    for each in process_tree(pid):
        with suppress(OSError):
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * PAGE
    return total


class MemoryWatch:
    """Samples the resident memory of a server while the block runs.

    Attributes:
        samples: bytes, one per `seconds`.
    """

    def __init__(self, pid: int, seconds: float = 0.25):
        self.pid, self.seconds, self.over = pid, seconds, threading.Event()
        self.samples = [resident_memory(pid)]
        self.thread = threading.Thread(target=self.sample, daemon=True)

    def sample(self):
        while not self.over.wait(self.seconds):
            self.samples.append(resident_memory(self.pid))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()
