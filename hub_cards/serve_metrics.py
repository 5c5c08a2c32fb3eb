"""Counts and seconds of the server, in Prometheus' text format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from serve_batches import Job
from starlette.responses import Response


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """What a server did since it started; each has a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter(
            "qgsa_requests", "Requests by HTTP status, without /health and /metrics.", ["status"], **own
        )
        self.waiting = Gauge("qgsa_requests_waiting", "Requests that the model has not taken.", **own)
        self.batch_size = Histogram("qgsa_batch_size", "Requests per batch.", buckets=SIZES, **own)
        self.seconds = Histogram(
            "qgsa_request_seconds",
            "Seconds of answered requests, by part: receiving, reading (images and prompt), waiting (for the model), "
            "first_token (of the model), and whole (from the head of the request to the end of its answer).",
            ["part"],
            buckets=SECONDS,
            **own,
        )
        self.tiles = Counter("qgsa_tiles_encoded", "Tiles encoded at high resolution.", **own)
        self.tiles_dense = Counter("qgsa_tiles_dense", "Tiles that dense would have encoded.", **own)
        self.tokens = Counter("qgsa_visual_tokens_kept", "Visual tokens kept.", **own)
        self.tokens_dense = Counter("qgsa_visual_tokens_dense", "Visual tokens that dense would have kept.", **own)
        self.new_tokens = Counter("qgsa_completion_tokens", "Tokens of answers.", **own)

    def watch_queue(self, waiting: Callable[[], int]):
        """Report what `waiting` returns."""
        self.waiting.set_function(waiting)

    def note(self, job: Job, ended: float):
        """Count a request that was answered at `ended`, by `time.perf_counter`."""
        parts = {
            "receiving": job.queued - job.arrived,
            "reading": job.reading,
            "waiting": job.taken - job.queued - job.reading,
            "first_token": job.first_token - job.taken,
            "whole": ended - job.arrived,
        }
        for part, seconds in parts.items():
            self.seconds.labels(part).observe(seconds)
        self.new_tokens.inc(len(job.tokens))
        if job.qgsa is not None:
            self.tiles.inc(sum(job.qgsa["tiles"]))
            self.tiles_dense.inc(sum(job.qgsa["tiles_dense"]))
            self.tokens.inc(sum(job.qgsa["visual_tokens"]))
            self.tokens_dense.inc(sum(job.qgsa["visual_tokens_dense"]))

    def response(self) -> Response:
        """All of it, as Prometheus reads it."""
        return Response(generate_latest(self.registry), headers={"content-type": CONTENT_TYPE_LATEST})
