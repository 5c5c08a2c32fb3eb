"""Requests that would stop the server of hub_cards/serve.py: `/health` and other clients are answered meanwhile."""

import asyncio
import base64
import http.client
import io
import json
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import serve_connections
from PIL import Image
from serve import Limits, load, make_app
from serve_errors import RequestError
from serving import serving
from starlette.requests import Request


CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 1}
IMAGE = Image.new("RGB", (64, 64), (200, 30, 90))


@pytest.fixture(scope="module")
def url():
    """The script with two seconds for images, and memory for small ones."""
    options = "--port 0 --max_image_seconds 2 --max_pixels 10000000"
    command = [sys.executable, "hub_cards/serve.py", *options.split()]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        yield next(re.findall(r"http://\S+", line)[0] for line in process.stderr if "running on" in line)
        process.terminate()


@contextmanager
def healthy(url):
    """Ask for `/health` on new connections all the time: each answer takes at most half a second."""
    done, answers = threading.Event(), []

    def probe():
        while not done.is_set():
            started = time.perf_counter()
            connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
            try:
                connection.request("GET", "/health")
                answers.append((connection.getresponse().status, time.perf_counter() - started))
            except OSError as error:
                answers.append((error, time.perf_counter() - started))
            finally:
                connection.close()
            time.sleep(0.02)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert {status for status, _ in answers} == {200}
    assert max(seconds for _, seconds in answers) < 0.5


