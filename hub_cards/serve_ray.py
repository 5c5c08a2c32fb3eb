"""Serve a QGSA-SmolVLM checkpoint from many replicas, with Ray Serve.

    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 ray start --head --include-dashboard false  # on loopback
    serve run hub_cards/serve_ray.yaml
    python hub_cards/serve_ray.py  # ends it when all requests that it took are answered

Each replica runs the application of `serve.py`, with the same routes, limits and errors. `args` of the YAML file are
the options of `serve.py`, except host and port, and those of `Fleet`. Every request comes through the door, which
reads it, checks the API key and passes it on. Requests wait there until a replica has room; replicas are added and
removed by the number of requests that wait and run.

If a replica dies, the door asks another one, once, unless the answer has begun: an answer changes nothing, so that it
is safe to ask again. Otherwise the client gets an error: a 503, or the last event of its stream. A replica that is
removed answers what it took. `/health` says how many replicas run, and `/metrics` has the numbers of all of them.

The door imports neither torch nor the model, and needs little memory.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, fields

import ray
from prometheus_client import CollectorRegistry, Counter, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import TypeAdapter
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from serve_connections import KEY, Places, check_key, read_body
from serve_errors import HANDLERS, RequestError, closing, error_body, internal
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


logger = logging.getLogger("ray.serve")

CHAT = "/v1/chat/completions"
UNCOUNTED = ("/health", "/metrics")
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
PASSED_ON = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client")
ATTEMPTS = 2  # a request that brings replicas down does so no more often
SECONDS_TO_TELL = 5  # for replicas that are asked about themselves
SECONDS_OF_HEALTH = 1  # in which the replicas are not asked again
SECONDS_TO_REPLACE = 60  # until Serve has replaced a replica that tells nothing
SECONDS_TO_LOOK_BACK = 15  # Serve counts requests every ten
SECONDS_TO_ADD = 5  # of too many requests, until replicas are added
SECONDS_TO_REMOVE = 300  # of too few, until replicas are removed
SECONDS_TO_SAY_SO = 5  # that a replica has not answered in time, while the application ends
SECONDS_TO_LOOK = 0.5  # whether the applications have ended
MAX_AT_THE_DOOR = 10_000  # it refuses long before


@dataclass
class Fleet:
    """How many replicas there are, and what each of them takes."""

    min_replicas: int = field(default=1, metadata={"help": "Replicas without any load."})
    max_replicas: int = field(default=4, metadata={"help": "Replicas under any load."})
    num_cpus: float = field(default=1, metadata={"help": "CPU cores per replica; also its threads, rounded down."})
    num_gpus: float = field(default=0, metadata={"help": "GPUs per replica; a part of one is allowed."})

    def __post_init__(self):
        if self.min_replicas < 1:
            raise ValueError(f"min_replicas ({self.min_replicas}) must be at least 1")
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) must be at least min_replicas ({self.min_replicas})")


def parse(kind, args: dict):
    """`args`, which may be strings, as a dataclass. Raises ValueError, naming field and value."""
    unknown = args.keys() - {each.name for each in fields(kind)}
    if unknown:
        raise ValueError(f"unknown option {min(unknown)}")
    return TypeAdapter(kind).validate_python(args)


class Replica:
    """The application of `serve.py`, called by the door.

    Args:
        args: options of `ServedArguments`, read here because they depend on the machine.
    """

    def __init__(self, args: dict):
        from serve import ServedArguments, load_served, make_app  # not in the process of the door

        run = parse(ServedArguments, args)
        run.max_waiting = 2 * run.max_batch_size  # all that Serve hands out: the queue is at the door
        model, processor, pair = load_served(run)
        self.gate = make_app(model.tune(saved=run.tuning), processor, run, pair)  # the door has checked the key

    async def answer(self, scope: dict, body: bytes) -> AsyncIterator[dict]:
        """Run the application on one request; yields its ASGI messages."""
        messages: asyncio.Queue[dict | None] = asyncio.Queue()
        bodies, gone = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()

        async def receive():
            if bodies:
                return bodies.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        def end(task):
            if not task.cancelled() and task.exception() is not None:  # its response says so, too
                logger.error("a request failed", exc_info=task.exception())
            messages.put_nowait(None)

        running = asyncio.create_task(
            self.gate({"type": "http", "asgi": {"version": "3.0"}, **scope}, receive, messages.put)
        )
        running.add_done_callback(end)
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            gone.set()  # the client has disconnected, if the application still runs

    async def metrics(self) -> tuple[str, list[Metric]]:
        """Name of this replica, and what it did since it started."""
        return serve.get_replica_context().replica_id.unique_id, list(self.gate.answerer.metrics.registry.collect())

    async def present(self) -> bool:
        return True

    def check_health(self):
        """Raises RuntimeError, whereupon Serve replaces this replica, if nothing answers any more."""
        if not self.gate.answerer.batches.thread.is_alive():
            raise RuntimeError("the thread of the model has ended")

    def __del__(self):
        if hasattr(self, "gate"):
            self.gate.answerer.close()


class Tally:
    """The metrics of all replicas, each sample with the name of its replica, as a collector of prometheus_client."""

    def __init__(self, found: list[tuple[str, list[Metric]]]):
        self.found = found

    def collect(self):
        families: dict[str, Metric] = {}
        for replica, metrics in self.found:
            for metric in metrics:
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
        return families.values()


def replica_lost() -> RequestError:
    """The error of a request whose replica died, and whose answer had begun or was lost a second time."""
    return RequestError("the replica that answered has died: try again", status=503, code="replica_lost")


@serve.ingress()
class Door:
    """Reads requests, asks for the key, and passes them on to replicas.

    Args:
        replicas: handle of the replicas.
        places: requests that wait and run, in all.
        max_bytes: most bytes of a request.
        api_key: the key that all routes but `/health` ask for.
    """

    def __init__(self, replicas: DeploymentHandle, places: int, max_bytes: int, api_key: str | None):
        self.replicas = replicas.options(stream=True)
        found = os.environ.pop(KEY, None)  # of the node
        self.max_bytes, self.api_key = max_bytes, found if api_key is None else api_key
        self.arrivals = Places(places)
        self.registry = CollectorRegistry()
        self.responses = Counter(
            "qgsa_door_requests",
            "Requests by HTTP status, without /health and /metrics.",
            ["status"],
            registry=self.registry,
        )
        self.asked_again = Counter(
            "qgsa_door_asked_again", "Requests whose replica died before it answered.", registry=self.registry
        )
        self.healthy, self.looked, self.told, self.looking = 0, 0.0, 0.0, asyncio.Lock()

    def __serve_build_asgi_app__(self) -> Starlette:
        routes = [
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/{path:path}", self.pass_on, methods=METHODS),
        ]
        counted = Middleware(Counted, responses=self.responses)
        return Starlette(routes=routes, middleware=[counted], exception_handlers=HANDLERS)

    async def ask_all(self, method: str) -> list | None:
        """What all replicas return; None if one does not return in time."""
        try:
            answers = self.replicas.broadcast(method)
            found = await answers.results_async(timeout_s=SECONDS_TO_TELL, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        except TimeoutError:
            return None
        return [each for each in found if not isinstance(each, BaseException)]

    async def look(self):
        """Count the replicas."""
        found, self.looked = await self.ask_all("present"), time.monotonic()
        if found is not None:
            self.healthy, self.told = len(found), self.looked
        elif self.looked - self.told > SECONDS_TO_REPLACE:
            self.healthy = 0

    async def health(self, request: Request) -> JSONResponse:
        async with self.looking:
            if time.monotonic() - self.looked > SECONDS_OF_HEALTH:
                await self.look()
        if not self.healthy:
            return JSONResponse({"status": "no replica"}, 503)
        return JSONResponse({"status": "ok", "replicas": self.healthy})

    async def metrics(self, request: Request) -> Response:
        check_key(request, self.api_key)
        registry = CollectorRegistry()
        registry.register(Tally(await self.ask_all("metrics") or []))
        text = generate_latest(self.registry) + generate_latest(registry)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def pass_on(self, request: Request):
        check_key(request, self.api_key)
        body = b""
        if request.method == "POST" and request.url.path == CHAT:
            async with self.arrivals.take(request):
                body = await read_body(request, self.max_bytes)
        scope = {name: request.scope[name] for name in PASSED_ON if name in request.scope}
        return Passage(self, scope, body)


class Counted:
    """Counts responses by their status, as middleware."""

    def __init__(self, app, responses: Counter):
        self.app, self.responses = app, responses

    async def __call__(self, scope, receive, send):
        async def counted(message):
            if message["type"] == "http.response.start":
                self.responses.labels(message["status"]).inc()
            await send(message)

        await self.app(scope, receive, send if scope.get("path") in UNCOUNTED else counted)


class Passage:
    """The response of a replica to one request, as an ASGI application."""

    def __init__(self, door: Door, scope: dict, body: bytes):
        self.door, self.scope, self.body = door, scope, body
        self.begun = self.ended = self.streams = False

    async def __call__(self, scope, receive, send):
        for attempt in range(ATTEMPTS):
            try:
                await self.ask(send)
                return
            except RayActorError as error:
                if self.ended:
                    return
                logger.warning("a replica died while it answered: %s", str(error).partition("\n")[0])
                if self.begun:
                    break
                self.door.asked_again.inc(attempt + 1 < ATTEMPTS)
        if not self.begun:
            raise replica_lost()
        if self.streams:
            event = f"data: {json.dumps(error_body(replica_lost()))}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": False})

    async def ask(self, send):
        """Ask a replica, and send what it answers. Raises RequestError (503) if none can take the request."""
        answer, start = self.door.replicas.answer.remote(self.scope, self.body), None
        try:
            async for message in answer:
                if message["type"] == "http.response.start":
                    start = message  # waits for the first piece, before which another replica can be asked
                    continue
                if not self.begun:
                    self.begun, self.body = True, b""
                    self.streams = any(value.startswith(b"text/event-stream") for _, value in start["headers"])
                    await send(start)
                await send(message)
                self.ended = not message.get("more_body", False)
        except BackPressureError as error:
            message = "queue full: all replicas are busy, and others wait: try again later"
            raise RequestError(message, status=503, code="overloaded") from error
        except DeploymentUnavailableError as error:
            raise closing() from error
        finally:
            answer.cancel()  # if the client has disconnected
        if not self.begun:
            raise internal()


def app(args: dict) -> Application:
    """The application, for Serve. Raises ValueError for unknown options and values out of range."""
    from serve import ServedArguments  # not in the process of the door

    own = {each.name for each in fields(Fleet)}
    fleet = parse(Fleet, {name: value for name, value in args.items() if name in own})
    options = {name: value for name, value in args.items() if name not in own}
    run = parse(ServedArguments, options)
    if run.api_key is not None:
        os.environ[KEY] = run.api_key  # for a second call in this process, as `serve run --reload` makes
    options.pop("api_key", None)
    size = run.max_batch_size
    replicas = serve.deployment(Replica).options(
        max_ongoing_requests=2 * size,  # a batch that runs, and one that is read meanwhile
        max_queued_requests=max(1, run.max_waiting),  # Serve knows no 0
        graceful_shutdown_timeout_s=run.shutdown_timeout,
        autoscaling_config={
            "min_replicas": fleet.min_replicas,
            "max_replicas": fleet.max_replicas,
            "target_ongoing_requests": size,
            "look_back_period_s": SECONDS_TO_LOOK_BACK,
            "upscale_delay_s": SECONDS_TO_ADD,
            "downscale_delay_s": SECONDS_TO_REMOVE,
        },
        ray_actor_options={"num_cpus": fleet.num_cpus, "num_gpus": fleet.num_gpus},
    )
    places = 2 * size * fleet.max_replicas + run.max_waiting
    door = serve.deployment(Door).options(
        max_ongoing_requests=MAX_AT_THE_DOOR,
        max_queued_requests=places,  # while there is no door
        graceful_shutdown_timeout_s=run.shutdown_timeout + SECONDS_TO_SAY_SO,
        ray_actor_options={"num_cpus": 0},
    )
    return door.bind(replicas.bind(options), places, run.max_bytes, run.api_key)


def end():
    """End all applications when they have answered what they took, and then Serve, whose end would cut off answers."""
    ray.init("auto", namespace="serve", log_to_driver=False)
    for name in serve.status().applications:
        serve.delete(name, _blocking=False)  # which would wait for no more than a minute
    while serve.status().applications:  # no longer than their graceful_shutdown_timeout_s
        time.sleep(SECONDS_TO_LOOK)
    serve.shutdown()


if __name__ == "__main__":
    end()
