"""How many requests of many clients do vLLM, vLLM with our plugin, and our server answer on one machine?

    make vllm
    python hub_cards/serve_throughput.py --model ../shared/checkpoints/smolvlm-256m-instruct --random_weights true

Four servers, one after the other, get the same questions from 32 clients: vLLM with the plain checkpoint, vLLM with
`qgsa_vllm`, and `serve.py` with batches and one request at a time. All have the same weights and may use as many
threads; a QGSA checkpoint encodes as many tiles as `--tiles` says, the plain one all. Every request brings an image of
its own, so that no cache answers: those of vLLM for prefixes and images stay on, and their hits are counted. The
clients share the processor with the server. Without vLLM its rows say so. Writes `throughput_cpu.json` and prints the
table.
"""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch
from export import ExportArguments, export, has_selector
from PIL import Image
from serve_load import ask_all, make_body, outcomes, rates
from serve_processes import VLLM_PYTHON, Command, MemoryWatch, Running, ours, started, vllm
from tqdm.auto import tqdm

from modeling_qgsa import QGSAProcessor
from training.cli.arguments import errors_in_one_line, parse
from training.data.cards import Cards
from training.evaluation.report import write_results


SYSTEMS = {
    "vllm": "vLLM, stock",
    "vllm-qgsa": "vLLM, plugin",
    "qgsa-batches": "serve.py, batches",
    "qgsa-one-by-one": "serve.py, one by one",
}
NAME = "throughput_cpu"
WARM_UP = 2  # requests, which are not counted
CACHE_HITS = ("vllm:prefix_cache_hits_total", "vllm:mm_cache_hits_total")


@dataclass
class ThroughputArguments:
    """The checkpoint, the load and the servers."""

    model: str = field(default="hub_cards/tiny-qgsa", metadata={"help": "QGSA or dense checkpoint: Hub id or folder."})
    random_weights: bool = field(
        default=False, metadata={"help": "Initialize a dense checkpoint from its config, untrained."}
    )
    systems: list[str] = field(
        default_factory=lambda: list(SYSTEMS), metadata={"help": f"Servers, some of {', '.join(SYSTEMS)}."}
    )
    clients: int = field(default=32, metadata={"help": "Clients at the same time."})
    requests: int = field(default=1, metadata={"help": "Requests per client."})
    image_size: int = field(default=2048, metadata={"help": "Width and height of an image in pixels."})
    tiles: int = field(default=2, metadata={"help": "m: high-resolution tiles that QGSA encodes per image."})
    max_new_tokens: int = field(default=8, metadata={"help": "Tokens per answer."})
    max_batch_size: int = field(default=8, metadata={"help": "Batches of serve.py."})
    max_model_len: int = field(default=2048, metadata={"help": "Longest prompt and answer in vLLM, in tokens."})
    vllm_dtype: str = field(
        default="float32", metadata={"help": "Precision of vLLM; serve.py measures its own, and its threads."}
    )
    vllm_python: str = field(
        default=str(VLLM_PYTHON), metadata={"help": "Python of the environment that make vllm sets up."}
    )
    output_dir: str = field(default="outputs/throughput", metadata={"help": "Folder for results and logs."})

    def __post_init__(self):
        unknown = [name for name in self.systems if name not in SYSTEMS]
        if unknown or not self.systems:
            raise ValueError(f"systems ({', '.join(unknown)}): choose from {', '.join(SYSTEMS)}")
        for name in ("clients", "requests", "image_size", "tiles", "max_new_tokens", "max_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")

    @property
    def budget(self) -> dict[str, int]:
        """Exactly as many tiles as were asked for, whatever the question."""
        return {"min_tiles": self.tiles, "max_tiles": self.tiles}


def make_checkpoints(run: ThroughputArguments, folder: Path) -> dict[bool, Path]:
    """The same weights with our modules (True) and as a plain model (False), exported into a folder.

    The plain one is an Idefics3, whose layers are those of SmolVLM: vLLM's SmolVLM needs torchvision for videos.
    """
    if run.random_weights and has_selector(run.model):
        raise ValueError(f"random_weights (True): {run.model} is not a dense checkpoint")
    folders = {True: folder / "qgsa", False: folder / "plain"}
    export(ExportArguments(run.model, str(folders[True]), random_weights=run.random_weights))
    if any(is_plain(name) for name in run.systems):
        export(ExportArguments(str(folders[True]), str(folders[False]), format="idefics3"))
    return folders


def is_plain(system: str) -> bool:
    return system == "vllm"