def ask(url, body=HELLO, kind="application/json", source="127.0.0.1"):
    """The status of a response and its JSON. Without httpx, which takes long to begin, and all threads with it."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60, source_address=(source, 0))
    try:
        connection.request("POST", CHAT, body, {} if kind is None else {"content-type": kind})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@contextmanager
def sent(url, data, source="127.0.0.1"):
    """A connection from the address `source` on which `data` has been sent, and nothing follows."""
    host, port = urlsplit(url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=5, source_address=(source, 0)) as connection:
        connection.sendall(data)
        yield connection


def is_closed(connection, seconds=0.1):
    connection.settimeout(seconds)
    try:
        return not connection.recv(1)
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def head(length, kind="application/json"):
    return f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n".encode()


# Images


def encode(kind, **options):
    data = io.BytesIO()
    IMAGE.save(data, kind, **options)
    return data.getvalue()


def with_segments(megabytes):
    """A JPEG whose EXIF comes in segments of one byte: Pillow appends each to all before."""
    segment = b"\xff\xe1\x00\x09Exif\0\0a"
    data = encode("JPEG")
    return data[:2] + segment * int(megabytes * 1e6 / len(segment)) + data[2:]


def with_comments(megabytes):
    """A GIF with comments of one byte, which Pillow joins likewise."""
    data, comment = encode("GIF"), b"!\xfe\x01a\x00"
    start = 13 + 3 * (2 << (data[10] & 7))
    return data[:start] + comment * int(megabytes * 1e6 / len(comment)) + data[start:]


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_profiles(megabytes):
    """A PNG with colour profiles of a kilobyte that are unpacked to a megabyte each."""
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20 - 1), 9))
    data = encode("PNG")
    return data[:33] + profile * int(megabytes * 1e6 / len(profile)) + data[33:]


def with_copies(megabytes):
    """A WEBP with EXIF of one megabyte, every tag of which claims all of it."""
    tags = [struct.pack("<HHII", tag, 7, 10**6, 8) for tag in range(megabytes)]
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", megabytes) + b"".join(tags) + bytes(10**6 + 8)
    return encode("WEBP", exif=exif)


def with_scans(count):
    """A progressive JPEG that draws itself again and again."""
    data = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(data, "JPEG", progressive=True)
    data = data.getvalue()
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2] * count + data[-2:]


@pytest.mark.parametrize(
    "make, size", [(with_segments, 8), (with_comments, 2), (with_profiles, 8), (with_copies, 1200), (with_scans, 3000)]
)
def test_images_that_take_forever(make, size, url):
    data = base64.b64encode(make(size)).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "what is it?"},
    ]
    with healthy(url), ThreadPoolExecutor(1) as threads:
        attack = threads.submit(ask, url, {"messages": [{"role": "user", "content": content}]})
        time.sleep(0.2)
        assert ask(url)[0] == 200
        status, answer = attack.result()
    assert status == 400
    where, message = answer["error"]["param"], answer["error"]["message"]
    assert where == "messages.0.content.0.image_url.url"
    assert re.fullmatch(rf"{where}: takes more than [\d.]+ s or too much memory to read", message)


# Bodies


@pytest.mark.parametrize(
    "body, status",
    [
        (b"{" + b",".join(b'"%d":1' % number for number in range(600_000)) + b"}", 413),
        (b'{"qgsa":{' + b",".join(b'"%d":1' % number for number in range(24_000)) + b"}}", 400),
        (b'{"messages":' + b"[" * 90_000, 400),
        (b'{"messages":[' + b"[]," * 3_000_000, 413),
        (b'{"seed":' + b"1" * 10_000_000 + b"}", 400),
        (b'{"user":"' + b"\\u0041" * 3_000_000 + b'","messages":[]}', 400),
    ],
)
def test_bodies_that_take_forever(body, status, url):
    with healthy(url):
        found, answer = ask(url, body)
    assert found == status and len(answer["error"]["message"]) < 1000


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"])
def test_a_body_in_tiny_chunks(before, url):
    """Also one that arrives before an earlier request on the connection is answered."""
    head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    with healthy(url), ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(sent(url, b""))
            try:
                connection.sendall(before + head.encode() + b"1\r\na\r\n" * 500_000)
            except OSError:  # closed meanwhile
                pass
        time.sleep(0.3)


def test_requests_that_come_before_their_turn(url):
    with healthy(url), sent(url, b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n" * 3000) as connection:
        received = b""
        while received.count(b'{"status":"ok"}') < 3000:
            received += (got := connection.recv(100_000))
            assert got


def test_another_content_type_is_refused(url):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", None):
        status, answer = ask(url, HELLO, kind)
        assert status == 415 and answer["error"]["message"].endswith("must be application/json")
    assert ask(url, HELLO, "Application/JSON; charset=utf-8")[0] == 200


# Connections


@pytest.mark.parametrize("data", [b"", b"POST ", b"GET /health HTTP/1.1\r\nhost: a\r\nx: ", head(10), head(10) + b"{"])
def test_silent_connections(data, url):
    with ExitStack() as stack:
        for _ in range(25):
            stack.enter_context(sent(url, data, "127.0.0.2"))
        with healthy(url):
            time.sleep(0.3)
            assert ask(url)[0] == 200


def test_many_clients(url):
    with healthy(url), ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(lambda _: ask(url), range(64)))
    assert {status for status, _ in answers} <= {200, 503}
    assert all(answer["error"]["code"] == "overloaded" for status, answer in answers if status == 503)


def test_an_address_closes_its_own_connections_only(url):
    with ExitStack() as stack:
        other = stack.enter_context(sent(url, b"", "127.0.0.3"))
        first = stack.enter_context(sent(url, b"", "127.0.0.2"))
        time.sleep(1.2)
        for _ in range(70):
            stack.enter_context(sent(url, b"", "127.0.0.2"))
        assert is_closed(first) and not is_closed(other)


def test_connections_are_bounded_even_if_all_are_new(url):
    opened = []
    with ExitStack() as stack:
        for number in range(serve_connections.MOST_CONNECTIONS + 60):
            opened.append(stack.enter_context(sent(url, b"", f"127.0.1.{1 + number % 20}")))
        assert ask(url)[0] == 200
        assert is_closed(opened[0], 2) and is_closed(opened[30], 2) and not is_closed(opened[-1])


@pytest.mark.parametrize(
    "host, network",
    [
        ("1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("unknown, 1.2.3.4", "unknown, 1.2.3.4"),
    ],
)
def test_what_counts_as_one_address(host, network):
    assert serve_connections.network_of(host) == network


def test_an_address_has_places_of_its_own(url):
    limits = Limits()
    with ExitStack() as stack:
        for _ in range(limits.max_batch_size + limits.max_waiting + serve_connections.SPARE):
            stack.enter_context(sent(url, head(10), "127.0.0.2"))
        time.sleep(0.3)
        refused = stack.enter_context(sent(url, head(10), "127.0.0.2"))
        assert b"503" in refused.recv(100)
        assert ask(url)[0] == 200


@pytest.mark.parametrize("garbage", [b"[" * 5_000_000, b'{"messages": "' + b"a" * 5_000_000 + b'"}'])
def test_whoever_sends_garbage_has_to_pause_and_nobody_else(url, garbage):
    def seconds_for(body, source):
        began = time.perf_counter()
        status, _ = ask(url, body, source=source)
        return status, time.perf_counter() - began

    first = seconds_for(garbage, "127.0.0.3")
    assert first[0] in (400, 413)
    status, seconds = seconds_for(HELLO, "127.0.0.1")
    assert status == 200 and seconds < 0.4
    status, seconds = seconds_for(HELLO, "127.0.0.3")
    assert status == 200 and seconds > 0.3


@pytest.fixture
def arrive():
    """Lets requests of one address arrive, and tells after how many seconds each was received."""

    async def one(places, length, status, began, number):
        request = Request({"type": "http", "client": ("1.2.3.4", 1), "headers": [(b"content-length", b"%d" % length)]})
        with suppress(RequestError):
            async with places.take(request):
                began[number] = asyncio.get_running_loop().time()
                if status is not None:
                    raise RequestError("refused", status=status)

    def all_of(*waves):
        """Requests `(length, status)` in waves, one after another; status None for one that is answered."""

        async def run():
            places, began = serve_connections.Places(queue=8), {}
            start, number = asyncio.get_running_loop().time(), 0
            for wave in waves:
                await asyncio.gather(*(one(places, *each, began, number + n) for n, each in enumerate(wave)))
                number += len(wave)
            return [began[n] - start for n in sorted(began)], places

        return asyncio.run(run())

    return all_of


def test_an_address_is_read_one_by_one_while_it_pauses(arrive):
    megabyte = (1_000_000, 413)  # a tenth of a second
    began, _ = arrive([megabyte], [megabyte, megabyte, megabyte], [(10, None)])
    assert sorted(began) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=0.05)


def test_requests_that_are_answered_do_not_pause_the_next(arrive):
    began, left = arrive([(50_000_000, None)], [(10, None)], [(50_000_000, 503)], [(10, None)])
    assert began == pytest.approx([0, 0, 0, 0], abs=0.05)
    assert not left.paused_until and not left.taken


def test_a_declared_length_cannot_pause_an_address_forever(arrive):
    _, left = arrive([(10**15, 413)])
    assert max(left.paused_until.values()) - time.monotonic() <= serve_connections.LONGEST_PAUSE


@pytest.fixture(scope="module")
def hurried():
    """A server in this process that waits for tenths of a second."""
    seconds = {"SECONDS_FOR_HEAD": 0.4, "SECONDS_OF_SILENCE": 0.4, "SECONDS_TO_SEND": 0.8, "SECONDS_TO_READ": 0.4}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in seconds.items():
            patch.setattr(serve_connections, name, value)
        with serving(make_app(*load("hub_cards/tiny-qgsa"), Limits()), **serve_connections.OPTIONS) as url:
            yield url


def trickle(connection, pieces):
    """Send pieces, a tenth of a second apart, until the connection is closed; returns what was received."""
    connection.settimeout(0.1)
    received = b""
    for piece in pieces:
        try:
            connection.sendall(piece)
            received += (got := connection.recv(10_000))
            if not got:
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    else:
        pytest.fail("the connection stayed open")
    return received


@pytest.mark.parametrize("begin", [b"", b"GET /health HTTP/1.1\r\nhost: a\r\ncontent-length: 999\r\n\r\n"])
@pytest.mark.parametrize("piece", [b"", b"x"])
def test_heads_and_unread_bodies_have_little_time(begin, piece, hurried):
    with sent(hurried, begin) as connection:
        trickle(connection, [piece] * 40)


@pytest.mark.parametrize("piece", [b"", b" "])
def test_bodies_have_little_time(piece, hurried):
    with healthy(hurried), sent(hurried, head(999)) as connection:
        answer = trickle(connection, [piece] * 60)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"the request paused for 0.4 s or took more than 0.8 s" in answer


def test_answers_must_be_read(hurried):
    request = b"GET /" + b"a" * 7000 + b" HTTP/1.1\r\nhost: a\r\n\r\n"  # the error names the path
    with healthy(hurried), sent(hurried, b"") as connection:
        connection.settimeout(0.3)
        with pytest.raises(OSError):  # all buffers are full
            while True:
                connection.sendall(request * 10)
        poll = select.poll()
        poll.register(connection, 0)  # tells of errors only
        assert poll.poll(5000)
