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
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import httpx
import torch
from PIL import Image
from serve_processes import Running, ours, started
from tqdm.auto import tqdm

from training.cli.arguments import errors_in_one_line, parse
from training.data.cards import Cards
from training.evaluation.report import write_results


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


@dataclass(frozen=True)
class Asked:
    """What became of a request.

    Args:
        outcome: "answered", to the end; "refused", with a status and an error in OpenAI's format; otherwise "lost".
        said: the end of the response, or the error of the connection.
        first: seconds to the first line of the response.
        seconds: seconds to its end.
        tokens: tokens of the answer, where the response tells.
    """

    outcome: str
    said: str
    first: float
    seconds: float
    tokens: int = 0


def make_body(question: str, images: Sequence[Image.Image] = (), kind: str = "PNG", **fields) -> bytes:
    """A request about images, which are sent as files of a kind; `fields` are those of the API."""
    content: list[dict] = [{"type": "text", "text": question}]
    for image in reversed(images):
        data = io.BytesIO()
        image.save(data, kind)
        url = f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()


def make_bodies(run: LoadArguments) -> list[bytes]:
    """Requests about one image each."""
    cards = Cards("test", 40)
    samples = (cards[number] for number in range(len(cards)))
    fields = {"stream": True, "max_tokens": run.max_new_tokens}
    return [make_body(sample["question"], [sample["image"]], **fields) for sample in samples]


async def ask(client: httpx.AsyncClient, body: bytes) -> Asked:
    """Send a request, and read its response, streamed or not, to the end."""
    began, lines, status = time.perf_counter(), [], None
    first = None
    headers = {"content-type": "application/json"}
    try:
        async with client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
            async for line in response.aiter_lines():
                first = first or time.perf_counter()
                lines += [line] if line else []
            status = response.status_code
    except httpx.HTTPError as error:
        lines.append(f"{type(error).__name__}: {error}")
    ended = time.perf_counter()
    said = f"{'no status' if status is None else status}: {(lines or [''])[-1][:500]}"
    counted = re.findall(r'"completion_tokens": ?(\d+)', " ".join(lines[-2:]))
    return Asked(outcome_of(status, lines), said, (first or ended) - began, ended - began, *map(int, counted[-1:]))


def outcome_of(status: int | None, lines: list[str]) -> str:
    """What became of a request, from the status and the lines of its response; see [`Asked`]."""
    broken = any(line.startswith('data: {"error"') for line in lines)
    if status is None or not lines or broken:
        return "lost"
    if status == 200 and lines[-1] == "data: [DONE]":
        return "answered"
    try:
        fields = json.loads("".join(lines))
    except ValueError:
        return "lost"
    if status == 200:
        return "answered" if "choices" in fields else "lost"
    return "refused" if status >= 400 and isinstance(fields, dict) and "error" in fields else "lost"


async def ask_all(url: str, bodies: list[bytes], clients: int, numbers: Iterable[int]) -> tuple[list[Asked], float]:
    """Ask with so many clients, each of which waits for its answer before it goes on.

    Args:
        numbers: numbers of the requests, which take turns among the `bodies`; the load ends with them.

    Returns what became of each request, and the seconds of all.
    """
    left, found = iter(numbers), []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def ask_on(client):
        for number in left:
            found.append(await ask(client, bodies[number % len(bodies)]))

    options = {"base_url": url, "limits": limits, "timeout": SECONDS_TO_ANSWER, "trust_env": False}
    async with httpx.AsyncClient(**options) as client:
        began = time.perf_counter()
        await asyncio.gather(*(ask_on(client) for _ in range(clients)))
        return found, time.perf_counter() - began


async def load(url: str, bodies: list[bytes], clients: int, requests: int) -> dict[str, float]:
    """Ask `requests` questions; returns their rates. Raises OSError if one is not answered: it would count as fast."""
    found, seconds = await ask_all(url, bodies, clients, range(requests))
    for each in found:
        if each.outcome != "answered":
            raise OSError(f"the server answered {each.said}")
    return rates(found, seconds)


def rates(found: list[Asked], seconds: float) -> dict[str, float]:
    """Requests per second and latency of those that were answered; no latency without any."""
    answered = [each for each in found if each.outcome == "answered"]
    row = {"requests_per_second": len(answered) / seconds}
    if answered:
        for part, values in (
            ("first_token", [each.first for each in answered]),
            ("seconds", [each.seconds for each in answered]),
        ):
            row |= {f"{part}_{name}": value for name, value in percentiles(values).items()}
    return row


def outcomes(found: list[Asked]) -> dict:
    """How many requests were answered, refused and lost, and what was said in place of an answer, a few times."""
    counts = Counter(each.outcome for each in found)
    errors = sorted({each.said for each in found if each.outcome != "answered"})
    return {name: counts[name] for name in ("answered", "refused", "lost")} | {"errors": errors[:5]}


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The median and the 99th percentile."""
    hundredths = quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    return {"p50": hundredths[49], "p99": hundredths[98]}


def batch_size(server: Running) -> tuple[float, float]:
    """Sum and number of the sizes of all batches so far, from the server's metrics."""
    return server.metric("qgsa_batch_size_sum"), server.metric("qgsa_batch_size_count")


def measure(run: LoadArguments) -> list[dict]:
    """One row per batch size and number of clients; the servers take turns, each with room for all clients."""
    bodies, log = make_bodies(run), Path(run.output_dir) / "server.log"
    turns: dict[tuple[int, int], list[dict]] = {(size, n): [] for size in run.batch_sizes for n in run.clients}
    for size in tqdm(run.batch_sizes * run.repeats, desc="servers under load"):
        with started(ours(run.model, max_batch_size=size, max_waiting=max(run.clients)), log) as server:
            asyncio.run(load(server.url, bodies, max(run.clients), max(run.clients)))  # warms up
            for clients in run.clients:
                before = batch_size(server)
                found = asyncio.run(load(server.url, bodies, clients, max(run.requests, clients)))
                answered, batches = (now - then for now, then in zip(batch_size(server), before))
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
