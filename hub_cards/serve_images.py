"""Images of a request: fetched, checked and decoded within the limits, by workers that can be killed."""

import asyncio
import base64
import binascii
import ipaddress
import os
import re
import reprlib
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
from PIL import Image
from serve_errors import RequestError
from serve_requests import ChatRequest, Limits
from serve_workers import WorkerKilled, Workers


DECODER = Path(__file__).with_name("serve_decoder.py")
HEADERS = 2  # images whose headers are read at the same time, one behind the other for all clients
READERS = max(2, min(4, os.cpu_count() or 1))  # images whose pixels are read at the same time
SHARE = 0.2  # of `max_image_seconds`, for the headers of a request; those of honest images take milliseconds
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
SECONDS = 10  # per URL, from the DNS lookup to the last byte
# A host that all parsers of URLs read alike: no user, backslash, escape, zone or letter beyond ASCII.
URL = re.compile(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?(?:[/?#]|\Z)", re.IGNORECASE | re.ASCII)
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# Protocol assignments, 6to4 relays and documentation: public, all or in part, in the tables of some Python versions.
RESERVED = [ipaddress.ip_network(each) for each in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20")]


@dataclass
class Encoded:
    """An image that is not decoded yet.

    Args:
        where: name of the field that holds it, for errors.
        data: the file.
        width, height: its size in pixels, before it is turned upright.
    """

    where: str
    data: bytes
    width: int
    height: int


class ImageReader:
    """Reads images in worker processes, the pixels of a request within `limits.max_image_seconds`.

    The headers have workers and threads of their own, so that they never wait for pixels; pixels are read in READERS
    threads, see `serve_batches`.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        memory = 2**29 + 24 * limits.max_pixels  # Pillow, and six copies of four channels
        self.workers = Workers(DECODER, HEADERS + READERS, memory)
        self.threads = ThreadPoolExecutor(HEADERS)

    async def load(self, chat: ChatRequest) -> list[Encoded]:
        """Fetch the images of a request and read their headers; `decode` reads the pixels.

        Raises RequestError, naming the image, if it cannot be fetched, is not an image or exceeds the limits.
        """
        images, left, pixels, seconds = [], self.limits.max_bytes, 0, SHARE * self.limits.max_image_seconds
        in_thread = asyncio.get_running_loop().run_in_executor
        for where, url in chat.image_urls:
            if DATA_URL.match(url):
                data = await in_thread(self.threads, read_data_url, url, where)
            else:
                data = await fetch(url, where, self.limits, left)
                left -= len(data)
            found, _, seconds = await in_thread(self.threads, self.read, data, where, seconds, False)
            width, height = found["width"], found["height"]
            pixels += width * height
            if pixels > self.limits.max_pixels:
                raise RequestError(
                    f"{where}: {width} x {height} px bring the request to {pixels} pixels, but the limit is "
                    f"{self.limits.max_pixels}",
                    where,
                )
            images.append(Encoded(where, data, width, height))
        return images

    def decode(self, images: list[Encoded]) -> list[Image.Image]:
        """Read the pixels, upright. Raises RequestError, naming the image, if it is corrupted or takes too long."""
        decoded, seconds = [], self.limits.max_image_seconds
        for image in images:
            found, pixels, seconds = self.read(image.data, image.where, seconds, True)
            decoded.append(Image.frombytes(found["mode"], (found["width"], found["height"]), pixels))
        return decoded

    def read(self, data: bytes, where: str, seconds: float, pixels: bool) -> tuple[dict, bytes, float]:
        """Read header or pixels of an image; returns the fields and data of `serve_decoder`, and the seconds left."""
        started = time.perf_counter()
        try:
            found, data = self.workers.run(seconds, {"pixels": pixels}, data)
        except WorkerKilled as error:
            message = f"{where}: takes more than {seconds:.2g} s or too much memory to read"
            raise RequestError(message, where) from error
        if "error" in found:
            raise RequestError(f"{where}: {found['error']}", where)
        return found, data, max(seconds - (time.perf_counter() - started), 0)

    def close(self):
        """End the workers."""
        self.workers.close()
        self.threads.shutdown()


def read_data_url(url: str, where: str) -> bytes:
    """Bytes of a `data:image/...;base64,` URL. Raises RequestError if they are not valid base64."""
    try:
        return base64.b64decode(url[url.index(",") + 1 :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where}: invalid base64 data ({error})", where) from error


async def fetch(
    url: str, where: str, limits: Limits, max_bytes: int, allowed: Callable[[str], bool] | None = None
) -> bytes:
    """Download an http(s) URL.

    Every address of the host must be `allowed` (`is_public` by default). The connection is made to the first of these
    addresses, never to the result of a second lookup. Redirects are not followed, proxies not used.

    Raises RequestError if the URL is not allowed or takes more than 10 seconds or `max_bytes`.
    """
    if not re.match("https?://", url, re.IGNORECASE):
        raise RequestError(f"{where}: must be a data:image/...;base64, or http(s) URL", where)
    if not limits.allow_urls:
        raise RequestError(
            f"{where}: the server does not fetch URLs (--allow_urls): send data:image/...;base64,", where
        )
    plain = URL.match(url)
    if plain is None or not 0 < int(plain[2] or 80) < 2**16:
        rule = "must be http(s)://host/ or http(s)://host:port/, the host in ASCII"
        raise RequestError(f"{where}: {reprlib.repr(url)} {rule}", where)
    try:
        async with asyncio.timeout(SECONDS):
            return await download(httpx.URL(url), where, max_bytes, allowed or is_public)
    except TimeoutError as error:
        raise RequestError(f"{where}: not fetched within {SECONDS} seconds", where) from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        raise RequestError(f"{where}: cannot be fetched ({type(error).__name__})", where) from error


async def download(url: httpx.URL, where: str, max_bytes: int, allowed: Callable[[str], bool]) -> bytes:
    """Download a URL that `fetch` has checked."""
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    addresses = [address[0] for *_, address in found]
    if not all(map(allowed, addresses)):
        raise RequestError(f"{where}: {url.host} must resolve to public addresses only", where)

    request = {
        "url": url.copy_with(host=addresses[0]),
        "headers": {"host": url.netloc.decode(), "accept-encoding": "identity"},
        "extensions": {"sni_hostname": url.host},  # the certificate is checked against the name
    }
    data = bytearray()
    async with httpx.AsyncClient(trust_env=False, timeout=SECONDS) as client:
        async with client.stream("GET", **request) as response:
            if response.status_code != 200:
                raise RequestError(f"{where}: the response has status {response.status_code}, not 200", where)
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > max_bytes:
                    raise RequestError(f"{where}: exceeds the limit of {max_bytes} bytes", where)
                await asyncio.sleep(0)  # a million tiny pieces would come without any pause
    return bytes(data)


def is_public(address: str) -> bool:
    """Whether an IP address is public: not private, loopback, link-local, multicast or reserved in any table.

    In IPv6 only global unicast without 6to4 is public; other ranges can embed IPv4 addresses.
    """
    ip = ipaddress.ip_address(address)
    if ip.version == 6 and (ip not in GLOBAL_UNICAST or ip.sixtofour):
        return False
    reserved = any(ip in network for network in RESERVED)  # one of the other version contains no address
    return ip.is_global and not ip.is_multicast and not reserved
