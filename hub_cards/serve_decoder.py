"""Worker that reads images, one per job; `serve_images` starts it, see `serve_workers`.

A job is a file's bytes and `pixels`, true or false: without pixels only the header is read. The result has `width` and
`height`, and with pixels their `mode` and bytes, upright; or an `error`.
"""

import io

from PIL import Image, ImageOps, UnidentifiedImageError
from serve_workers import work


FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # the only Pillow decoders in use
KEPT = ("L", "RGB", "RGBA", "I", "I;16", "I;16B", "F")  # the processor checks the depth of the last four


def read_image(job: dict, data: bytes) -> tuple[dict, bytes]:
    """Read an image. Pillow raises errors of many types on corrupted files; memory errors end the worker."""
    problem = "cannot be read"
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        problem = "truncated or corrupted"
        pixels = read_pixels(image) if job["pixels"] else image
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return {"error": f"{len(data)} bytes are not a valid {', '.join(FORMATS)} image"}, b""
    except Exception as error:
        return {"error": f"{problem} ({error})"[:500]}, b""
    result = {"width": pixels.width, "height": pixels.height, "mode": pixels.mode}
    return result, pixels.tobytes() if job["pixels"] else b""


def read_pixels(image: Image.Image) -> Image.Image:
    """An image with its EXIF orientation applied, in one of the modes KEPT."""
    ImageOps.exif_transpose(image, in_place=True)
    if "A" in image.getbands() or "transparency" in image.info:
        return image.convert("RGBA")
    return image if image.mode in KEPT else image.convert("RGB")


if __name__ == "__main__":
    Image.preinit()  # now, not within the time of the first image
    work(read_image)
