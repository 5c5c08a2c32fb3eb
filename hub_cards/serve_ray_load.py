"""What do replicas cost, and what happens to requests when one of them is killed? `serve_ray.py` beside `serve.py`.

    .venv-ray/bin/python hub_cards/serve_ray_load.py --output_dir outputs/serve_ray_load

Asks questions about cards, as `serve_load.py` does, of `serve.py`, of one replica, of two, and of two of which one is
killed (SIGKILL) after a third of the requests. Everything runs on this machine and listens on loopback. A request is
answered, refused (a 503, or an error at the end of its stream) or lost (its connection broke). Writes
`serve_ray_cpu.json` (`serve_ray_gpu.json` if there is a GPU) and prints the table.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import torch
import yaml
from serve_load import SECONDS_TO_ANSWER, LoadArguments, make_bodies, percentiles
from serve_processes import ROOT, SECONDS_TO_START, end, free_port, ours, process_tree, read_proc, started

from training.cli.arguments import errors_in_one_line, parse
from training.evaluation.report import write_results


CONFIG = Path(__file__).with_name("serve_ray.yaml")
REPLICA = "ray::ServeReplica:qgsa:Replica"
# Ray listens on all addresses otherwise, also with --node-ip-address 127.0.0.1; on other systems this is the default.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
STARTS = 3  # of Ray, which gives up after 30 seconds; a busy machine takes longer


@dataclass
class RayLoadArguments(LoadArguments):
    """The model, and the load; `batch_sizes` and `repeats` have one value each."""

    batch_sizes: list[int] = field(default_factory=lambda: [8], metadata={"help": "Value of --max_batch_size."})
    clients: list[int] = field(default_factory=lambda: [8], metadata={"help": "Clients at the same time."})
    repeats: int = field(default=1, metadata={"help": "Turns of each server."})
    replicas: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "Numbers of replicas; of several, one is killed."}
    )
    num_cpus: float = field(default=1, metadata={"help": "CPU cores per replica, for Ray; also its threads."})
    output_dir: str = field(default="outputs/serve_ray_load", metadata={"help": "Folder for results."})

    def __post_init__(self):
        super().__post_init__()
        if min(self.replicas, default=0) < 1:
            raise ValueError(f"replicas ({min(self.replicas, default=0)}) must be at least 1")
        if len(self.batch_sizes) > 1 or self.repeats > 1:
            given = f"batch_sizes ({self.batch_sizes}) and repeats ({self.repeats})"
            raise ValueError(f"{given}: must be one batch size and one turn")


def replica_pids(pid: int) -> list[int]:
    """Ids of the processes of replicas below a process."""
    return [each for each in process_tree(pid)[1:] if read_proc(each, "cmdline").startswith(REPLICA)]


def memory(pid: int) -> float:
    """GB of all processes below a process; what they share counts once."""
    lines = [line for each in process_tree(pid)[1:] for line in read_proc(each, "smaps_rollup").splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e6


def cpu_seconds(pid: int) -> dict[int, float]:
    """Seconds of work of each process below a process, which other programs lengthen little."""
    spent = {}
    for each in process_tree(pid)[1:]:
        if fields := read_proc(each, "stat").rpartition(")")[2].split():
            spent[each] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


class FleetProcess:
    """Ray and the application on this machine.

    Args:
        url: address of the application.
        ray: process of `ray start --block`.
        run: process of `serve run`, which ends the application on SIGINT.
    """

    def __init__(self, url: str, ray: subprocess.Popen, run: subprocess.Popen):
        self.url, self.ray, self.run = url, ray, run

    def replicas(self) -> int:
        """Number of replicas that are ready."""
        try:
            return httpx.get(f"{self.url}/health", timeout=20, trust_env=False).json().get("replicas", 0)
        except (httpx.TransportError, ValueError):  # ValueError: the proxy knows no application yet
            return 0

    def wait_for(self, replicas: int) -> float:
        """Wait for so many replicas; returns seconds. Raises OSError if they do not come, or the application ends."""
        began = time.perf_counter()
        while self.replicas() != replicas:
            if self.run.poll() is not None or time.perf_counter() - began > SECONDS_TO_START:
                raise OSError(f"{CONFIG.name}: {replicas} replicas did not start")
            time.sleep(0.5)
        return time.perf_counter() - began


def start_ray(command: list, log: Path, options: dict) -> subprocess.Popen:
    """Start Ray, which logs to `log`. Raises OSError if it does not start."""
    for _ in range(STARTS):
        ray = subprocess.Popen(command, **options)
        while ray.poll() is None:
            if "Ray runtime started" in log.read_text():
                return ray
            time.sleep(0.2)
    raise OSError(f"Ray did not start: see {log}")


@contextmanager
def started_fleet(log: Path, replicas: int, args: dict, **environment: str) -> Iterator[FleetProcess]:
    """The shipped configuration with so many replicas on a free port; all processes end with the context.

    Args:
        log: file for what Ray says.
        args: options of the application.
        environment: further variables.
    """
    config, bin_ = yaml.safe_load(CONFIG.read_text()), Path(sys.executable).parent
    config["http_options"] |= {"port": free_port()}
    config["applications"][0]["args"] |= {**args, "min_replicas": replicas, "max_replicas": replicas}
    address = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        # Short, since paths of sockets are.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True))
        given = Path(folder) / "serve.yaml"
        given.write_text(yaml.safe_dump(config))
        output = stack.enter_context(log.open("w"))
        env = {**os.environ, **LOOPBACK, "RAY_ADDRESS": address, **environment}
        options = {"stdout": output, "stderr": output, "cwd": ROOT, "env": env, "start_new_session": True}
        start = ("--block", "--include-dashboard=false", "--num-cpus=2", "--object-store-memory=200000000")
        command = [bin_ / "ray", "start", "--head", f"--port={address.split(':')[1]}", f"--temp-dir={folder}", *start]
        ray = start_ray(command, log, options)
        stack.callback(end, ray, signal.SIGTERM)
        run = subprocess.Popen([bin_ / "serve", "run", "--address", address, given], **options)
        stack.callback(end, run, signal.SIGINT)
        fleet = FleetProcess(f"http://127.0.0.1:{config['http_options']['port']}", ray, run)
        fleet.wait_for(replicas)
        yield fleet


@dataclass
class Outcome:
    """What became of a request: "answered", "refused" or "lost"; seconds to its first line, and to its end."""

    kind: str
    status: int | None
    first: float
    seconds: float


async def ask(client: httpx.AsyncClient, body: bytes, headers: dict[str, str]) -> Outcome:
    """Ask once, for a stream or not."""
    began, status, first, line = time.perf_counter(), None, None, ""
    headers = {"content-type": "application/json", **headers}
    try:
        async with client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
            status = response.status_code
            async for each in response.aiter_lines():
                first = first or time.perf_counter()
                line = each or line
        failed = status == 503 or line.startswith('data: {"error": ')
        whole = status == 200 and (line == "data: [DONE]" or '"object":"chat.completion"' in line)
        kind = "refused" if failed else "answered" if whole else "lost"
    except httpx.TransportError:
        kind = "lost"
    return Outcome(kind, status, (first or time.perf_counter()) - began, time.perf_counter() - began)


async def ask_all(
    url: str,
    bodies: list[bytes],
    clients: int,
    requests: int,
    seen: Callable[[int], None] = lambda count: None,
    headers: dict[str, str] | None = None,
) -> list[Outcome]:
    """Ask with so many clients, each of which waits for its outcome; `seen` is called with how many there are."""
    left, found = iter(range(requests)), []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def ask_on(client):
        for number in left:
            found.append(await ask(client, bodies[number % len(bodies)], headers or {}))
            seen(len(found))

    options = {"base_url": url, "limits": limits, "timeout": SECONDS_TO_ANSWER, "trust_env": False}
    async with httpx.AsyncClient(**options) as client:
        await asyncio.gather(*(ask_on(client) for _ in range(clients)))
    return found


def measure(url: str, bodies: list[bytes], clients: int, requests: int, seen=lambda count: None) -> dict:
    """Fields of a row, under one load."""
    before, began = cpu_seconds(os.getpid()), time.perf_counter()
    found = asyncio.run(ask_all(url, bodies, clients, requests, seen))
    seconds, after = time.perf_counter() - began, cpu_seconds(os.getpid())
    work = sum(spent - before.get(pid, 0) for pid, spent in after.items())  # without that of a process that was killed
    answered = [each for each in found if each.kind == "answered"]
    row: dict[str, float | None] = {"clients": clients, "requests_per_second": len(answered) / seconds}
    row |= {kind: sum(each.kind == kind for each in found) for kind in ("answered", "refused", "lost")}
    for name in ("first", "seconds"):
        row |= {f"{name}_{which}": s for which, s in percentiles([getattr(each, name) for each in answered]).items()}
    row["cpu_seconds_per_request"] = work / requests
    return row | {"memory_gb": memory(os.getpid()), "seconds_to_recover": None}


def kill_after(requests: int, pid: int, seen: int):
    """Kill a process once so many outcomes were seen."""
    if seen == requests:
        os.kill(pid, signal.SIGKILL)


def measure_all(run: RayLoadArguments) -> list[dict]:
    """A row per server and number of clients."""
    bodies, rows, (size, *_) = make_bodies(run), [], run.batch_sizes
    log = Path(run.output_dir) / "ray.log"

    def add(system: str, url: str, **options):
        for clients in run.clients:
            rows.append({"system": system, **measure(url, bodies, clients, run.requests, **options)})

    alone = ours(run.model, max_batch_size=size, max_waiting=max(run.clients))
    with started(alone, log.with_name("serve.log")) as server:
        measure(server.url, bodies, max(run.clients), max(run.clients))  # warms up
        add("serve.py", server.url)
    args = {"model": run.model, "num_cpus": run.num_cpus, "max_batch_size": size, "max_waiting": max(run.clients)}
    for replicas in run.replicas:
        with started_fleet(log, replicas, args) as fleet:
            measure(fleet.url, bodies, max(run.clients), 2 * max(run.clients))
            add(f"{replicas} replica{'s' * (replicas > 1)}", fleet.url)
            for clients in run.clients if replicas > 1 else []:
                kill = partial(kill_after, run.requests // 3, replica_pids(fleet.ray.pid)[0])
                row = measure(fleet.url, bodies, clients, run.requests, kill)
                row["seconds_to_recover"] = fleet.wait_for(replicas)
                rows.append({"system": f"{replicas} replicas, one killed", **row})
    return rows


def format_ray_load(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| clients | server | requests per second | answered | refused | lost | first token, ms: p50 | p99 "
        "| answer, ms: p50 | p99 | CPU, ms per request | memory, GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["clients"]):
        counts = " | ".join(str(row[name]) for name in ("answered", "refused", "lost"))
        names = ("first_p50", "first_p99", "seconds_p50", "seconds_p99")
        cells = " | ".join(f"{1000 * row[name]:.0f}" for name in names)
        start = f"| {row['clients']} | {row['system']} | {row['requests_per_second']:.1f} | {counts} | {cells} "
        lines.append(f"{start}| {1000 * row['cpu_seconds_per_request']:.0f} | {row['memory_gb']:.1f} |")
    return "\n".join(lines)


def main():
    with errors_in_one_line():
        run = parse(RayLoadArguments, __doc__)
        output = Path(run.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        rows = measure_all(run)
        device = "gpu" if torch.cuda.is_available() else "cpu"
        write_results(output / f"serve_ray_{device}.json", "serve_ray", "cards", run.requests, 0, rows)
    print(format_ray_load(rows))


if __name__ == "__main__":
    main()
