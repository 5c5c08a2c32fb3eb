"""Serving an app on loopback, for tests over HTTP."""

import threading
import time
from contextlib import contextmanager

import uvicorn


@contextmanager
def serving(app, **options):
    """Serve an app on a free port, with `options` of uvicorn; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def wait_until(condition):
    """Wait, for 20 seconds at most, until `condition()` holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
