"""Connections: how many there may be, how long they may take, and how requests are received.

A connection waits (for a request) or is busy (until its response is complete). Requests that are received or answered
are counted in `Places` and in the queue of answers, so that busy connections are few. Waiting ones are closed after
`SECONDS_FOR_HEAD`, and earlier, the oldest first, where there are too many: a new connection is never refused, and
`/health` has no places to wait for.
"""

import asyncio
import hmac
import ipaddress
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h11
from serve_errors import RequestError
from starlette.requests import ClientDisconnect, Request
from uvicorn.protocols.http.h11_impl import H11Protocol


KEY = "QGSA_API_KEY"  # environment variable

SECONDS_FOR_HEAD = 10  # from the connection, or from the last response, to the end of the head of a request
SECONDS_TO_SEND = 60  # a request, whose body is in memory meanwhile
SECONDS_OF_SILENCE = 10  # within a body
SECONDS_TO_READ = 30  # until a client reads on, when its response fills all buffers
WAITING = 256  # waiting connections
WAITING_PER_ADDRESS = 64
SECONDS_OF_GRACE = 1  # in which a connection is not closed in favour of another one, unless there are too many:
MOST_CONNECTIONS = 512  # file descriptors are often limited to 1024
REFUSED_PER_SECOND = 10_000_000  # bytes per second and address of requests that turn out to be invalid
LONGEST_PAUSE = 10  # seconds, after one such request
SPARE = 8  # requests of one client that are received while the queue is full
BYTES_AT_ONCE = 8192  # parsed between two looks at the head
MOST_HELD = 2**20  # bytes that come before their turn
MAX_STRUCTURE = 100_000  # a long conversation has some thousands; each may become an object of Python
STRUCTURE = b'",:[{'


