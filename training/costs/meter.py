"""Seconds of one answer by part, and the peak memory it needs, on this machine."""

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from modeling_qgsa.tiles_qgsa import LazyTiles
from training.costs.counter import vision_modules


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
PARTS = ("processing", "vision", "prefill", "decode")


def keep_freed_memory():
    """Let malloc keep memory that is freed, instead of returning it to the system and faulting it in again.

    Stock SmolVLM allocates a few hundred MB for the activations of each layer, and spends up to 4 of 28 CPU seconds on
    such page faults, depending on what was freed in the process before. This favours it, and all systems run alike.
    `malloc_trim`, before memory is measured, still returns everything.
    """
    libc = ctypes.CDLL("libc.so.6")
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
        libc.mallopt(option, value)


def now(device: torch.device) -> float:
    """Clock time in seconds, once `device` has finished all its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fixed_length(length: int) -> dict:
    """Options of `generate` for a greedy answer of exactly `length` tokens."""
    return {"do_sample": False, "max_new_tokens": length, "min_new_tokens": length}


class TimedTiles(LazyTiles):
    """Lazy tiles that add up the seconds spent cutting: processing, although it happens during vision."""

    def __init__(self, tiles):
        self.image_processor, self.tiles, self.seconds = tiles.image_processor, tiles.tiles, 0.0

    def cut(self, samples, ordinals):
        began = time.perf_counter()
        pixels = super().cut(samples, ordinals)
        self.seconds += time.perf_counter() - began
        return pixels


@contextmanager
def clocked(model):
    """Record clock times of vision and of every row of logits; works for stock and QGSA models.

    Yields `(vision, logits)`, two lists of clock times in seconds; `vision` alternates between start and end.
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


def time_answer(model, process: Callable[[], dict], generate: Callable[[dict], object]) -> tuple[dict, object]:
    """Time one answer.

    Args:
        process: returns the inputs of the model; its time is processing.
        generate: takes these inputs and generates the answer.

    Returns:
        Seconds as `{"processing", "vision", "prefill", "decode", "total"}`, and the return value of `generate`.
        Prefill is everything up to the first new token except processing and vision.
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


def peak_memory(device: torch.device, call: Callable[[], object]) -> int:
    """Peak memory of `call()` in bytes, beyond the memory in use before it; see `watch_memory`."""
    peak = watch_memory(device)
    call()
    return peak()


def watch_memory(device: torch.device) -> Callable[[], int]:
    """Start watching memory; returns a function that tells the peak since then in bytes, beyond the memory in use now.

    GPU memory on CUDA; otherwise the resident memory of this process, which requires Linux.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # return freed memory, or a call could reuse it at no visible cost
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    return lambda: _status("VmHWM") - before


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def weight_bytes(model) -> int:
    """Size of all weights in bytes; shared weights count once."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())
