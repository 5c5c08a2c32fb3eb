"""The fastest precision of both parts of a model, steps of its encoder, and threads, on this machine."""

from collections.abc import Sequence
from functools import partial

import torch

from modeling_qgsa.tuning_qgsa import AT_ONCE, fastest_encoder, name_of
from training.costs.meter import fixed_length, now


def tune(model, tokens: int = 1000) -> dict:
    """Give each part of a QGSA model its fastest precision, the encoder its fastest step, and torch its threads.

    Args:
        model: changed in place.
        tokens: prompt length to time the text model on, with four new tokens.

    Returns:
        The choice (`vision_dtype`, `tiles_per_step`, `threads`, `text_dtype`) and the seconds of everything that was
        tried.
    """
    ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
    text = {}
    for dtype in (torch.float32, torch.bfloat16) if model.device.type == "cpu" else (torch.bfloat16,):
        model.to(dtype)
        answer = partial(model.generate, ids, attention_mask=torch.ones_like(ids), **fixed_length(4))
        text[dtype] = fastest_seconds(model, answer)
    text_dtype = min(text, key=text.get)
    model.to(text_dtype)
    encoder = fastest_encoder(model.model)
    step = encoder.tiles_per_step
    if step is None and model.device.type == "cpu":
        step = AT_ONCE  # all 17 tiles of a dense model at once are slower there
    model.tune(encoder.vision_dtype, step, encoder.threads)
    return {
        "vision_dtype": name_of(encoder.vision_dtype),
        "tiles_per_step": step,
        "threads": encoder.threads,
        "text_dtype": name_of(text_dtype),
        "seconds_per_tile_and_layer": {
            "by_dtype": [[name_of(dtype), seconds] for dtype, seconds in encoder.by_dtype.items()],
            "by_step": [[step, seconds] for step, seconds in encoder.by_step.items()],
            "by_threads": [[number, seconds] for number, seconds in encoder.by_threads.items()],
        },
        f"seconds_of_{tokens}_tokens": [[name_of(dtype), seconds] for dtype, seconds in text.items()],
    }


def tune_alike(models: Sequence) -> dict | None:
    """Tune the first of some models with the same sizes, see `tune`, and give the others what was found for it."""
    if not models:
        return None
    first, *others = models
    found = tune(first)
    for model in others:
        model.to(first.lm_head.weight.dtype)
        model.tune(first.model.vision_model.dtype, found["tiles_per_step"], found["threads"])
    return found


@torch.no_grad()
def fastest_seconds(model, call) -> float:
    """Seconds of the faster of two calls, after one for warm-up."""
    times = []
    for _ in range(3):
        began = now(model.device)
        call()
        times.append(now(model.device) - began)
    return min(times[1:])
