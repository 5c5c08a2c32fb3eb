"""The fastest precision of the vision encoder, tiles per step and threads on this machine: measured, not assumed."""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch


SECONDS = 0.8  # spent on each of the three comparisons, or one round if that takes longer
AT_ONCE = 4  # tiles timed together for "all at once": enough for what larger steps gain
NOISE = 0.1  # share by which two measurements of the same setting may differ on a busy machine
HELD_UP = 0.3  # seconds by which starting up, or another program, may hold up a single call
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # seconds differ by them, most of all in bfloat16
CPUINFO, QUOTA = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup/cpu.max")  # of Linux
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"  # logical cores of one physical core
REMEDY = "delete the file to measure again"


@dataclass(frozen=True)
class Tuning:
    """Seconds per tile of one layer of the encoder, and the settings that they suggest.

    Args:
        by_dtype: seconds by dtype, one tile at a time; the present dtype first.
        by_step: seconds by tiles per step, in the chosen dtype; the present step first. None is all tiles at once.
        by_threads: seconds by number of torch threads, in the dtype that was present, one tile at a time; the present
            number first. Empty on accelerators.
    """

    by_dtype: dict[torch.dtype, float]
    by_step: dict[int | None, float]
    by_threads: dict[int, float] = field(default_factory=dict)

    @property
    def vision_dtype(self) -> torch.dtype:
        """The fastest dtype; the present one unless another is faster by more than noise."""
        return fastest(self.by_dtype)

    @property
    def tiles_per_step(self) -> int | None:
        """The fastest number of tiles per step; the present one unless another is faster by more than noise."""
        return fastest(self.by_step)

    @property
    def threads(self) -> int | None:
        """The fastest number of threads; the present one unless another is faster by more than noise."""
        return fastest(self.by_threads) if self.by_threads else None

    def __str__(self) -> str:
        dtypes = in_milliseconds(self.by_dtype, name_of)
        steps = in_milliseconds(self.by_step, in_words)
        found = (
            f"{name_of(self.vision_dtype)}, {in_words(self.tiles_per_step)} (ms per tile and layer: {dtypes}; {steps})"
        )
        if self.threads is None:
            return found
        return f"{found}; {on_threads(self.threads)} ({in_milliseconds(self.by_threads, on_threads)})"

    def save(self, path: str | Path, model):
        """Write the seconds to a JSON file, with where they were measured (`measured_on`), in one step."""
        path = Path(path)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        seconds = {
            "vision_dtype": [[name_of(dtype), spent] for dtype, spent in self.by_dtype.items()],
            "tiles_per_step": [[step, spent] for step, spent in self.by_step.items()],
            "threads": [[number, spent] for number, spent in self.by_threads.items()],
        }
        try:
            part.write_text(json.dumps({**measured_on(model), "seconds_per_tile_and_layer": seconds}, indent=2) + "\n")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, model) -> "Tuning":
        """Read a file that `save` wrote.

        Raises ValueError, naming the field and both values, if it was measured on another processor, number of cores,
        device, version of torch or architecture than those of `model`; and if it is not such a file.
        """
        try:
            saved = json.loads(Path(path).read_text())
            if not isinstance(saved, dict):
                raise ValueError(f"must hold an object, not {type(saved).__name__}")
            for name, here in measured_on(model).items():
                if saved.get(name) != here:
                    raise ValueError(f"{name} ({saved.get(name)!r}) must be {here!r}, as here")
            seconds = saved.get("seconds_per_tile_and_layer")
            if not isinstance(seconds, dict):
                raise ValueError(f"seconds_per_tile_and_layer ({seconds!r}) must be an object")
            return cls(
                *(read_seconds(name, seconds.get(name)) for name in ("vision_dtype", "tiles_per_step", "threads"))
            )
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a tuning for this model and machine: {error}; {REMEDY}") from error


def read_seconds(name: str, pairs) -> dict[Any, float]:
    """Seconds by setting `name`, from the pairs of a saved tuning; raises ValueError for anything else."""
    if not isinstance(pairs, list) or (not pairs and name != "threads"):
        raise ValueError(f"{name} ({pairs!r}) must be a list of settings and their seconds")
    found: dict[Any, float] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{name} ({pair!r}) must be a setting and its seconds")
        setting, spent = pair
        if not isinstance(spent, float) or not 0 < spent < math.inf:
            raise ValueError(f"{name} ({setting!r}): its seconds ({spent!r}) must be a positive number")
        if name == "vision_dtype" and isinstance(setting, str):
            setting = getattr(torch, setting, setting)
        if setting is None and name != "tiles_per_step":
            raise ValueError(f"{name} (null) must be given")
        check_tuning(**{name: setting})
        found[setting] = spent
    return found


