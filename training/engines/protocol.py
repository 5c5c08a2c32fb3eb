"""Questions to a process that runs another engine: one JSON object per line, to its stdin and from its stdout.

Imports nothing but the standard library: the process may run in another environment.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]


class EngineError(ValueError):
    """An engine that cannot be used, and why, in one line."""


class Worker:
    """A process that runs one engine, ready for questions.

    Args:
        module: module of the worker, started with `python -m`; it calls [`serve`].
        arguments: its command line.
        python: interpreter of its environment.
        log: file for everything that it prints beside its replies.
        path: folders to import from, in addition to the root of this repository.

    Raises EngineError if it does not start.
    """

    def __init__(self, module: str, arguments: list[str], python: str, log: Path, path: tuple[Path, ...] = ()):
        self.log = log
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}
        with log.open("w") as printed:
            self.process = subprocess.Popen(
                [python, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                env=environment,
                text=True,
            )
        try:
            self.read()  # everything is imported
            self.before = self.memory("VmRSS")
            loaded = self.read()
            self.weight_bytes, self.version = loaded["weight_bytes"], loaded["version"]
        except EngineError:
            self.close()
            raise

    def ask(self, **request: Any) -> dict:
        """The reply to a request. Raises EngineError if the engine fails."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended, which reading reports
        return self.read()

    def peak_memory(self, **request: Any) -> int:
        """Peak memory in bytes during a request, beyond what the process had before it loaded the model."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # reset the peak
        self.ask(**request)
        return self.memory("VmHWM") - self.before

    def memory(self, name: str) -> int:
        """A field of the status of the process, in bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(f"{name}:"))
        return 1024 * int(line.split()[1])

    def read(self) -> dict:
        """The next reply. Raises EngineError for a failure, or if the process has ended."""
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()  # its last words come after its last reply
            said = self.log.read_text().split("\n")
            last = next((each for each in reversed(said) if each.strip()), "nothing was printed")
            raise EngineError(f"{last.strip()} (see {self.log})")
        reply = json.loads(line)
        if "error" in reply:
            raise EngineError(reply["error"])
        return reply

    def close(self):
        """End the process."""
        self.process.kill()
        self.process.communicate()


def serve(load: Callable[..., tuple[Callable[..., dict], dict]]):
    """Answer the requests on stdin until it closes.

    Args:
        load: takes the command line; returns a function from the fields of a request to the seconds of its answer by
            part, and a description: name and version of the engine (`version`), size of the weights (`weight_bytes`).
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the replies

    def reply(fields: dict):
        replies.write(json.dumps(fields) + "\n")

    reply({})
    try:
        answer, description = load(*sys.argv[1:])
        reply(description)
        for line in sys.stdin:
            reply(answer(**json.loads(line)))
    except Exception as error:
        reply({"error": " ".join(f"{type(error).__name__}: {error}".split())})
        raise
