"""The encoder over some tiles, or over some blocks of them, and a cache of its features. Sizes as in `layout_qgsa`."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import avg_pool2d, max_pool2d

from .compat_qgsa import RETURN_OUTPUT, encoded_images, tile_features
from .layout_qgsa import VisualLayout
from .request_qgsa import VisualInputs


class VisualCache:
    """Features of tiles that were encoded before: look once, ask many times.

    Passed to `generate`, `select` or `forward` as `visual_cache`, it makes the next question about the same images pay
    only for new tiles (blocks of tiles are not kept: their features depend on their neighbours). A tile is identified
    by its pixels and by the present weights and adapters of the encoder, so one cache may serve several images and
    models. With a cache, tiles are encoded one at a time: answers equal those of a model with `tiles_per_step=1`, bit
    for bit. Changes of weights that accelerate has offloaded cannot be seen: take a new cache after them.

    Args:
        max_bytes (`int`, defaults to 256 MiB): maximum size of the features held; the least recently used are dropped
            first. A SmolVLM-256M tile takes 144 KiB in float32.

    Raises ValueError if `max_bytes` is less than 1.
    """

    def __init__(self, max_bytes: int = 256 * 2**20):
        if max_bytes < 1:
            raise ValueError(f"max_bytes ({max_bytes}) must be at least 1")
        self.max_bytes = max_bytes
        self.bytes = 0
        self._features: OrderedDict = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key) -> torch.Tensor | None:
        """The features `(P, D)` stored under `key`, or None."""
        if key in self._features:
            self._features.move_to_end(key)
        return self._features.get(key)

    def put(self, key, features: torch.Tensor):
        """Store `features` `(P, D)`, dropping the least recently used ones to make room."""
        size = features.numel() * features.element_size()
        if key in self._features or size > self.max_bytes:
            return
        while self.bytes + size > self.max_bytes:
            _, oldest = self._features.popitem(last=False)
            self.bytes -= oldest.numel() * oldest.element_size()
        self._features[key] = features.detach().clone()
        self.bytes += size


# Whole tiles


def encode_in_steps(
    encode: Callable,
    pixel_values: torch.Tensor,
    pixel_attention_mask: torch.Tensor | None,
    step: int | None,
    dtype: torch.dtype,
):
    """Encode the tiles of a batch, `step` at a time.

    Args:
        encode: SmolVLM's `get_image_features`.
        pixel_values: `(B, tiles, 3, H, W)`; all-zero tiles are padding.
        pixel_attention_mask: `(B, tiles, H, W)` or None.
        step: number of tiles; all of them by default.
        dtype: dtype of the features.

    Returns the result of `encode` for all tiles together; of an output object, only `pooler_output`.
    """
    real = pixel_values.flatten(2).any(-1)
    pixels, mask = pixel_values[real], None if pixel_attention_mask is None else pixel_attention_mask[real]
    step, parts = step or len(pixels), []
    for start in range(0, len(pixels), step):
        some = slice(start, start + step)
        outputs = encode(pixels[None, some], None if mask is None else mask[None, some], **RETURN_OUTPUT)
        parts.append(tile_features(outputs))
    features = torch.cat(parts).to(dtype)
    if torch.is_tensor(outputs):
        return features
    tokens = features.flatten(0, -2)
    per_tile = len(tokens) // len(pixels)
    outputs.last_hidden_state = None
    outputs.pooler_output = list(tokens.split((real.sum(1) * per_tile).tolist()))
    return outputs


def embed_dense(model, stock: dict[str, Any]) -> dict[str, Any]:
    """The stock inputs with embeddings instead of ids and images: SmolVLM's own forward needs one dtype throughout.

    Args:
        model: a [`QGSASmolVLMModel`].
        stock: keyword arguments of SmolVLM's forward, with `pixel_values`, `mm_encoder_outputs` or neither.

    Raises ValueError if the number of placeholders in the prompt differs from the number of visual tokens.
    """
    input_ids, pixels, mask = (stock[name] for name in ("input_ids", "pixel_values", "pixel_attention_mask"))
    embeds, visual = model.get_input_embeddings()(input_ids), input_ids == model.config.image_token_id
    outputs, features = stock.get("mm_encoder_outputs"), embeds.new_zeros(0, embeds.shape[-1])
    if outputs is not None:
        features = tile_features(encoded_images(outputs)).flatten(0, -2)
    elif pixels is not None:
        features = tile_features(model.get_image_features(pixels, mask, **RETURN_OUTPUT)).flatten(0, -2)
    if int(visual.sum()) != len(features):
        raise ValueError(
            f"input_ids holds {int(visual.sum())} image placeholders, but the images make {len(features)} tokens"
        )
    embeds = embeds.masked_scatter(visual[..., None], features)
    text = {name: stock[name] for name in ("attention_mask", "position_ids")}
    replaced = dict.fromkeys(("input_ids", "pixel_values", "pixel_attention_mask"))
    return {**text, **replaced, "inputs_embeds": embeds}


def encode_tiles(model, visual: VisualInputs, layout: VisualLayout, tiles: torch.Tensor) -> torch.Tensor:
    """Features of the tiles chosen by `tiles`, `(T,)` bool, and of no others: `(n, P, D)`.

    The global views of images that have tiles are scaled down by `config.glance_downscale`.

    Args:
        model: a [`QGSASmolVLMModel`], which is called through `get_image_features`.
    """
    if visual.features is not None:
        return visual.features[tiles]
    if visual.cache is not None:
        return encode_new_tiles(model, visual, layout, tiles)
    scaled = tiles & scaled_down(model, layout)
    whole, size = tiles & ~scaled, (layout.tokens_per_tile, model.config.text_config.hidden_size)
    parts = []
    if whole.any():
        pixels, mask = visual.pixels(layout, whole)
        mask = None if mask is None else mask[None]
        features = tile_features(model.get_image_features(pixels[None], mask, **RETURN_OUTPUT))
        parts.append((whole, features.view(-1, *size).to(model.text_model.dtype)))  # under autocast it has another one
    if scaled.any():
        parts.append((scaled, encode_scaled_down(model, *visual.pixels(layout, scaled))))
    order = torch.cat([part.nonzero()[:, 0] for part, _ in parts]).argsort()
    return torch.cat([features for _, features in parts])[order]


def scaled_down(model, layout: VisualLayout) -> torch.Tensor:
    """The global views that `config.glance_downscale` scales down: those of images that have tiles, `(T,)` bool."""
    return layout.is_global & layout.has_tiles & (model.config.glance_downscale > 1)


def tile_key(model, visual: VisualInputs, layout: VisualLayout, tile: int) -> tuple:
    """Identity of a tile as the encoder sees it: that of its pixels, and by how much they are scaled down."""
    scale = model.config.glance_downscale if scaled_down(model, layout)[tile] else 1
    return *visual.key(layout, tile), scale


def encode_scaled_down(model, pixels: torch.Tensor, pixel_attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Features of global views scaled down by `config.glance_downscale`: `(n, P, D)`.

    The encoder sees fewer patches, each at the position of its first pixel; its states are then repeated, so that the
    connector finds as many patches as in a whole tile.

    Args:
        pixels: `(n, 3, S, S)`.
        pixel_attention_mask: `(n, S, S)` or None.
    """
    vision, scale = model.vision_model, model.config.glance_downscale
    patch, step = scale * model.config.vision_config.patch_size, model.config.tiles_per_step or len(pixels)
    mask = torch.ones_like(pixels[:, 0], dtype=torch.bool) if pixel_attention_mask is None else pixel_attention_mask
    seen = max_pool2d(mask.to(pixels.dtype), patch) > 0
    smaller, features = avg_pool2d(pixels, scale).to(vision.dtype), []
    for some, shown in zip(smaller.split(step), seen.split(step)):
        states = vision(pixel_values=some, patch_attention_mask=shown).last_hidden_state
        states = states.unflatten(1, seen.shape[1:]).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        features.append(model.connector(states.flatten(1, 2)))
    return torch.cat(features).to(model.text_model.dtype)


