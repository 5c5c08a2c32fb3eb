"""Input images: loaded, checked, and converted to 8 bits per channel before any tile is cut."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image

from .tiles_qgsa import LazyImage


MIN_SIDE = 4  # px; a smaller image has no content to look at
MAX_ASPECT = 200  # beyond it the short side is resized to nothing
MAX_PIXELS = 89_478_485  # above it PIL warns of decompression bombs


def load_images(images, rescale: bool = True):
    """Load images given by path, URL or data URI, in lists of any depth, and check every image; None stays None.

    Returns PIL images, and uint8 arrays for arrays and tensors without an alpha channel. Floats stay as they are if
    the image processor does not `rescale` from 0 .. 255, and so do images that were opened already. Raises TypeError
    if an element is not an image, OSError or ValueError if it cannot be read or fails `check_size` or `check_depth`.
    """
    if isinstance(images, list | tuple):
        return [load_images(image, rescale) for image in images]
    if images is None or isinstance(images, LazyImage):
        return images
    if isinstance(images, str):
        images = read(lambda: open_image(images), repr(images if len(images) < 100 else images[:100] + "..."))
    if not isinstance(images, Image.Image):
        return without_alpha(to_uint8(images, rescale))
    check_size(*images.size)
    read(images.load, images.format or "as given")
    check_depth(images)
    return images


def open_image(address: str) -> Image.Image:
    """The image at a path, URL or data URI, upright and in RGB."""
    if os.path.isfile(address):
        with Image.open(address) as image:  # the header tells the size before any pixel is decoded
            check_size(*image.size)
            check_depth(image)
    if address.startswith("data:") and "," not in address:
        raise ValueError(f"image ({address[:100]!r}): a data URI needs a comma before its data")
    return load_image(address)


def read(load, name: str):
    """The result of `load`. Raises ValueError, naming the image, for any other error from PIL or the network."""
    try:
        return load()
    except (OSError, ValueError, TypeError):
        raise
    except Exception as error:
        raise ValueError(f"cannot read the image {name}: {type(error).__name__}: {error}") from error


def check_size(width: int, height: int):
    """Raise ValueError, naming both sides, if an image is too small, too narrow or too large to be cut into tiles."""
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"image ({width} x {height} px): each side must have at least {MIN_SIDE} px, and the longer one at most "
            f"{MAX_ASPECT} times the shorter"
        )
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"image ({width} x {height} px): its {width * height} pixels exceed the limit of {MAX_PIXELS}"
        )


def check_depth(image: Image.Image):
    """Raise ValueError for pixels that do not fit into 8 bits: in RGB they would saturate at 255, or all be 0."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return
    extrema: Any = image.getextrema()  # of one channel
    low, high = extrema
    if low < 0 or high > 255 or (image.mode == "F" and high <= 1):
        raise ValueError(
            f"image (mode {image.mode}, {low} to {high}) must fit into 8 bits: scale it to 0 .. 255, mode L"
        )


def to_uint8(image, rescale: bool = True) -> np.ndarray:
    """An array or tensor as a uint8 array, `(height, width, channels)` or `(channels, height, width)`.

    Bools, and floats up to 1, are fractions of 255; all other numbers are taken literally. Without `rescale` floats
    stay as they are. Raises TypeError unless it is an array or tensor of numbers, ValueError if its shape does not
    match or a number is outside 0 .. 255.
    """
    if isinstance(image, torch.Tensor):
        given, floats = image, torch.float32 if image.is_floating_point() else image.dtype
        image = read(lambda: given.detach().to("cpu", floats).numpy(), "tensor")
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image ({type(image).__name__}) must be a PIL image, array, tensor, path or URL")
    if image.dtype.kind not in "biuf":
        raise TypeError(f"image ({image.dtype}) must hold uint8, numbers from 0 to 255, or floats from 0 to 1")
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or not {1, 3, 4} & {image.shape[0], image.shape[-1]}:
        raise ValueError(f"image (shape {image.shape}) must have a height, a width, and 1, 3 or 4 channels")
    height, width = image.shape[:2] if image.shape[-1] in (1, 3, 4) else image.shape[1:]
    check_size(width, height)
    if image.dtype == np.uint8 or (image.dtype.kind == "f" and not rescale and np.isfinite(image).all()):
        return np.ascontiguousarray(image)
    low, high = image.min(), image.max()
    if not (0 <= low and high <= 255):  # written so that NaN fails too
        raise ValueError(f"image ({image.dtype}, {low} to {high}) must be within 0 .. 255, or 0 .. 1 for floats")
    shares = image.dtype.kind == "b" or (image.dtype.kind == "f" and high <= 1)
    return np.round(image.astype(np.float32) * (255 if shares else 1)).astype(np.uint8)


def without_alpha(image: np.ndarray):
    """A uint8 array with four channels as a PIL image in RGB; any other array as it is."""
    last = image.shape[-1] in (1, 3, 4)
    if image.dtype != np.uint8 or image.shape[-1 if last else 0] != 4:
        return image
    return to_rgb(Image.fromarray(np.ascontiguousarray(image if last else image.transpose(1, 2, 0))))


def to_rgb(image) -> Image.Image:
    """A PIL image, or an array of `(height, width, 3)` or `(3, height, width)`, as a PIL image in RGB.

    Transparent pixels become white, as in the stock image processor.
    """
    image = to_pil_image(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image)
    return image.convert("RGB")


def has_images(images) -> bool:
    """Whether nested lists contain any image."""
    return any(map(has_images, images)) if isinstance(images, list | tuple) else images is not None


def images_per_sample(images, counts: list[int]) -> list[list]:
    """The images of each sample; `counts` holds the number of images that each prompt names.

    Raises ValueError if the numbers differ, and for lists of mixed depth or with None among the images.
    """
    images = images if isinstance(images, list | tuple) else [images]
    nested = [isinstance(sample, list | tuple) for sample in images]
    flat = [image for sample in images for image in sample] if all(nested) else images
    if any(image is None or isinstance(image, list | tuple) for image in flat):
        raise ValueError("images must be one image, a list of images, or one list of images per prompt, without None")
    if not all(nested):
        if sum(counts) != len(images):
            raise ValueError(f"the prompts name {sum(counts)} images, but {len(images)} are given")
        images = iter(images)
        return [[next(images) for _ in range(count)] for count in counts]
    given = [len(sample) for sample in images]
    if given != counts:
        raise ValueError(f"the prompts name {counts} images, but {given} are given")
    return [list(sample) for sample in images]
