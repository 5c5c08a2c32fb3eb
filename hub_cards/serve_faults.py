"""What do faulty clients do to the others? Valid requests, `/health` and memory of the server meanwhile.

    python hub_cards/serve_faults.py --output_dir outputs/serve_faults

`serve.py` answers a steady load of valid requests on this machine while clients at another address (127.0.0.2) vanish
in the middle of requests, send bodies slowly, send 10 MB of garbage, or hold 200 idle connections. Then it gets ten
minutes of mixed requests: text alone, one image, two images, streams, two questions about one image; and so does vLLM
with `qgsa_vllm`, if `make vllm` has set it up. A request is answered, refused with a status, or lost, which none may
be. Writes `serve_faults_cpu.json` and prints the table.
"""

import asyncio
import json
import os
import random
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import httpx
from export import ExportArguments, export
from serve_load import ask_all, make_body, outcomes, rates
from serve_processes import VLLM_PYTHON, MemoryWatch, Running, ours, started, vllm
from tqdm.auto import tqdm

from training.cli.arguments import errors_in_one_line, parse
from training.data.cards import Cards
from training.evaluation.report import write_results


NAME = "serve_faults_cpu"
ATTACKER = "127.0.0.2"  # an address of its own, as it would have; all of 127.0.0.0/8 is loopback on Linux
VANISHING, SLOW, SENDING, IDLE = 8, 16, 2, 200  # faulty clients at the same time
GARBAGE_BYTES = 10_000_000
SECONDS_FOR_GARBAGE = 10  # to send it, and to the response
SECONDS_TO_SETTLE = 3  # before memory is read
SECONDS_FOR_HEALTH = 60
SECONDS_BETWEEN_LOOKS = 0.1  # at /health
VLLM_OPTIONS = ("--dtype=float32", "--max-model-len=2048", '--limit-mm-per-prompt={"image": 2}')