def encode_new_tiles(model, visual: VisualInputs, layout: VisualLayout, tiles: torch.Tensor) -> torch.Tensor:
    """As `encode_tiles`, one tile at a time; tiles in `visual.cache` are skipped, all others are added to it."""
    if model.training:
        raise ValueError("visual_cache is for inference, but the model is in training mode: call model.eval()")
    encoder, features = encoder_key(model), []
    for tile in tiles.nonzero()[:, 0].tolist():
        key = (encoder, tile_key(model, visual, layout, tile))
        found = visual.cache.get(key)
        if found is None:
            one = torch.arange(len(tiles), device=tiles.device) == tile
            found = encode_tiles(model, replace(visual, cache=None), layout, one)[0]
            visual.cache.put(key, found)
        features.append(found.to(layout.tile_start.device))
    return torch.stack(features)


def encoder_key(model) -> tuple:
    """Identity of the present weights and adapters of encoder and connector of a [`QGSASmolVLMModel`]."""
    weights = [*model.vision_model.parameters(), *model.connector.parameters()]
    versions = tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights)
    parts = [*model.vision_model.modules(), *model.connector.modules()]
    # Adapters are switched on and off by attributes of their modules, with all weights left in place.
    switches = tuple(
        str(value) for part in parts for value in vars(part).values() if isinstance(value, bool | str | list)
    )
    return weakref.ref(model.vision_model), hash((versions, switches))


