"""From an image and the question about it to the embeddings of the positions that are kept.

Pure functions and our own model, without vLLM. Sizes as in `layout_qgsa`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from modeling_qgsa.configuration_qgsa import MAX_BUDGET, Budget
from modeling_qgsa.count_qgsa import ExactCount
from modeling_qgsa.layout_qgsa import VisualLayout
from modeling_qgsa.request_qgsa import Request


LIMITS = ("positions_per_image", "min_tiles", "max_tiles")  # what a request may set, in this order
OTHERS = ({each.name for each in fields(Budget)} | {"max_image_tokens", "vision_budget"}) - set(LIMITS)


class AskedImage(NamedTuple):
    """One image, and the prompt about it.

    Args:
        prompt_ids: `(L,)` int64, the prompt with the placeholders of this image and of no other one.
        pixel_values: `(T, 3, H, W)`, its tiles, the global view last.
        pixel_attention_mask: `(T, H, W)`.
        limits: values of `LIMITS`.
    """

    prompt_ids: torch.Tensor
    pixel_values: torch.Tensor
    pixel_attention_mask: torch.Tensor
    limits: tuple[int, ...]


def check_servable(config):
    """Raise ValueError for a configuration of which vLLM would serve something else.

    Args:
        config: [`QGSAConfig`].
    """
    if config.selection == "dense":
        raise ValueError('selection ("dense") selects nothing: export a plain model (export.py --format idefics3)')
    if config.vision_layers is not None and set(config.vision_layers) != {"full"}:
        raise ValueError(f"vision_layers ({', '.join(config.vision_layers)}): vLLM's layers see everything; set None")
    if config.vision_policy:
        raise ValueError("vision_policy (True): vLLM's layers see everything; set it to False")


def image_ids(processor, rows: int, columns: int) -> list[int]:
    """The placeholders of an image with a grid of `rows` x `columns` tiles, as ids."""
    return processor.tokenizer(processor.image_prompt(rows, columns), add_special_tokens=False)["input_ids"]


def budget_of(config, options: Mapping[str, Any], ids: Sequence[int]) -> Budget:
    """The budget of an image, with an exact count of positions.

    By default it has room for `max_visual_tokens` and for the markers of `max_tiles` tiles.

    Args:
        config: [`QGSAConfig`].
        options: of the request, among them some of `LIMITS`.
        ids: placeholders of the image in a prompt that keeps everything.

    Raises ValueError, naming the field, if it is out of range, or not one of `LIMITS`.
    """
    for name in sorted(OTHERS & options.keys()):
        raise ValueError(f"{name} ({options[name]!r}): in vLLM, a request may set {', '.join(LIMITS)}")
    budget = Budget.of(config, **{name: options[name] for name in LIMITS if name in options})
    if budget.positions_per_image is not None:
        return budget
    count = _count(config, replace(budget, positions_per_image=MAX_BUDGET), ids)
    markers = count.added.topk(min(budget.max_tiles, len(count.added))).values
    most = int(count.fixed + markers.sum()) + budget.max_visual_tokens
    return replace(budget, positions_per_image=min(most, int(count.total)))


def count_positions(config, budget: Budget, ids: Sequence[int]) -> int:
    """How many positions the image with these placeholder `ids` takes, before it is encoded.

    Raises ValueError, naming both numbers, if its markers leave no room for visual tokens.
    """
    return int(_count(config, budget, ids).total)


def _count(config, budget: Budget, ids: Sequence[int]) -> ExactCount:
    count = ExactCount.of(budget, VisualLayout.of(config, torch.tensor([list(ids)])), config.keep_tile_markers)
    assert count is not None
    return count


def prompt_about(ids: Sequence[int], image: Sequence[int], image_token_id: int) -> list[int]:
    """The prompt about one image: its placeholders in the place of the first image, and no others.

    Args:
        ids: the prompt, with one `image_token_id` for each image.
        image: placeholders of the image.
    """
    first = list(ids).index(image_token_id) if image_token_id in ids else 0
    words = [each for each in ids[first:] if each != image_token_id]
    return [*ids[:first], *image, *words]


def left_padded(rows: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
    """Rows of ids as one batch, `(B, L)`, padded on the left."""
    longest = max(map(len, rows))
    return torch.stack([pad(row, (longest - len(row), 0), value=fill) for row in rows])


def embed_images(model, images: Sequence[AskedImage], cache=None) -> list[torch.Tensor]:
    """Glance, point, look and keep: the embeddings of the positions that are kept of each image, `(n, D)`.

    Args:
        model: a [`QGSASmolVLMModel`].
        cache: a [`VisualCache`], or None.
    """
    rows: list[torch.Tensor] = [torch.empty(0)] * len(images)
    for limits in dict.fromkeys(image.limits for image in images):
        alike = [number for number, image in enumerate(images) if image.limits == limits]
        for number, found in zip(alike, _embed_alike(model, [images[number] for number in alike], cache)):
            rows[number] = found
    return rows


@torch.no_grad()
def _embed_alike(model, images: Sequence[AskedImage], cache) -> list[torch.Tensor]:
    """`embed_images` for images with the same limits, as one batch."""
    config, device = model.config, images[0].pixel_values.device
    lengths = torch.tensor([len(image.prompt_ids) for image in images])
    ids = left_padded([image.prompt_ids for image in images], config.text_config.pad_token_id or 0).to(device)
    shown = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
    most = max(len(image.pixel_values) for image in images)
    pixels, masks = (
        torch.stack([pad(each, (0, 0) * (each.dim() - 1) + (0, most - len(each))) for each in parts])
        for parts in (
            [image.pixel_values.to(model.dtype) for image in images],
            [image.pixel_attention_mask for image in images],
        )
    )
    inputs = {"input_ids": ids, "attention_mask": shown.long().to(device), "pixel_values": pixels}
    inputs |= {"pixel_attention_mask": masks, "visual_cache": cache, **dict(zip(LIMITS, images[0].limits))}
    request = Request.take(config, inputs)
    prefill = model.prefill(request)
    visual = request.layout.tile_of_position.gather(1, prefill.held.clamp(min=0)) >= 0
    visual &= prefill.held >= 0
    embeds = prefill.text_inputs["inputs_embeds"]
    return [embeds[row][where] for row, where in enumerate(visual)]
