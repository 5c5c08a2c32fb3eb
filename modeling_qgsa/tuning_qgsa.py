"""The fastest precision of the vision encoder, and tiles per step, on this machine: measured, not assumed."""

import math
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


SECONDS = 0.8  # spent on each of the two comparisons, or one round if that takes longer
AT_ONCE = 4  # tiles timed together for "all at once": enough for what larger steps gain
NOISE = 0.1  # share by which two measurements of the same setting may differ on a busy machine
HELD_UP = 0.3  # seconds by which starting up, or another program, may hold up a single call


@dataclass(frozen=True)
class Tuning:
    """Seconds per tile of one layer of the encoder, and the settings that they suggest.

    Args:
        by_dtype: seconds by dtype, one tile at a time; the present dtype first.
        by_step: seconds by tiles per step, in the chosen dtype; the present step first. None is all tiles at once.
    """

    by_dtype: dict[torch.dtype, float]
    by_step: dict[int | None, float]

    @property
    def vision_dtype(self) -> torch.dtype:
        """The fastest dtype; the present one unless another is faster by more than noise."""
        return fastest(self.by_dtype)

    @property
    def tiles_per_step(self) -> int | None:
        """The fastest number of tiles per step; the present one unless another is faster by more than noise."""
        return fastest(self.by_step)

    def __str__(self) -> str:
        dtypes = [f"{name_of(dtype)} {1000 * seconds:.3g}" for dtype, seconds in self.by_dtype.items()]
        steps = [f"{in_words(step)} {1000 * seconds:.3g}" for step, seconds in self.by_step.items()]
        found = f"{name_of(self.vision_dtype)}, {in_words(self.tiles_per_step)}"
        return f"{found} (ms per tile and layer: {', '.join(dtypes)}; {', '.join(steps)})"


def name_of(dtype: torch.dtype) -> str:
    """Name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def in_words(step: int | None) -> str:
    """Tiles per step in words."""
    return "all tiles at once" if step is None else f"{step} tile{'s' * (step > 1)} at a time"


def fastest(seconds: dict[Any, float]) -> Any:
    """The first key whose seconds are the fewest, apart from noise."""
    return next(key for key, spent in seconds.items() if (1 - NOISE) * spent <= min(seconds.values()))


def tune_encoder(model, vision_dtype: torch.dtype | None, tiles_per_step: int | None):
    """Set the dtype of encoder and connector, and the tiles per step; if both are None, those that are fastest here.

    Args:
        model: a [`QGSASmolVLMModel`], changed in place.

    What was measured is printed. Raises ValueError as `check_tuning` and `fastest_encoder` do.
    """
    check_tuning(vision_dtype, tiles_per_step)
    if vision_dtype is None and tiles_per_step is None:
        found = fastest_encoder(model)
        print(f"encoder tuned: {found}", flush=True)
        vision_dtype, tiles_per_step = found.vision_dtype, found.tiles_per_step
    if vision_dtype is not None:
        model.vision_model.to(vision_dtype)
        model.connector.to(vision_dtype)
    if tiles_per_step is not None:
        model.config.tiles_per_step = tiles_per_step


def check_tuning(vision_dtype: torch.dtype | None, tiles_per_step: int | None):
    """Raise ValueError unless these are a floating-point dtype and an integer of at least 1; None is accepted."""
    floating = isinstance(vision_dtype, torch.dtype) and vision_dtype.is_floating_point
    if vision_dtype is not None and not floating:
        raise ValueError(f"vision_dtype ({vision_dtype!r}) must be a floating-point dtype, such as torch.bfloat16")
    counts = isinstance(tiles_per_step, int) and not isinstance(tiles_per_step, bool) and tiles_per_step >= 1
    if tiles_per_step is not None and not counts:
        raise ValueError(f"tiles_per_step ({tiles_per_step!r}) must be an integer of at least 1")


def fastest_encoder(model) -> Tuning:
    """Measure in which dtype, and with how many tiles per step, the encoder is fastest on its device.

    A copy of its first layer is timed on random tiles, so that weights and random number generators stay untouched.
    The dtypes are the present one, float32, bfloat16 and, on accelerators, float16; the steps are the present one, 1
    and `AT_ONCE`.

    Args:
        model: a [`QGSASmolVLMModel`].

    Raises ValueError if weights of the encoder are quantized or offloaded.
    """
    vision, step = model.vision_model, model.config.tiles_per_step
    check_in_memory(vision)
    device = vision.device
    dtypes = [vision.dtype, torch.float32, torch.bfloat16, *[torch.float16] * (device.type != "cpu")]
    layers = {dtype: deepcopy(vision.encoder.layers[0]).to(dtype).eval() for dtype in dtypes}
    shape = (AT_ONCE, model.config.patches_per_side**2, model.config.vision_config.hidden_size)
    tiles = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    for dtype in layers:
        encode(layers[dtype], tiles[:1, :16].to(dtype), 1)  # the first call of a dtype loads its kernels

    clock = partial(now, device)
    one = {dtype: partial(encode, layer, tiles[:1].to(dtype), 1) for dtype, layer in layers.items()}
    by_dtype = race(one, clock)
    dtype = fastest(by_dtype)
    steps = dict.fromkeys([step, 1] if step is None or step > AT_ONCE else [step, 1, AT_ONCE])
    all_tiles = tiles.to(dtype)
    by_step = race({step: partial(encode, layers[dtype], all_tiles, step or AT_ONCE) for step in steps}, clock)
    return Tuning(by_dtype, {step: seconds / AT_ONCE for step, seconds in by_step.items()})


def check_in_memory(vision):
    """Raise ValueError, naming the weight, if a weight of the encoder `vision` is quantized or offloaded."""
    for name, weight in vision.named_parameters():
        if weight.is_meta or not weight.is_floating_point():
            state = "offloaded" if weight.is_meta else f"quantized ({name_of(weight.dtype)})"
            raise ValueError(
                f"vision_model.{name} is {state}: tune() without arguments needs the encoder in memory and not "
                "quantized. Set the options instead, as in tune(tiles_per_step=1)"
            )


@torch.no_grad()
def encode(layer, tiles: torch.Tensor, step: int):
    """Run `layer` over `tiles`, `(n, patches, width)`, `step` at a time."""
    for some in tiles.split(step):
        layer(some, attention_mask=None)  # as for whole tiles, in which every patch sees all others


def now(device: torch.device) -> float:
    """Clock time in seconds, once `device` has finished all its queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def race(calls: Mapping[Any, Callable[[], object]], clock: Callable[[], float]) -> dict[Any, float]:
    """Fewest seconds that each call took, within about `SECONDS` for all.

    The calls take turns, so that a slow spell of the machine affects all alike. One that takes more than twice as long
    as the fastest drops out.
    """
    seconds, running, began = dict.fromkeys(calls, math.inf), list(calls), clock()
    while True:
        for name in running:
            start = clock()
            calls[name]()
            seconds[name] = min(seconds[name], clock() - start)
        hopeless = max(2 * min(seconds.values()), HELD_UP)
        running = [name for name in running if seconds[name] <= hopeless]
        if len(running) == 1 or clock() - began >= SECONDS:
            return seconds