def name_of(dtype: torch.dtype) -> str:
    """Name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def in_words(step: int | None) -> str:
    """Tiles per step in words."""
    return "all tiles at once" if step is None else f"{step} tile{'s' * (step > 1)} at a time"


def on_threads(number: int) -> str:
    """A number of threads in words."""
    return f"{number} thread{'s' * (number > 1)}"


def in_milliseconds(seconds: dict[Any, float], words: Callable[[Any], str]) -> str:
    """Seconds by setting, in milliseconds, with the `words` for each setting."""
    return ", ".join(f"{words(setting)} {1000 * spent:.3g}" for setting, spent in seconds.items())


def fastest(seconds: dict[Any, float]) -> Any:
    """The first key whose seconds are the fewest, apart from noise."""
    return next(key for key, spent in seconds.items() if (1 - NOISE) * spent <= min(seconds.values()))


def tune_encoder(
    model,
    vision_dtype: torch.dtype | None = None,
    tiles_per_step: int | None = None,
    threads: int | None = None,
    saved: str | Path | None = None,
):
    """Set the dtype of encoder and connector, the tiles per step and torch's threads; if all are None, the fastest.

    Args:
        model: a [`QGSASmolVLMModel`], changed in place.
        saved: file with what is fastest: read if it exists, written after measuring if not.

    What was measured, or read, is printed. Raises ValueError as `check_tuning`, `fastest_encoder` and `Tuning.load`
    do, and if `saved` comes with another argument or is in a folder that does not exist.
    """
    check_tuning(vision_dtype, tiles_per_step, threads)
    given = any(value is not None for value in (vision_dtype, tiles_per_step, threads))
    if saved is not None and given:
        raise ValueError(f"saved ({saved}) holds all settings: give it without the others")
    if not given:
        found = fastest_encoder(model) if saved is None else read_or_measure(model, Path(saved))
        vision_dtype, tiles_per_step, threads = found.vision_dtype, found.tiles_per_step, found.threads
        model.config.tiles_per_step = tiles_per_step  # None here: all at once
        print(f"encoder tuned: {found}{'' if saved is None else f', saved in {saved}'}", flush=True)
    if vision_dtype is not None:
        model.vision_model.to(vision_dtype)
        model.connector.to(vision_dtype)
    if tiles_per_step is not None:
        model.config.tiles_per_step = tiles_per_step
    if threads is not None:
        torch.set_num_threads(threads)


def read_or_measure(model, path: Path) -> Tuning:
    """The tuning in the file `path`; if there is none, it is measured and written.

    Raises ValueError as `Tuning.load` does, and before anything is measured if `path` is in no folder.
    """
    if path.exists():
        return Tuning.load(path, model)
    if not path.parent.is_dir():
        raise ValueError(f"saved ({path}): {path.parent} is not a folder; make it first")
    found = fastest_encoder(model)
    found.save(path, model)
    return found


def check_tuning(vision_dtype=None, tiles_per_step=None, threads=None):
    """Raise ValueError unless these are a floating-point dtype and integers of at least 1; None is accepted."""
    floating = isinstance(vision_dtype, torch.dtype) and vision_dtype.is_floating_point
    if vision_dtype is not None and not floating:
        raise ValueError(f"vision_dtype ({vision_dtype!r}) must be a floating-point dtype, such as torch.bfloat16")
    for name, value in (("tiles_per_step", tiles_per_step), ("threads", threads)):
        counts = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and not counts:
            raise ValueError(f"{name} ({value!r}) must be an integer of at least 1")


def fastest_encoder(model) -> Tuning:
    """Measure with how many threads, in which dtype and with how many tiles per step the encoder is fastest.

    A copy of its first layer is timed on random tiles, so that weights and random number generators stay untouched;
    the number of threads is put back. On a CPU the numbers of threads are those of `thread_counts`. The dtypes are the
    present one, float32, bfloat16 and, on accelerators, float16; the steps are the present one, 1 and `AT_ONCE`.

    Args:
        model: a [`QGSASmolVLMModel`].

    Raises ValueError if weights of the encoder are quantized or offloaded.
    """
    vision, step, threads = model.vision_model, model.config.tiles_per_step, torch.get_num_threads()
    check_in_memory(vision)
    device = vision.device
    counts = thread_counts() if device.type == "cpu" else []
    dtypes = [vision.dtype, torch.float32, torch.bfloat16, *[torch.float16] * (device.type != "cpu")]
    layers = {dtype: deepcopy(vision.encoder.layers[0]).to(dtype).eval() for dtype in dtypes}
    shape = (AT_ONCE, model.config.patches_per_side**2, model.config.vision_config.hidden_size)
    tiles = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    for dtype in layers:
        encode(layers[dtype], tiles[:1, :16].to(dtype), 1)  # the first call of a dtype loads its kernels

    clock = partial(now, device)
    one = {dtype: partial(encode, layer, tiles[:1].to(dtype), 1) for dtype, layer in layers.items()}
    try:
        by_threads = {}
        if len(counts) > 1:
            by_threads = race({number: partial(with_threads, number, one[vision.dtype]) for number in counts}, clock)
            torch.set_num_threads(fastest(by_threads))
        by_dtype = race(one, clock)
        dtype = fastest(by_dtype)
        steps = dict.fromkeys([step, 1] if step is None or step > AT_ONCE else [step, 1, AT_ONCE])
        all_tiles = tiles.to(dtype)
        by_step = race({step: partial(encode, layers[dtype], all_tiles, step or AT_ONCE) for step in steps}, clock)
    finally:
        torch.set_num_threads(threads)
    by_threads = by_threads or dict.fromkeys(counts, by_dtype[vision.dtype])
    return Tuning(by_dtype, {step: seconds / AT_ONCE for step, seconds in by_step.items()}, by_threads)


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


def with_threads(number: int, call: Callable[[], object]):
    """Run `call` with that many threads."""
    torch.set_num_threads(number)
    call()


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


# This machine


def processor(cpuinfo: Path = CPUINFO) -> str:
    """Name of the processor and which of `INSTRUCTION_SETS` it has, such as "Intel(R) Xeon(R) Processor (avx2)".

    Args:
        cpuinfo: where Linux describes it; without a name there, it is the one that Python's `platform` knows.
    """
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    entries = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = entries.get("model name") or platform.processor() or platform.machine()
    found = set(entries.get("flags", "").split())
    sets = ", ".join(each for each in INSTRUCTION_SETS if each in found)
    return f"{name} ({sets})" if sets else name


def allowed_cores() -> list[int]:
    """Numbers of the logical cores on which this process may run."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def usable_cores(quota: Path = QUOTA) -> int:
    """Number of logical cores that this process may use: by affinity, `OMP_NUM_THREADS` and its container's quota.

    Args:
        quota: where Linux tells the microseconds per period that a container may use, or "max", and the period.
    """
    limits, named = [len(allowed_cores())], os.environ.get("OMP_NUM_THREADS", "")
    if named.isdecimal() and int(named):
        limits.append(int(named))
    used, _, period = quota.read_text().partition(" ") if quota.is_file() else ("max", "", "")
    if used != "max":
        limits.append(math.ceil(int(used) / int(period)))
    return min(limits)


def thread_counts(siblings: str = SIBLINGS) -> list[int]:
    """Numbers of threads to compare: the present one, one per physical core and one per logical core.

    Args:
        siblings: where Linux tells which logical cores share the physical core of one of them.
    """
    files, usable = [Path(siblings.format(core)) for core in allowed_cores()], usable_cores()
    physical = len({file.read_text() for file in files}) if all(file.is_file() for file in files) else usable
    return list(dict.fromkeys([torch.get_num_threads(), min(physical, usable), usable]))


def measured_on(model) -> dict[str, str | int]:
    """What decides how fast the encoder of a [`QGSASmolVLMModel`] is: a tuning is good for one of each."""
    device, vision = model.vision_model.device, model.config.vision_config
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "image_size",
        "patch_size",
    )
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": str(torch.__version__),
        **{name: getattr(vision, name) for name in sizes},
    }
