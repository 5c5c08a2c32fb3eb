"""Shutting down: what was taken is answered within a bound, and what comes meanwhile gets a 503."""

import time

import uvicorn
from serve_answers import Answerer
from serve_errors import closing, error_response


OPEN = ("/health", "/metrics")  # answered at any time, and not counted
SECONDS_TO_SAY_SO = 1  # for the last responses, once the time is over


class Gate:
    """ASGI application around that of the routes: counts requests, and refuses them once it is `closing`."""

    def __init__(self, app, answerer: Answerer):
        self.app, self.answerer = app, answerer
        self.running = 0
        self.closes_at: float | None = None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return

        async def counted(message):
            if message["type"] == "http.response.start":
                self.answerer.metrics.requests.labels(message["status"]).inc()
            await send(message)

        app = error_response(closing()) if self.closing else self.app
        self.running += 1
        try:
            await app(scope, receive, counted)
        finally:
            self.running -= 1

    @property
    def closing(self) -> bool:
        return self.closes_at is not None

    def close(self, seconds: float):
        """Take no more requests, and give those that were taken so many seconds."""
        self.closes_at = time.monotonic() + seconds

    def is_over(self) -> bool:
        """Whether all that was taken is answered, or its time is over: the rest then gets an error."""
        if self.closes_at is None or (self.running and time.monotonic() < self.closes_at):
            return False
        self.answerer.batches.abandon(closing())
        return True


class Server(uvicorn.Server):
    """Uvicorn that listens until all requests are answered, once it gets SIGTERM or SIGINT; a second one ends it.

    Args:
        gate: the application.
        seconds: how long that may take.
        options: of uvicorn.
    """

    def __init__(self, gate: Gate, seconds: float, **options):
        super().__init__(uvicorn.Config(gate, timeout_graceful_shutdown=SECONDS_TO_SAY_SO, **options))
        self.gate, self.seconds = gate, seconds

    def handle_exit(self, sig, frame):
        self.gate.close(0 if self.gate.closing else self.seconds)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.gate.is_over()