@dataclass
class FaultsArguments:
    """The model, the faults and the load."""

    model: str = field(default="hub_cards/tiny-qgsa", metadata={"help": "QGSA checkpoint: Hub id or folder."})
    faults: list[str] = field(
        default_factory=lambda: list(FAULTS), metadata={"help": "Faults of clients, one after another."}
    )
    servers: list[str] = field(
        default_factory=lambda: ["serve.py", "vllm"], metadata={"help": "Servers that get the mixed load."}
    )
    clients: int = field(default=4, metadata={"help": "Clients that send valid requests at the same time."})
    fault_seconds: float = field(default=20, metadata={"help": "Seconds of each fault."})
    mixed_seconds: float = field(default=600, metadata={"help": "Seconds of mixed load; 0 leaves it out."})
    max_new_tokens: int = field(default=8, metadata={"help": "Tokens per answer."})
    vllm_python: str = field(
        default=str(VLLM_PYTHON), metadata={"help": "Python of the environment that make vllm sets up."}
    )
    output_dir: str = field(default="outputs/serve_faults", metadata={"help": "Folder for results and logs."})

    def __post_init__(self):
        for name, known in (("faults", list(FAULTS)), ("servers", ["serve.py", "vllm"])):
            unknown = [each for each in getattr(self, name) if each not in known]
            if unknown:
                raise ValueError(f"{name} ({', '.join(unknown)}): choose from {', '.join(known)}")
        for name, least in (("clients", 1), ("max_new_tokens", 1), ("fault_seconds", 0), ("mixed_seconds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}")


class Attack:
    """Faulty clients of one server.

    Args:
        url: the server.
        body: a valid request.

    Attributes:
        connections: how many connections they made so far.
    """

    def __init__(self, url: str, body: bytes):
        self.host, self.port, self.body = urlsplit(url).hostname, urlsplit(url).port, body
        self.connections, self.random = 0, random.Random(0)
        image = f"data:image/png;base64,{b64encode(os.urandom(GARBAGE_BYTES * 3 // 4)).decode()}"
        content = [{"type": "image_url", "image_url": {"url": image}}]
        self.garbage = [
            self.head(GARBAGE_BYTES) + os.urandom(GARBAGE_BYTES),
            self.whole(json.dumps({"messages": [{"role": "user", "content": content}]}).encode()),
            self.whole(b"[" * GARBAGE_BYTES),
            os.urandom(GARBAGE_BYTES),  # not even HTTP
        ]

    def head(self, length: int) -> bytes:
        lines = ("POST /v1/chat/completions HTTP/1.1", f"Host: {self.host}", "Content-Type: application/json")
        return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()

    def whole(self, body: bytes) -> bytes:
        return self.head(len(body)) + body

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection, which is reset at the end of the block."""
        reader, writer = await asyncio.open_connection(self.host, self.port, local_addr=(ATTACKER, 0))
        self.connections += 1
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def vanish(self, number: int):
        """Send a part of a request, or all of it, and disconnect within half a second."""
        async with self.connection() as (_, writer):
            request = self.whole(self.body)
            whole = self.random.random() < 0.5
            writer.write(request if whole else request[: self.random.randrange(len(request))])
            await asyncio.sleep(self.random.uniform(0, 0.5))

    async def dawdle(self, number: int):
        """Send a byte of a body per second; every second client none at all."""
        async with self.connection() as (reader, writer):
            writer.write(self.head(len(self.body)))
            for byte in self.body:
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await reader.read()  # returns once the server closes the connection
                        return
                writer.write(bytes([byte] * (number % 2)))

    async def send_garbage(self, number: int):
        """Send 10 MB that are not a request, and wait for the response."""
        async with self.connection() as (reader, writer):
            writer.write(self.garbage[self.connections % len(self.garbage)])
            async with asyncio.timeout(SECONDS_FOR_GARBAGE):
                await writer.drain()
                await reader.read(1)

    async def be_idle(self, number: int):
        """Connect and send nothing; come back half a second after the server has closed the connection."""
        with suppress(OSError):
            async with self.connection() as (reader, _):
                await reader.read()
        await asyncio.sleep(0.5)

    async def keep_on(self, clients: int, once: Callable[[int], Awaitable[None]]):
        """Run so many clients, each again and again, until cancelled."""

        async def repeat(number: int):
            while True:
                with suppress(OSError):  # the server takes no connection, or closes it early
                    await once(number)
                await asyncio.sleep(0.01)

        await asyncio.gather(*map(repeat, range(clients)))


FAULTS: dict[str, tuple[int, Callable | None]] = {
    "none": (0, None),
    "clients that vanish": (VANISHING, Attack.vanish),
    "slow bodies": (SLOW, Attack.dawdle),
    "10 MB of garbage": (SENDING, Attack.send_garbage),
    "200 idle connections": (IDLE, Attack.be_idle),
    "none, afterwards": (0, None),
}


def until(seconds: float) -> Iterator[int]:
    """Numbers of requests for so many seconds."""
    deadline = time.monotonic() + seconds
    for number in count():
        if time.monotonic() >= deadline:
            return
        yield number


async def watch_health(url: str, waits: list[tuple[float, bool]]):
    """Ask for `/health` on new connections until cancelled.

    Args:
        waits: gets the seconds of each wait, and whether the status was 200; the last one may be cut short.
    """
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=SECONDS_FOR_HEALTH, trust_env=False) as client:
        while True:
            began, healthy = time.perf_counter(), False
            try:
                healthy = (await client.get("/health")).status_code == 200
            except httpx.TransportError:
                pass
            except asyncio.CancelledError:
                healthy = True  # as far as is known
                raise
            finally:
                waits.append((time.perf_counter() - began, healthy))
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)


async def under(server: Running, bodies: list[bytes], clients: int, seconds: float, fault: str) -> dict:
    """Valid requests during a fault: outcomes, rates, and the longest wait for `/health`."""
    faulty, once = FAULTS[fault]
    attack, waits = Attack(server.url, bodies[0]), [(0.0, True)]
    beside = [asyncio.create_task(watch_health(server.url, waits))]
    if once is not None:
        beside.append(asyncio.create_task(attack.keep_on(faulty, lambda number: once(attack, number))))
    found, took = await ask_all(server.url, bodies, clients, until(seconds))
    for task in beside:
        task.cancel()
    ended = await asyncio.gather(*beside, return_exceptions=True)
    for error in ended:
        if not isinstance(error, asyncio.CancelledError):
            raise error
    row = {"seconds": took, "clients": clients, "faulty_connections": attack.connections}
    seconds, healthy = zip(*waits)
    health = {"health_max": max(seconds), "health_failed": healthy.count(False)}
    return row | outcomes(found) | rates(found, took) | health


def measure(server: Running, bodies: list[bytes], clients: int, seconds: float, fault: str = "none") -> dict:
    """`under`, with memory before, halfway through, at most and after, and how many tracebacks the server printed."""
    before = server.log.read_text().count("Traceback")
    with MemoryWatch(server.pid) as memory:
        row = asyncio.run(under(server, bodies, clients, seconds, fault))
        half = memory.samples[len(memory.samples) // 2]
        time.sleep(SECONDS_TO_SETTLE)
    names = ("before", "half", "peak", "after")
    values = (memory.samples[0], half, max(memory.samples), memory.samples[-1])
    row |= {f"memory_{name}_bytes": value for name, value in zip(names, values)}
    return row | {"tracebacks": server.log.read_text().count("Traceback") - before}


def mixed_bodies(run: FaultsArguments) -> list[bytes]:
    """Text alone, one image, two images, streams, two questions about one image, in turns."""
    cards, bodies = Cards("test", 64), []
    fields = {"max_tokens": run.max_new_tokens, "temperature": 0}
    for number in range(0, 64, 4):
        one, two, three, four = (cards[number + each] for each in range(4))
        bodies += [
            make_body("how many cards are there?", **fields),
            make_body(one["question"], [one["image"]], **fields),
            make_body(two["question"], [two["image"], three["image"]], **fields),
            make_body(three["question"], [three["image"]], stream=True, **fields),
            make_body(four["question"], [four["image"]], **fields),
            make_body("what is on the cards?", [four["image"]], **fields),
        ]
    return bodies


def measure_all(run: FaultsArguments) -> Iterator[dict]:
    """Rows of the faults, then those of the mixed load; servers that are missing say so."""
    output, bodies = Path(run.output_dir), mixed_bodies(run)
    steady = bodies[1::6]  # about one image each
    with started(ours(run.model), output / "serve.log") as server:
        asyncio.run(ask_all(server.url, bodies, run.clients, range(len(bodies))))  # warms up
        for fault in tqdm(run.faults, desc="faults"):
            yield {"server": "serve.py", "fault": fault} | measure(
                server, steady, run.clients, run.fault_seconds, fault
            )
    for name in run.servers if run.mixed_seconds else []:
        row = {"server": name, "fault": "mixed load"}
        try:
            with ExitStack() as stack:
                folder = Path(stack.enter_context(TemporaryDirectory(dir=output))).resolve()
                command = ours(run.model) if name == "serve.py" else vllm_plugin(run, folder / "qgsa")
                server = stack.enter_context(started(command, output / f"{name}-mixed.log"))
                asyncio.run(ask_all(server.url, bodies, run.clients, range(len(bodies))))
                yield row | measure(server, bodies, run.clients, run.mixed_seconds)
        except OSError as error:
            yield row | {"skipped": str(error)}


def vllm_plugin(run: FaultsArguments, folder: Path):
    """vLLM with our plugin, which needs an exported checkpoint. Raises OSError if it is not installed."""
    command = vllm(run.vllm_python, folder, *VLLM_OPTIONS)
    export(ExportArguments(run.model, str(folder)))
    return command


def format_faults(rows: list[dict]) -> str:
    """The rows as a Markdown table; without: requests for `/health` that got no 200."""
    lines = [
        "| server | fault | seconds | answered | refused | lost | requests per second | answer, ms: p50 | p99 "
        "| longest /health, ms | without | memory, MB: before | half | peak | after | tracebacks |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['server']} | {row['fault']} |"
        if "skipped" in row:
            lines.append(f"{head} skipped: {row['skipped']} |" + " – |" * 13)
            continue
        counts = " | ".join(str(row[each]) for each in ("answered", "refused", "lost"))
        waits = [row.get(name) for name in ("seconds_p50", "seconds_p99", "health_max")]
        cells = " | ".join("–" if wait is None else f"{1000 * wait:.0f}" for wait in waits)
        memory = " | ".join(f"{row[f'memory_{each}_bytes'] / 1e6:.0f}" for each in ("before", "half", "peak", "after"))
        lines.append(
            f"{head} {row['seconds']:.0f} | {counts} | {row['requests_per_second']:.1f} | {cells} "
            f"| {row['health_failed']} | {memory} | {row['tracebacks']} |"
        )
    return "\n".join(lines)


def main():
    with errors_in_one_line():
        run = parse(FaultsArguments, __doc__)
        output, rows = Path(run.output_dir), []
        output.mkdir(parents=True, exist_ok=True)
        for row in measure_all(run):
            rows.append(row)
            write_results(output / f"{NAME}.json", NAME, "cards", len(rows), 0, rows)
    print(format_faults(rows))


if __name__ == "__main__":
    main()
