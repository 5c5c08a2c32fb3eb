"""Images of a request: fetched, checked and decoded within the limits."""

import asyncio
import base64
import binascii
import io
import ipaddress
import re
import socket
from collections.abc import Callable

import httpx
from PIL import Image, ImageOps, UnidentifiedImageError
from serve_requests import ChatRequest, Limits, RequestError


FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # the only Pillow decoders in use
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
SECONDS = 10  # per URL, from the DNS lookup to the last byte
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


async def load_images(chat: ChatRequest, limits: Limits) -> list[Image.Image]:
    """Fetch the images of a request and read their headers; `decode` reads the pixels.

    Raises RequestError, naming the image, if it cannot be fetched, is not an image or exceeds the limits.
    """
    images, left, pixels = [], limits.max_bytes, 0
    for where, url in chat.image_urls:
        if DATA_URL.match(url):
            data = read_data_url(url, where)
        else:
            data = await fetch(url, where, limits, left)
            left -= len(data)
        image = open_image(data, where)
        pixels += image.width * image.height
        if pixels > limits.max_pixels:
            raise RequestError(
                f"{where}: {image.width} x {image.height} px bring the request to {pixels} pixels, but the limit is "
                f"{limits.max_pixels}",
                where,
            )
        images.append(image)
    return images


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
    return bytes(data)


def is_public(address: str) -> bool:
    """Whether an IP address is public: not private, loopback, link-local, reserved or multicast.

    In IPv6 only global unicast without 6to4 is public; other ranges can embed IPv4 addresses.
    """
    ip = ipaddress.ip_address(address)
    if ip.version == 6 and (ip not in GLOBAL_UNICAST or ip.sixtofour):
        return False
    return ip.is_global and not ip.is_multicast


def open_image(data: bytes, where: str) -> Image.Image:
    """Read format and size of an image from its header. Raises RequestError if there is none."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise RequestError(f"{where}: {len(data)} bytes are not a valid {', '.join(FORMATS)} image", where) from error
    except Exception as error:  # Pillow raises errors of many types on corrupted files
        raise RequestError(f"{where}: cannot be read ({error})", where) from error


def decode(image: Image.Image, where: str):
    """Read the pixels and apply the EXIF orientation, in place. Raises RequestError if the image is corrupted."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # as above
        raise RequestError(f"{where}: truncated or corrupted ({error})", where) from error