def network_of(host: str) -> str:
    """What one client owns: an IPv4 address, or the 64 bits that begin an IPv6 address; other names as they are."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:  # of a Unix socket, or from a proxy
        return host
    mapped = ip.version == 6 and ip.ipv4_mapped
    return str(mapped or (ip if ip.version == 4 else ipaddress.ip_network((int(ip), 64), strict=False)))


class BoundedProtocol(H11Protocol):
    """Uvicorn's HTTP with bounds on connections that wait, and on clients that do not read.

    Bodies in chunks (`Transfer-Encoding`) are not read: millions of tiny chunks would hold the event loop.
    """

    held = b""
    waiting_since: float | None = None
    head_timer: asyncio.TimerHandle | None = None
    read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self.network = network_of(self.client[0]) if self.client else ""
        self.wait()
        self.make_room()

    def connection_lost(self, exc):
        super().connection_lost(exc)
        for timer in (self.head_timer, self.read_timer):
            if timer is not None:
                timer.cancel()

    def wait(self):
        """Wait for a request, but not forever."""
        self.waiting_since = self.loop.time()
        self.head_timer = self.loop.call_later(SECONDS_FOR_HEAD, self.transport.abort)

    def make_room(self):
        """Close the connection that has waited longest if there are too many, of this address or in all."""
        present = [each for each in self.connections if not each.transport.is_closing()]
        waiting = [each for each in present if each.waiting_since is not None]
        own = [each for each in waiting if each.network == self.network]
        crowd = own if len(own) > WAITING_PER_ADDRESS else waiting if len(waiting) > WAITING else []
        if not crowd:
            return
        oldest = min(crowd, key=lambda each: each.waiting_since)
        age = self.loop.time() - oldest.waiting_since
        if age > SECONDS_OF_GRACE or len(present) > MOST_CONNECTIONS:
            oldest.transport.abort()

    @property
    def is_chunked(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self.headers or ())

    def data_received(self, data: bytes):
        data, self.held = self.held + data, b""
        for start in range(0, len(data), BYTES_AT_ONCE):
            if self.is_chunked or self.transport.is_closing():
                return
            if self.conn.their_state is h11.DONE:  # the next request must wait for the answer to this one
                self.hold(data[start:])
                return
            super().data_received(data[start : start + BYTES_AT_ONCE])
            if self.waiting_since is not None and self.cycle is not None and not self.cycle.response_complete:
                self.waiting_since = None
                self.head_timer.cancel()

    def hold(self, data: bytes):
        """Keep what came too early, and read no more; h11 would parse all of it at once."""
        self.held = data
        self.flow.pause_reading()
        if len(data) > MOST_HELD:  # reading goes on where the app looks whether the client is there
            self.transport.abort()

    def on_response_complete(self):
        super().on_response_complete()
        if self.cycle.response_complete:
            self.wait()
        if self.held:
            self.data_received(b"")

    def pause_writing(self):
        super().pause_writing()
        self.read_timer = self.loop.call_later(SECONDS_TO_READ, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        self.read_timer.cancel()


# Options of uvicorn. Its own `limit_concurrency` would refuse /health too, and not in OpenAI's format.
OPTIONS = {"http": BoundedProtocol, "ws": "none"}


class Places:
    """Requests that are being received, in all and per address.

    Behind a proxy on this machine the address is that of `X-Forwarded-For`, which uvicorn trusts from loopback.

    An address whose request was invalid, or broken off, has to pause, in proportion to its length: further ones are
    then received one by one, at REFUSED_PER_SECOND. To read them holds the interpreter, which answers need.

    Args:
        queue: places of the queue that the requests go to. One client may fill it, and have `SPARE` refused there;
            all clients together have twice as many places here.
    """

    def __init__(self, queue: int):
        self.per_address, self.taken = queue + SPARE, Counter()
        self.paused_until: dict[str, float] = {}  # by the clock of the event loop

    @asynccontextmanager
    async def take(self, request: Request) -> AsyncIterator[None]:
        """Hold a place for a request, once its address need not pause. Raises RequestError (503) if there is none."""
        address = network_of(request.client.host if request.client else "")
        if self.taken[address] >= self.per_address or self.taken.total() >= 2 * self.per_address:
            message = (
                f"too many requests are being received ({self.taken[address]} from this address): try again later"
            )
            raise RequestError(message, status=503, code="overloaded")
        pause = min(LONGEST_PAUSE, int(request.headers.get("content-length", 0)) / REFUSED_PER_SECOND)
        self.taken[address] += 1
        try:
            await self.wait_for_turn(address, pause)
            yield
        except (RequestError, ClientDisconnect) as error:
            if isinstance(error, ClientDisconnect) or error.status < 500:
                self.pause(address, pause)
            raise
        finally:
            self.taken[address] -= 1
            self.taken += Counter()  # forgets addresses without requests

    async def wait_for_turn(self, address: str, pause: float):
        """Return once an address need not pause; if it had to, its next request has to for `pause` seconds."""
        now, had_to = asyncio.get_running_loop().time, False
        while (seconds := self.paused_until.get(address, 0) - now()) > 0:
            had_to = True
            await asyncio.sleep(seconds)
        if had_to:
            self.pause(address, pause)

    def pause(self, address: str, seconds: float):
        """Let an address pause for so many seconds from now."""
        now = asyncio.get_running_loop().time()
        self.paused_until = {each: until for each, until in self.paused_until.items() if until > now}
        self.paused_until[address] = max(self.paused_until.get(address, 0), now + seconds)


def check_key(request: Request, key: str | None):
    """Raise RequestError (401) unless a request brings the `key`, if there is one."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Compared in constant time: how long it takes must not tell how much of it is right.
    same = hmac.compare_digest(given.strip().encode("latin-1"), (key or "").encode())
    if key is not None and not (same and scheme.lower() == "bearer"):
        message = "Authorization must be 'Bearer' and the API key of this server"
        raise RequestError(message, status=401, code="invalid_api_key")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the JSON body of a request, with a bound on the objects that it can become.

    Raises RequestError: 411 for a body in chunks, 415 for another content type, such as a page of a foreign origin may
    send without asking, 413 beyond `max_bytes` or MAX_STRUCTURE, and 408 if it is not sent in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"Content-Type ({kind[:100]}) must be application/json", status=415)
    if "transfer-encoding" in request.headers:
        raise RequestError("Transfer-Encoding is not supported: send a Content-Length", status=411)
    body, structure, now = bytearray(), 0, asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(SECONDS_TO_SEND), asyncio.timeout(SECONDS_OF_SILENCE) as silence:
            async for piece in request.stream():
                silence.reschedule(now() + SECONDS_OF_SILENCE)
                body += piece
                structure += sum(map(piece.count, STRUCTURE))
                if len(body) > max_bytes:
                    raise RequestError(f"the request exceeds the limit of {max_bytes} bytes", status=413)
                if structure > MAX_STRUCTURE:
                    message = f"the request exceeds the limit of {MAX_STRUCTURE} quotes, commas, colons and brackets"
                    raise RequestError(message, status=413)
    except TimeoutError as error:
        raise RequestError(
            f"the request paused for {SECONDS_OF_SILENCE} s or took more than {SECONDS_TO_SEND} s", status=408
        ) from error
    return bytes(body)
