"""How many requests does the server answer, and how soon? With batches and without.

    python hub_cards/serve_load.py --output_dir outputs/serve_load

Starts `serve.py` on this machine for each batch size and asks questions about cards, from 1, 8 and 32 clients by
default. Each client streams an answer, and asks the next question as soon as it is complete. The clients share the
processor with the server. Writes `serve_cpu.json` (`serve_gpu.json` if the server finds a GPU) and prints the table.
"""

import asyncio
import base64
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import httpx
import torch
from tqdm.auto import tqdm

from training.cli.arguments import errors_in_one_line, parse
from training.data.cards import Cards
from training.evaluation.report import write_results


SERVER = Path(__file__).with_name("serve.py")
SECONDS_TO_ANSWER = 600


@dataclass
class LoadArguments:
    """The model, and the load."""

    model: str = field(default="hub_cards/tiny-qgsa", metadata={"help": "QGSA checkpoint: Hub id or folder."})
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 8], metadata={"help": "Values of the server's --max_batch_size."}
    )
    clients: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Clients at the same time."})
    requests: int = field(default=160, metadata={"help": "Requests per number of clients."})
    repeats: int = field(default=3, metadata={"help": "Turns of each server; the median counts."})
    max_new_tokens: int = field(default=8, metadata={"help": "Tokens per answer."})
    output_dir: str = field(default="outputs/serve_load", metadata={"help": "Folder for results."})

    def __post_init__(self):
        numbers = {name: getattr(self, name) for name in ("requests", "repeats", "max_new_tokens")}
        numbers |= {name: min(getattr(self, name), default=0) for name in ("batch_sizes", "clients")}
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name} ({number}) must be at least 1")


@contextmanager
def started(run: LoadArguments, size: int) -> Iterator[str]:
    """A server with room for all clients, which logs to the output folder; yields its URL.

    Raises OSError if it does not start.
    """
    options = {"model": run.model, "port": 0, "max_batch_size": size, "max_waiting": max(run.clients)}
    command = [sys.executable, str(SERVER), *(f"--{name}={value}" for name, value in options.items())]
    path = Path(run.output_dir) / "server.log"  # a pipe that nobody reads would fill up, and then hold the server
    with path.open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while not (found := re.search(r"running on (http://\S+)", path.read_text())):
            if process.poll() is not None:
                raise OSError(f"{SERVER.name} did not start: {path.read_text().strip().splitlines()[-1:]}")
            time.sleep(0.1)
        try:
            yield found[1]
        finally:
            process.terminate()


def make_bodies(run: LoadArguments) -> list[bytes]:
    """Requests about one image each."""
    bodies, cards = [], Cards("test", 40)
    for sample in (cards[index] for index in range(len(cards))):
        data = io.BytesIO()
        sample["image"].save(data, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample["question"]}]
        body = {"messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": run.max_new_tokens}
        bodies.append(json.dumps(body).encode())
    return bodies


async def ask(client: httpx.AsyncClient, body: bytes) -> tuple[float, float]:
    """Seconds to the first token of an answer, and to its end. Raises OSError unless it is complete."""
    began, first, line = time.perf_counter(), None, ""
    headers = {"content-type": "application/json"}
    async with client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
        async for each in response.aiter_lines():
            first = first or time.perf_counter()
            line = each or line
    if response.status_code != 200 or line != "data: [DONE]":
        raise OSError(f"the server answered {response.status_code}: {line[:500]}")
    return first - began, time.perf_counter() - began


async def load(url: str, bodies: list[bytes], clients: int, requests: int) -> dict[str, float]:
    """Ask `requests` questions with so many clients, each of which waits for its answer before it goes on."""
    left, found = iter(range(requests)), []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def ask_on(client):
        for number in left:
            found.append(await ask(client, bodies[number % len(bodies)]))

    options = {"base_url": url, "limits": limits, "timeout": SECONDS_TO_ANSWER, "trust_env": False}
    async with httpx.AsyncClient(**options) as client:
        began = time.perf_counter()
        await asyncio.gather(*(ask_on(client) for _ in range(clients)))
        seconds = time.perf_counter() - began
    first, whole = map(list, zip(*found))
    return {
        "requests_per_second": requests / seconds,
        **{f"first_token_{name}": value for name, value in percentiles(first).items()},
        **{f"seconds_{name}": value for name, value in percentiles(whole).items()},
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The median and the 99th percentile."""
    hundredths = quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    return {"p50": hundredths[49], "p99": hundredths[98]}


def batch_size(url: str) -> tuple[float, float]:
    """Sum and number of the sizes of all batches so far, from the server's metrics."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    return tuple(float(re.search(rf"^qgsa_batch_size_{part} (\S+)", text, re.M)[1]) for part in ("sum", "count"))


def measure(run: LoadArguments) -> list[dict]:
    """One row per batch size and number of clients; the servers take turns."""
    bodies = make_bodies(run)
    turns: dict[tuple[int, int], list[dict]] = {(size, n): [] for size in run.batch_sizes for n in run.clients}
    for size in tqdm(run.batch_sizes * run.repeats, desc="servers under load"):
        with started(run, size) as url:
            asyncio.run(load(url, bodies, max(run.clients), max(run.clients)))  # warms up
            for clients in run.clients:
                before = batch_size(url)
                found = asyncio.run(load(url, bodies, clients, max(run.requests, clients)))
                answered, batches = (now - then for now, then in zip(batch_size(url), before))
                turns[size, clients].append({**found, "batch_size_mean": answered / batches})
    rows = []
    for (size, clients), found in turns.items():
        row = {"system": f"batches of up to {size}", "max_batch_size": size, "clients": clients}
        rows.append(row | {name: median(each[name] for each in found) for name in found[0]})
    return rows


def format_load(rows: list[dict]) -> str:
    """The rows as a Markdown table; times: requests per second relative to those of the first batch size."""
    lines = [
        "| clients | server | requests per second | times | mean batch | first token, ms: p50 | p99 | answer, ms: p50 "
        "| p99 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["clients"]):
        base = next(each for each in rows if each["clients"] == row["clients"])
        names = ("first_token_p50", "first_token_p99", "seconds_p50", "seconds_p99")
        cells = " | ".join(f"{1000 * row[name]:.0f}" for name in names)
        times = row["requests_per_second"] / base["requests_per_second"]
        lines.append(
            f"| {row['clients']} | {row['system']} | {row['requests_per_second']:.1f} | {times:.2f} "
            f"| {row['batch_size_mean']:.1f} | {cells} |"
        )
    return "\n".join(lines)


def main():
    with errors_in_one_line():
        run = parse(LoadArguments, __doc__)
        output = Path(run.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        rows = measure(run)
        device = "gpu" if torch.cuda.is_available() else "cpu"
        write_results(output / f"serve_{device}.json", "serve", "cards", run.requests, 0, rows)
    print(format_load(rows))


if __name__ == "__main__":
    main()
