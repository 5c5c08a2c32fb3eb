"""What there is to look at, and the encoder over parts of it. Sizes as in `selection_qgsa`."""

import hashlib
import weakref
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch

from .generations_qgsa import AS_OUTPUT, tile_features
from .prompt_qgsa import check_shape
from .selection_qgsa import VisualLayout


class VisualCache:
    """Features of tiles already looked at: look once, ask many times.

    Given to `generate`, `select` or `forward` as `visual_cache`, it makes the next question about the same images pay
    for new tiles only (blocks of tiles are not kept: what they are depends on their neighbours). A tile is known by
    its pixels, and by the encoder as it is, so that a cache may serve several images and models. With a cache tiles
    are encoded one by one: answers are those of a model without one at `tiles_per_step=1`, bit for bit.

    Args:
        max_bytes (`int`, defaults to 256 MiB): most bytes of features to hold; the least recently used go first. A
            tile of SmolVLM-256M takes 144 KiB in float32.

    Raises ValueError where `max_bytes` is below 1.
    """

    def __init__(self, max_bytes: int = 256 * 2**20):
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}: it has to be at least 1")
        self.max_bytes = max_bytes
        self.bytes = 0
        self._features = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key) -> torch.Tensor | None:
        """The features `(P, D)` held under `key`, or None."""
        if key in self._features:
            self._features.move_to_end(key)
        return self._features.get(key)

    def put(self, key, features: torch.Tensor):
        """Hold `features` `(P, D)`, in the place of what was used least recently where there is no room."""
        size = features.numel() * features.element_size()
        if key in self._features or size > self.max_bytes:
            return
        while self.bytes + size > self.max_bytes:
            _, oldest = self._features.popitem(last=False)
            self.bytes -= oldest.numel() * oldest.element_size()
        self._features[key] = features.detach().clone()
        self.bytes += size


@dataclass(frozen=True)
class Views:
    """What there is to look at: the pixels of all tiles, or their features where they are known, or a way to cut them.

    Args:
        pixel_values: `(B, tiles, 3, H, W)`; of the global views only, `(B, images, 3, H, W)`, beside `lazy_tiles`.
        pixel_attention_mask: `(B, tiles, H, W)`; none beside `lazy_tiles`, whose tiles are full.
        features: `(T, P, D)`.
        lazy_tiles: cuts tiles on demand, see [`LazyTiles`].
        cache: where features are looked up first.
    """

    pixel_values: torch.Tensor | None
    pixel_attention_mask: torch.Tensor | None = None
    features: torch.Tensor | None = None
    lazy_tiles: object | None = None
    cache: VisualCache | None = None

    @property
    def are_none(self) -> bool:
        return self.pixel_values is None and self.features is None

    def refuse_dense(self):
        """Raise ValueError where something is given that "dense", the stock model, cannot take."""
        for name, given in (
            ("image_hidden_states", self.features),
            ("lazy_tiles", self.lazy_tiles),
            ("visual_cache", self.cache),
        ):
            if given is not None:
                raise ValueError(f'selection is "dense": it takes pixel_values of all tiles, {name} is for the others')

    def pixels(self, layout: VisualLayout, tiles: torch.BoolTensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pixels `(n, 3, H, W)` and mask (`(n, H, W)` or None) of the tiles chosen by `tiles`, `(T,)` bool."""
        samples, ordinals = layout.tile_sample[tiles], layout.tile_ordinal[tiles]
        if self.lazy_tiles is None:
            mask = self.pixel_attention_mask
            return self.pixel_values[samples, ordinals], None if mask is None else mask[samples, ordinals]
        if (tiles <= layout.is_global).all():
            first = torch.searchsorted(layout.image_sample, layout.image_sample)
            number = torch.arange(len(first), device=first.device) - first
            return self.pixel_values[samples, number[layout.tile_image[tiles]]], None
        pixels = self.lazy_tiles.cut(samples.tolist(), ordinals.tolist())
        return pixels.to(self.pixel_values.device, self.pixel_values.dtype), None

    def key(self, layout: VisualLayout, tile: int):
        """What tells a tile from all others: the digest of its pixels, or the image's and its place."""
        sample, ordinal = int(layout.tile_sample[tile]), int(layout.tile_ordinal[tile])
        if self.lazy_tiles is not None:
            return self.pixel_values.dtype, *self.lazy_tiles.key(sample, ordinal)
        of = [self.pixel_values, self.pixel_attention_mask]
        parts = [part[sample, ordinal].cpu().contiguous() for part in of if part is not None]
        return tuple(hashlib.sha256(part.view(torch.uint8).numpy()).hexdigest() for part in parts)


def check_views(views: Views, layout: VisualLayout, side: int):
    """Raise ValueError unless the views are exactly the tiles of the layout, with finite pixels.

    Tiles that are zero throughout are padding, as in the stock model. `side` is that of a tile, in px. Raises
    TypeError for what is of another type.
    """
    for name, given, kind in (
        ("visual_cache", views.cache, "VisualCache"),
        ("lazy_tiles", views.lazy_tiles, "LazyTiles"),
    ):
        kinds = [each.__name__ for each in type(given).__mro__]  # by name: code of a checkpoint is a copy of this
        if given is not None and kind not in kinds:
            raise TypeError(f"{name} is a {kinds[0]}: it has to be a {kind}")
    if views.features is not None:
        check_shape("image_hidden_states", views.features, (None, None, None), floating=True)
        if views.features.shape[:2] != (len(layout.tile_row), layout.tokens_per_tile):
            raise ValueError(
                f"image_hidden_states has shape {tuple(views.features.shape)}: the prompts have placeholders for "
                f"{len(layout.tile_row)} tiles of {layout.tokens_per_tile} visual tokens"
            )
        return
    pixel_values, samples = views.pixel_values, layout.tile_of_position.shape[0]
    check_shape("pixel_values", pixel_values, (samples, None, 3, side, side), floating=True)
    size = pixel_values.abs().flatten(2).sum(-1, dtype=torch.float32)
    for sample in (~size.isfinite().all(1)).nonzero()[:1, 0].tolist():
        raise ValueError(f"sample {sample}: pixel_values holds NaN or infinite values")
    what, held = ("tiles", layout.tile_sample) if views.lazy_tiles is None else ("global views", layout.image_sample)
    wanted = torch.bincount(held, minlength=samples)
    for sample in ((size != 0).sum(1) != wanted).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"sample {sample}: the prompt has placeholders for {wanted[sample]} {what}, pixel_values holds "
            f"{int((size[sample] != 0).sum())}"
        )
    if views.lazy_tiles is None:
        if views.pixel_attention_mask is not None:
            shape = (samples, pixel_values.shape[1], side, side)
            check_shape("pixel_attention_mask", views.pixel_attention_mask, shape)
        return
    wanted = torch.bincount(layout.tile_sample, minlength=samples).tolist()
    if len(views.lazy_tiles.counts) != samples:
        raise ValueError(
            f"lazy_tiles cuts tiles of {len(views.lazy_tiles.counts)} samples: there are {samples} prompts"
        )
    for sample, (count, tiles) in enumerate(zip(views.lazy_tiles.counts, wanted)):
        if count != tiles:
            raise ValueError(
                f"sample {sample}: the prompt has placeholders for {tiles} tiles, lazy_tiles cuts {count}"
            )


