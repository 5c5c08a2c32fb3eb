"""Requests that would stop the server of hub_cards/serve.py: `/health` and other clients are answered meanwhile."""

import base64
import http.client
import io
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image


CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 1}
IMAGE = Image.new("RGB", (64, 64), (200, 30, 90))


@pytest.fixture(scope="module")
def url():
    """The script with one second for images, and memory for small ones."""
    command = [
        sys.executable,
        "hub_cards/serve.py",
        "--port",
        "0",
    ] + "--max_image_seconds 1 --max_pixels 10000000".split()
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


def ask(url, body=HELLO, timeout=30):
    return httpx.post(url + CHAT, json=body, timeout=timeout)


def error_of(response, status):
    """The message of an error in OpenAI's format."""
    assert response.status_code == status
    return response.json()["error"]["message"]


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
    "make, size", [(with_segments, 8), (with_comments, 4), (with_profiles, 8), (with_copies, 1200), (with_scans, 3000)]
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
        assert ask(url).status_code == 200
        message = error_of(attack.result(), 400)
    assert message == "messages.0.content.0.image_url.url: takes more than 1 s or too much memory to read"
