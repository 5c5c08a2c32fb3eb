"""Images of a request: fetched, checked and decoded, all within limits."""

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


FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # no more of Pillow's decoders than that
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
SECONDS = 10  # for one URL, from its look-up to its last byte
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


async def load_images(chat: ChatRequest, limits: Limits) -> list[Image.Image]:
    """The images of a request, of which only the headers are read yet; see `decode`.

    Raises RequestError, naming the image, for what cannot be fetched or is no image, and for too many bytes or pixels.
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
                f"{where}: an image of {image.width} x {image.height} px makes {pixels} pixels in all, at most "
                f"{limits.max_pixels} are allowed",
                where,
            )
        images.append(image)
    return images


def read_data_url(url: str, where: str) -> bytes:
    """The bytes of a `data:image/...;base64,` URL. Raises RequestError where they are no base64."""
    try:
        return base64.b64decode(url[url.index(",") + 1 :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where}: the data is not base64 ({error})", where) from error


async def fetch(
    url: str, where: str, limits: Limits, max_bytes: int, allowed: Callable[[str], bool] | None = None
) -> bytes:
    """The bytes behind an http(s) URL.

    Every address of the host has to be `allowed` (`is_public` by default); the connection is made to the first of
    them and to nothing that a second look-up could answer. Redirects are not followed, proxies not used.

    Raises RequestError for URLs that are not allowed, and for what takes over 10 seconds or `max_bytes`.
    """
    if not re.match("https?://", url, re.IGNORECASE):
        raise RequestError(f"{where}: images are data:image/...;base64, or http(s) URLs", where)
    if not limits.allow_urls:
        raise RequestError(f"{where}: this server fetches no URLs (--allow_urls), send data:image/...;base64,", where)
    try:
        async with asyncio.timeout(SECONDS):
            return await download(httpx.URL(url), where, max_bytes, allowed or is_public)
    except TimeoutError as error:
        raise RequestError(f"{where}: fetching it took more than {SECONDS} seconds", where) from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        raise RequestError(f"{where}: it cannot be fetched ({type(error).__name__})", where) from error


async def download(url: httpx.URL, where: str, max_bytes: int, allowed: Callable[[str], bool]) -> bytes:
    """As `fetch`, without its checks of the URL."""
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    addresses = [address[0] for *_, address in found]
    if not all(map(allowed, addresses)):
        raise RequestError(f"{where}: {url.host} is not, or not only, at public addresses", where)

    request = {
        "url": url.copy_with(host=addresses[0]),
        "headers": {"host": url.netloc.decode(), "accept-encoding": "identity"},
        "extensions": {"sni_hostname": url.host},  # what the certificate is checked against
    }
    data = bytearray()
    async with httpx.AsyncClient(trust_env=False, timeout=SECONDS) as client:
        async with client.stream("GET", **request) as response:
            if response.status_code != 200:
                raise RequestError(f"{where}: it answers with status {response.status_code}, not 200", where)
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > max_bytes:
                    raise RequestError(f"{where}: it has more than the {max_bytes} bytes that are allowed", where)
    return bytes(data)


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet: not private, loopback, link-local, reserved or multicast.

    Of IPv6 only global unicast is, less 6to4: the rest holds IPv4 addresses in disguise.
    """
    ip = ipaddress.ip_address(address)
    if ip.version == 6 and (ip not in GLOBAL_UNICAST or ip.sixtofour):
        return False
    return ip.is_global and not ip.is_multicast


def open_image(data: bytes, where: str) -> Image.Image:
    """Read the header of an image: its format and size. Raises RequestError where there is none."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise RequestError(
            f"{where}: {len(data)} bytes that are no image, or a broken one, in {', '.join(FORMATS)}", where
        ) from error
    except Exception as error:  # Pillow raises whatever a broken file makes it trip over
        raise RequestError(f"{where}: it cannot be read ({error})", where) from error


def decode(image: Image.Image, where: str):
    """Read the pixels and set them upright, in place. Raises RequestError where the image is truncated or broken."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # as above
        raise RequestError(f"{where}: it is truncated or broken ({error})", where) from error
