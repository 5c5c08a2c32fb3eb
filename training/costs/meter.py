"""What an answer costs on this machine: seconds by part, and the most memory it held."""

import ctypes
import gc
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from modeling_qgsa.tiles_qgsa import LazyTiles
from training.costs.flops import vision_modules


PARTS = ("processing", "vision", "prefill", "decode")


def now(device: torch.device) -> float:
    """Seconds on a clock, when all that `device` was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TimedTiles(LazyTiles):
    """Lazy tiles whose cutting is timed: it is processing, though it happens while the model looks."""

    def __init__(self, tiles):
        self.image_processor, self.tiles, self.seconds = tiles.image_processor, tiles.tiles, 0.0

    def cut(self, samples, ordinals):
        began = time.perf_counter()
        pixels = super().cut(samples, ordinals)
        self.seconds += time.perf_counter() - began
        return pixels


@contextmanager
def clocked(model):
    """Notes when vision begins and ends, and when logits are there: yields `(vision, logits)`, lists of seconds.

    Vision alternates beginnings and ends. Works for stock models and ours.
    """
    device, vision, logits = model.device, [], []
    hooks = [model.lm_head.register_forward_hook(lambda *_: logits.append(now(device)))]
    for part in vision_modules(model):
        hooks.append(part.register_forward_pre_hook(lambda *_: vision.append(now(device))))
        hooks.append(part.register_forward_hook(lambda *_: vision.append(now(device))))
    try:
        yield vision, logits
    finally:
        for hook in hooks:
            hook.remove()


def time_answer(model, process, generate) -> tuple[dict[str, float], object]:
    """Seconds of one answer by part, and what `generate` returned.

    Args:
        process: makes the inputs; its time is processing.
        generate: takes the inputs and answers.

    Returns `{"processing", "vision", "prefill", "decode", "total"}`; prefill is all up to the first new token that is
    neither processing nor vision.
    """
    began = now(model.device)
    inputs = process()
    cut = inputs.get("lazy_tiles")
    if cut is not None:
        cut = inputs["lazy_tiles"] = TimedTiles(cut)
    ready = now(model.device)
    with clocked(model) as (vision, logits):
        output = generate(inputs)
    end = now(model.device)
    cutting = 0.0 if cut is None else cut.seconds
    looking = sum(vision[1::2]) - sum(vision[::2])
    seconds = {
        "processing": ready - began + cutting,
        "vision": looking,
        "prefill": logits[0] - ready - looking - cutting,
        "decode": end - logits[0],
        "total": end - began,
    }
    return seconds, output


def peak_memory(device: torch.device, call) -> int:
    """Bytes that `call()` held at most, beyond what was held before it: of the GPU, or of this process on Linux."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls freed is not to be had for nothing
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def weight_bytes(model) -> int:
    """Bytes of all weights; shared ones count once."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())
