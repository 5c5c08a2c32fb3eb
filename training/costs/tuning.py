"""The fastest precision and encoder steps on this machine."""

from functools import partial

import torch

from training.costs.meter import fixed_length, now


def tune(model, tiles: int = 6, tokens: int = 1000) -> dict:
    """Give each part of a QGSA model its fastest precision, and the encoder its fastest step, on this machine.

    Args:
        model: changed in place.
        tiles: number of tiles to time the encoder on, one by one and in one step.
        tokens: prompt length to time the text model on, with four new tokens.

    Returns:
        The choice (`vision_dtype`, `tiles_per_step`, `text_dtype`) and the seconds of everything that was tried.
    """
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, tiles, 3, side, side, device=model.device)
    ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
    dtypes = (torch.float32, torch.bfloat16) if model.device.type == "cpu" else (torch.bfloat16,)
    encoder, text = [], []
    for dtype in dtypes:
        model.to(dtype)
        for step in (1, tiles):
            model.tune(tiles_per_step=step)
            encoder.append((fastest_seconds(model, partial(model.model.get_image_features, pixels)), dtype, step))
        answer = partial(model.generate, ids, attention_mask=torch.ones_like(ids), **fixed_length(4))
        text.append((fastest_seconds(model, answer), dtype))
    (_, vision_dtype, step), (_, text_dtype) = (min(tried, key=lambda trial: trial[0]) for tried in (encoder, text))
    model.to(text_dtype).tune(vision_dtype, step)
    return {
        "vision_dtype": name_of(vision_dtype),
        "tiles_per_step": step,
        "text_dtype": name_of(text_dtype),
        f"seconds_of_{tiles}_tiles": [[name_of(dtype), step, seconds] for seconds, dtype, step in encoder],
        f"seconds_of_{tokens}_tokens": [[name_of(dtype), seconds] for seconds, dtype in text],
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def fastest_seconds(model, call) -> float:
    """Seconds of the faster of two calls, after one for warm-up."""
    times = []
    for _ in range(3):
        began = now(model.device)
        call()
        times.append(now(model.device) - began)
    return min(times[1:])