def command_of(run: ThroughputArguments, system: str, model: Path) -> Command:
    """The server of a system. Raises OSError if it is not installed."""
    if not system.startswith("vllm"):
        size = run.max_batch_size if system == "qgsa-batches" else 1
        return ours(model, max_batch_size=size, max_waiting=run.clients)
    options = [
        f"--dtype={run.vllm_dtype}",
        f"--max-model-len={run.max_model_len}",
        f"--max-num-seqs={run.clients}",
        '--limit-mm-per-prompt={"image": 1}',
    ]
    options += [] if is_plain(system) else [f"--hf-overrides={json.dumps(run.budget)}"]
    return vllm(run.vllm_python, model, *options)


def make_requests(run: ThroughputArguments, system: str) -> list[bytes]:
    """All requests to a server, those that warm it up first; images that are drawn on small canvases, enlarged."""
    count, size = WARM_UP + run.clients * run.requests, (run.image_size, run.image_size)
    fields = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": run.max_new_tokens}
    fields |= {"temperature": 0} if system.startswith("vllm") else {"qgsa": run.budget}
    cards = Cards("test", count)
    return [
        make_body(sample["question"], [sample["image"].resize(size, Image.Resampling.BICUBIC)], "JPEG", **fields)
        for sample in (cards[number] for number in range(count))
    ]


def tiles_of_image(run: ThroughputArguments, processor: QGSAProcessor) -> int:
    """How many tiles the processor makes of an image, the global view included."""
    return processor.image_processor.get_number_of_image_patches(run.image_size, run.image_size, {})[0]


def measure(run: ThroughputArguments, system: str, model: Path) -> dict:
    """The row of a server: started, warmed up, under load, ended."""
    threads = torch.get_num_threads()
    command = command_of(run, system, model)
    command = Command(command.name, command.words, {**command.environment, "OMP_NUM_THREADS": str(threads)})
    bodies = make_requests(run, system)
    warming, counted = bodies[:WARM_UP], bodies[WARM_UP:]
    with started(command, Path(run.output_dir) / f"{system}.log") as server:
        asyncio.run(ask_all(server.url, warming, WARM_UP, range(WARM_UP)))
        before = tiles_encoded(server)
        with MemoryWatch(server.pid) as memory:
            found, seconds = asyncio.run(ask_all(server.url, counted, run.clients, range(len(counted))))
        encoded = tiles_encoded(server) - before
        hits = sum(map(server.metric, CACHE_HITS))
    row = {"system": system, "clients": run.clients, "requests": len(counted), "threads": threads}
    row |= {**outcomes(found), **rates(found, seconds), "memory_peak_bytes": max(memory.samples), "cache_hits": hits}
    answered = [each for each in found if each.outcome == "answered"]
    if answered:
        row["new_tokens_mean"] = mean(each.tokens for each in answered)
        dense = tiles_of_image(run, QGSAProcessor.from_pretrained(model, backend="pil"))
        fixed = dense if is_plain(system) else min(run.tiles + 1, dense)  # vLLM does not count tiles
        row["tiles"] = fixed if command.name == "vLLM" else 1 + encoded / len(answered)
    return row


def tiles_encoded(server: Running) -> float:
    """Tiles without global views that a server of ours has encoded."""
    return server.metric("qgsa_tiles_encoded_total")


def format_throughput(rows: list[dict]) -> str:
    """The rows as a Markdown table; times: requests per second relative to those of the first row."""
    lines = [
        "| server | requests per second | times | first token, s: p50 | p99 | answer, s: p50 | p99 | answered "
        "| refused | lost | tiles per request | memory, GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = next((row["requests_per_second"] for row in rows if row.get("requests_per_second")), None)
    for row in rows:
        name = SYSTEMS[row["system"]]
        if "skipped" in row:
            lines.append(f"| {name} | skipped: {row['skipped']} |" + " – |" * 10)
            continue
        counts = " | ".join(str(row[each]) for each in ("answered", "refused", "lost"))
        times = "–" if not base else f"{row['requests_per_second'] / base:.1f}"
        latency = ("first_token_p50", "first_token_p99", "seconds_p50", "seconds_p99")
        cells = " | ".join(f"{row[each]:.2f}" if each in row else "–" for each in latency)
        tiles = f"{row['tiles']:.1f}" if "tiles" in row else "–"
        lines.append(
            f"| {name} | {row['requests_per_second']:.3g} | {times} | {cells} | {counts} | {tiles} "
            f"| {row['memory_peak_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def main():
    with errors_in_one_line():
        run = parse(ThroughputArguments, __doc__)
        output, rows = Path(run.output_dir), []
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output) as folder:
            models = make_checkpoints(run, Path(folder).resolve())
            for system in tqdm(run.systems, desc="servers under load"):
                try:
                    rows.append(measure(run, system, models[not is_plain(system)]))
                except OSError as error:
                    rows.append({"system": system, "skipped": str(error)})
                write_results(output / f"{NAME}.json", NAME, "cards", run.clients * run.requests, 0, rows)
    print(format_throughput(rows))


if __name__ == "__main__":
    main()