# One encoder, two models


def shares_encoder(one, other) -> bool:
    """Whether the encoders of two [`QGSASmolVLMModel`]s, without their connectors, make the same of an image."""
    if one.config.glance_downscale != other.config.glance_downscale:
        return False
    states = [model.vision_model.state_dict() for model in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        weight.shape == states[1][name].shape and torch.equal(weight.cpu(), states[1][name].cpu())
        for name, weight in states[0].items()
    )


@contextmanager
def recorded_states(model) -> Iterator[list[torch.Tensor]]:
    """Collect what the encoder of `model` hands to its connector: one `(n, patches, width)` per call."""
    states: list[torch.Tensor] = []
    hook = model.connector.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    try:
        yield states
    finally:
        hook.remove()


@torch.no_grad()
def remember_tiles(model, visual: VisualInputs, layout: VisualLayout, seen: torch.Tensor, states: list[torch.Tensor]):
    """Put the features of the tiles that another model with the same encoder has seen into `visual.cache`.

    Args:
        seen: `(T,)` bool.
        states: of all of these tiles, see `recorded_states`, in the order in which they are encoded: whole global
            views, those scaled down, then tiles; others are left alone.
    """
    smaller = scaled_down(model, layout)
    kinds = (layout.is_global & ~smaller, smaller, seen & ~layout.is_global)
    order = torch.cat([kind.nonzero()[:, 0] for kind in kinds])
    if not states or sum(map(len, states)) != len(order):
        return
    weight = next(model.connector.parameters())
    encoder = encoder_key(model)
    for tile, state in zip(order.tolist(), (one for part in states for one in part)):
        features = model.connector(state[None].to(weight.device, weight.dtype)).to(model.text_model.dtype)
        key = (encoder, tile_key(model, visual, layout, tile))
        visual.cache.put(key, features.view(layout.tokens_per_tile, -1))


# Blocks of tiles


def blocks_of_tiles(pixels: torch.Tensor, blocks: int) -> torch.Tensor:
    """Cut tiles, `(n, 3, S, S)`, into `blocks` x `blocks` blocks: `(n, blocks ** 2, 3, S / blocks, S / blocks)`."""
    count, channels, side, _ = pixels.shape
    pixels = pixels.view(count, channels, blocks, side // blocks, blocks, side // blocks)
    return pixels.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def patch_numbers(blocks: int, scale_factor: int, device) -> torch.Tensor:
    """Number, within its tile, of every patch of every block: `(P, scale_factor ** 2)`; `blocks` per tile side."""
    side = blocks * scale_factor
    grid = torch.arange(side**2, device=device).view(blocks, scale_factor, blocks, scale_factor)
    return grid.transpose(1, 2).reshape(blocks**2, scale_factor**2)


def encode_blocks(
    vision, connector, pixels: torch.Tensor, chosen: torch.Tensor, image: torch.Tensor, scale_factor: int
) -> torch.Tensor:
    """Encode only the chosen blocks of some tiles.

    The blocks of an image form one short sequence in which patches attend to those of their own tile, each at its
    position there. If every block of a tile is chosen, the result is what the encoder makes of the whole tile.

    Args:
        vision, connector: SmolVLM's modules.
        pixels: `(n, 3, S, S)`, the tiles.
        chosen: `(n, P)` bool.
        image: `(n,)` int64, the image of each tile.

    Returns the features of the chosen blocks, in the order of the tiles, `(blocks, D)`.
    """
    embeddings, side = vision.embeddings, round(chosen.shape[1] ** 0.5)
    tile, block = chosen.nonzero(as_tuple=True)
    covered = side * scale_factor * embeddings.patch_size  # px; the rest lies beyond the last whole patch
    pixels = pixels[..., :covered, :covered]
    pixels = blocks_of_tiles(pixels, side)[tile, block].to(vision.dtype)
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


def encode_chosen_blocks(model, visual: VisualInputs, layout: VisualLayout, looked: torch.Tensor, tiles: torch.Tensor):
    """Features `(blocks, D)` of the blocks `looked` at, `(T, P)` bool, within the chosen `tiles`, `(T,)` bool."""
    if visual.features is not None:
        raise ValueError('image_hidden_states hold whole tiles: selection="blocks" needs pixel_values')
    pixels, _ = visual.pixels(layout, tiles)
    images, scale = layout.tile_image[tiles], model.config.scale_factor
    blocks = encode_blocks(model.vision_model, model.connector, pixels, looked[tiles], images, scale)
    return blocks.to(model.text_model.dtype)