def blocks_of_tiles(pixels: torch.Tensor, blocks: int) -> torch.Tensor:
    """Cut tiles, `(n, 3, S, S)`, into `blocks` x `blocks` blocks: `(n, blocks ** 2, 3, S / blocks, S / blocks)`."""
    count, channels, side, _ = pixels.shape
    pixels = pixels.view(count, channels, blocks, side // blocks, blocks, side // blocks)
    return pixels.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def patch_numbers(blocks: int, scale_factor: int, device) -> torch.LongTensor:
    """Number, within its tile, of every patch of every block: `(P, scale_factor ** 2)`, for `blocks` blocks a side."""
    side = blocks * scale_factor
    grid = torch.arange(side**2, device=device).view(blocks, scale_factor, blocks, scale_factor)
    return grid.transpose(1, 2).reshape(blocks**2, scale_factor**2)


def encode_blocks(
    vision, connector, pixels: torch.Tensor, chosen: torch.BoolTensor, image: torch.LongTensor, scale_factor: int
) -> torch.Tensor:
    """Encode the chosen blocks of some tiles and nothing else of them.

    The blocks of an image make one short sequence, in which patches attend to those of their own tile, each at its
    position there. Where every block of a tile is chosen, this is what the encoder makes of the whole tile.

    Args:
        vision, connector: SmolVLM's.
        pixels: `(n, 3, S, S)` of the tiles.
        chosen: `(n, P)` bool.
        image: `(n,)` int64, the image of each tile.

    Returns the features of the chosen blocks, in the order of the tiles, `(blocks, D)`.
    """
    embeddings, side = vision.embeddings, round(chosen.shape[1] ** 0.5)
    tile, block = chosen.nonzero(as_tuple=True)
    covered = side * scale_factor * embeddings.patch_size  # px: what is over is beyond the last whole patch
    pixels = pixels[..., :covered, :covered]
    pixels = blocks_of_tiles(pixels, side)[tile, block].to(embeddings.patch_embedding.weight.dtype)
    numbers = patch_numbers(side, scale_factor, pixels.device)[block]
    hidden = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + embeddings.position_embedding(numbers)

    _, row, counts = image[tile].unique_consecutive(return_inverse=True, return_counts=True)
    column = torch.arange(len(tile), device=tile.device) - (counts.cumsum(0) - counts)[row]
    packed = hidden.new_zeros(len(counts), int(counts.max()), *hidden.shape[1:])
    packed = packed.index_put((row, column), hidden)
    owner = tile.new_full(packed.shape[:2], -1).index_put((row, column), tile)
    owner = owner.repeat_interleave(scale_factor**2, dim=1)
    mask = None
    if (owner != owner[:, :1]).any():
        mask = owner[:, None, :, None] == owner[:, None, None, :]
        mask = torch.where(mask, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)
    encoded = vision.encoder(inputs_embeds=packed.flatten(1, 2), attention_mask=mask).last_hidden_state
    encoded = vision.post_layernorm(encoded).view(*packed.shape[:2], -1)
    return connector.modality_projection(encoded[row, column])


class PartialVision:
    """What [`QGSASmolVLMModel`] adds to SmolVLM's encoder: encoding some tiles, or some blocks of them."""

    @property
    def is_tuned(self) -> bool:
        """Whether the encoder runs otherwise than SmolVLM's: in steps, or in a dtype of its own."""
        return self.config.tiles_per_step is not None or self.vision_model.dtype != self.text_model.dtype

    def get_image_features(self, pixel_values, pixel_attention_mask=None, **kwargs):
        """As SmolVLM's, `config.tiles_per_step` tiles at a time, in the dtype of the text model.

        Where it takes steps, it returns `pooler_output` only.
        """
        step = self.config.tiles_per_step
        real = pixel_values.flatten(2).any(-1)
        if not self.is_tuned or not real.any():
            return super().get_image_features(pixel_values, pixel_attention_mask, **kwargs)
        pixels, mask = pixel_values[real], None if pixel_attention_mask is None else pixel_attention_mask[real]
        step, parts = step or len(pixels), []
        for start in range(0, len(pixels), step):
            some = slice(start, start + step)
            part = None if mask is None else mask[None, some]
            outputs = super().get_image_features(pixels[None, some], part, **AS_OUTPUT)
            parts.append(tile_features(outputs))
        features = torch.cat(parts).to(self.text_model.dtype)
        if torch.is_tensor(outputs):
            return features
        outputs.last_hidden_state = None
        outputs.pooler_output = list(
            features.flatten(0, -2).split((real.sum(1) * self.config.tokens_per_tile).tolist())
        )
        return outputs

    def embed_dense(self, input_ids, pixel_values, pixel_attention_mask=None) -> torch.Tensor:
        """Word embeddings with the features of all tiles, `(B, L, D)`; SmolVLM's own wants one dtype throughout.

        Raises ValueError where the prompt has other placeholders than there are visual tokens.
        """
        features = tile_features(self.get_image_features(pixel_values, pixel_attention_mask, **AS_OUTPUT)).flatten(
            0, -2
        )
        embeds = self.get_input_embeddings()(input_ids)
        visual = input_ids == self.config.image_token_id
        if int(visual.sum()) != len(features):
            raise ValueError(
                f"{int(visual.sum())} image placeholders in input_ids: the pixels make {len(features)} tokens"
            )
        return embeds.masked_scatter(visual[..., None], features)

    def encode_tiles(self, views: Views, layout: VisualLayout, tiles: torch.BoolTensor) -> torch.Tensor:
        """Encode the tiles chosen by `tiles` (`(T,)` bool) and no other: `(n, P, D)`."""
        if views.features is not None:
            return views.features[tiles]
        if views.cache is not None:
            return self.encode_new_tiles(views, layout, tiles)
        pixels, mask = views.pixels(layout, tiles)
        mask = None if mask is None else mask[None]
        features = tile_features(self.get_image_features(pixels[None], mask, **AS_OUTPUT))
        return features.view(-1, layout.tokens_per_tile, self.config.text_config.hidden_size)

    def encode_new_tiles(self, views: Views, layout: VisualLayout, tiles: torch.BoolTensor) -> torch.Tensor:
        """As `encode_tiles`, one by one and only what `views.cache` does not hold, which then holds it."""
        if self.training:
            raise ValueError("visual_cache is for inference: the model is in training mode")
        weights = [*self.vision_model.parameters(), *self.connector.parameters()]
        versions = tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights)
        maker = (weakref.ref(self.vision_model), hash(versions))
        features = []
        for tile in tiles.nonzero()[:, 0].tolist():
            key = (maker, views.key(layout, tile))
            found = views.cache.get(key)
            if found is None:
                one = torch.arange(len(tiles), device=tiles.device) == tile
                found = self.encode_tiles(replace(views, cache=None), layout, one)[0]
                views.cache.put(key, found)
            features.append(found.to(layout.tile_start.device))
        return torch.stack(features)

    def encode_blocks(self, views: Views, layout: VisualLayout, looked: torch.BoolTensor, tiles) -> torch.Tensor:
        """Encode the blocks `looked` at, `(T, P)` bool, of the chosen `tiles`, `(T,)` bool: `(blocks, D)`."""
        if views.features is not None:
            raise ValueError('selection is "blocks": it takes pixel_values, image_hidden_states are of whole tiles')
        pixels, _ = views.pixels(layout, tiles)
        images, scale = layout.tile_image[tiles], self.config.scale_factor
        blocks = encode_blocks(self.vision_model, self.connector, pixels, looked[tiles], images, scale)
        return blocks.to(self.text_model.dtype)
