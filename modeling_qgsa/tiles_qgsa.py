"""Images whose tiles are cut when somebody asks for them, each pixel as the stock image processor makes it."""

import hashlib
import math
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from transformers.image_transforms import normalize, rescale


MAX_SIDE = 4096  # px; the stock image processor scales no image beyond it


class LazyImage:
    """An image scaled as the stock image processor scales it, and cut one tile at a time.

    Args:
        image: PIL, RGB.
        longest_edge: px that its longer side is scaled to, `size["longest_edge"]` of the image processor.
        tile: px of a tile's side, `max_image_size["longest_edge"]`.
        split: whether there are tiles beside the global view.
        resample: filter of all resizing.
    """

    def __init__(self, image: Image.Image, longest_edge: int, tile: int, split: bool, resample: int):
        self.resample, self.tile = resample, tile
        image = image.resize(scaled_size(*image.size, longest_edge), resample)
        if split:
            image = image.resize(size_in_tiles(*image.size, tile), resample)
        columns, rows = (side // tile for side in image.size)
        self.image = image
        self.grid = (rows, columns) if split and max(rows, columns) > 1 else (0, 0)

    @cached_property
    def digest(self) -> str:
        """What tells the image from others, and from itself cut in another way."""
        settings = str((self.image.size, self.tile, self.grid, self.resample))
        return hashlib.sha256(self.image.tobytes() + settings.encode()).hexdigest()

    @property
    def last(self) -> int:
        """Number of the global view, which stands behind the tiles."""
        return math.prod(self.grid)

    def cut(self, number: int) -> np.ndarray:
        """Pixels of tile `number`, row by row and the global view last: `(3, tile, tile)` uint8."""
        columns = self.grid[1]
        if number == self.last:
            view = self.image
            if view.size != (self.tile, self.tile):
                view = view.resize((self.tile, self.tile), self.resample)
        else:
            left, top = self.tile * (number % columns), self.tile * (number // columns)
            view = self.image.crop((left, top, left + self.tile, top + self.tile))
        return np.asarray(view).transpose(2, 0, 1)


class LazyTiles:
    """The tiles of a batch's images, made of pixels only when the model asks for them.

    Args:
        samples: the images of each sample.
        image_processor: whose `rescale_factor`, `image_mean` and `image_std` the pixels get.
    """

    def __init__(self, samples: list[list[LazyImage]], image_processor):
        self.image_processor = image_processor
        self.tiles = [[(image, number) for image in images for number in range(image.last + 1)] for images in samples]

    @property
    def counts(self) -> list[int]:
        """Tiles of each sample, global views included."""
        return [len(tiles) for tiles in self.tiles]

    def cut(self, samples: list[int], ordinals: list[int]) -> torch.Tensor:
        """Pixels of some tiles, each by its sample and its number therein: `(n, 3, tile, tile)` float32."""
        views = [image.cut(number) for image, number in (self.tiles[s][o] for s, o in zip(samples, ordinals))]
        return torch.from_numpy(np.stack([self.to_floats(view) for view in views]))

    def global_views(self) -> torch.Tensor:
        """Pixels of the global views, `(B, images, 3, tile, tile)` float32; zeros where a sample has fewer images."""
        places = [
            (s, o) for s, tiles in enumerate(self.tiles) for o, (image, n) in enumerate(tiles) if n == image.last
        ]
        counts = [sum(sample == s for sample, _ in places) for s in range(len(self.tiles))]
        return torch.nn.utils.rnn.pad_sequence(self.cut(*zip(*places)).split(counts), batch_first=True)

    def to_floats(self, pixels: np.ndarray) -> np.ndarray:
        own = self.image_processor
        if own.do_rescale:
            pixels = rescale(pixels, own.rescale_factor, input_data_format="channels_first")
        if own.do_normalize:
            pixels = normalize(pixels, own.image_mean, own.image_std, input_data_format="channels_first")
        return pixels.astype(np.float32)

    def key(self, sample: int, ordinal: int) -> tuple:
        """What tells a tile from those of all other images."""
        image, number = self.tiles[sample][ordinal]
        own = self.image_processor
        scale = (own.do_rescale, own.rescale_factor, own.do_normalize, *own.image_mean, *own.image_std)
        return image.digest, number, scale


def scaled_size(width: int, height: int, longest_edge: int) -> tuple[int, int]:
    """(width, height) of an image scaled to `longest_edge`, its shorter side even, as the stock processor rounds."""
    aspect = width / height
    if width >= height:
        width, height = longest_edge, int(longest_edge / aspect)
        height += height % 2
    else:
        width, height = int(longest_edge * aspect), longest_edge
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    if max(width, height) > MAX_SIDE:
        aspect = width / height
        width, height = (MAX_SIDE, int(MAX_SIDE / aspect)) if width >= height else (int(MAX_SIDE * aspect), MAX_SIDE)
    return max(width, 1), max(height, 1)


def size_in_tiles(width: int, height: int, tile: int) -> tuple[int, int]:
    """(width, height) rounded up to whole tiles, the longer side first, as the stock processor does."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return width, height
