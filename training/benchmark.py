"""Seconds, FLOPs and memory of stock SmolVLM, its cheaper settings, published pruning methods and QGSA, in one run.

    python training/benchmark.py --architecture 256m --longest_edges 2048 --output_dir outputs/speed_256m

All systems run in the same process and take turns on the same images. Seconds are medians over the repeats, each with
an image of its own, after a warm-up. Weights are random without `--model`: the cost of an answer does not depend on
them. The budget is therefore set (`--tiles`, `--tokens`) instead of estimated. Writes `results.json`, `table.md` and
plots.

Pruning methods and QGSA run in the precision and encoder steps that are fastest for stock SmolVLM on this machine
(`dense-fast`), which the run determines first. On a GPU everything runs in bfloat16.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import Idefics3Processor

from modeling_qgsa import QGSAProcessor
from training.cli.arguments import check_source, errors_in_one_line, parse
from training.costs.meter import keep_freed_memory
from training.costs.speed_report import write_speed
from training.costs.systems import SYSTEMS, TUNED, build_models, check_checkpoint, present_systems
from training.costs.timing import Runner, Workload, add_overhead, measure, pick_images
from training.costs.tuning import tune_alike


SHARED = Path(__file__).resolve().parents[2] / "shared"
RENAMED = {"--checkpoint": "--model", "--files": "--base_model"}


@dataclass
class BenchmarkArguments:
    """Systems to time, and their workload."""

    architecture: str = field(
        default="256m", metadata={"help": "256m or 500m: short for the published checkpoint of that size."}
    )
    model: str | None = field(
        default=None, metadata={"help": "QGSA checkpoint: Hub id or folder; random weights without it."}
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder to take config and processor from; default: model or architecture."},
    )
    images: str = field(
        default=str(SHARED / "data" / "vqa_rad" / "images"), metadata={"help": "Folder of JPEG or PNG images."}
    )
    longest_edges: list[int] = field(
        default_factory=lambda: [2048], metadata={"help": "Image sizes: px of the longest edge; stock uses 2048."}
    )
    batch_size: int = field(default=1, metadata={"help": "Questions per batch, each with an image of its own."})
    systems: list[str] = field(default_factory=lambda: list(SYSTEMS), metadata={"help": "Systems to time."})
    repeats: int = field(default=5, metadata={"help": "Timed batches per system and image size."})
    new_tokens: int = field(default=8, metadata={"help": "Length of every answer, in tokens."})
    tiles: int = field(default=2, metadata={"help": "m: high-resolution tiles that QGSA encodes per image."})
    tokens: int = field(
        default=17, metadata={"help": "k: visual tokens that pruning methods and QGSA keep per image."}
    )
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu or cuda."})
    output_dir: str = field(default="outputs/speed", metadata={"help": "Folder for results, table and plots."})

    def __post_init__(self):
        for name in ("batch_size", "repeats", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}): must be at least 1")
        kind = self.device.partition(":")[0]  # cuda:1 is the second GPU
        if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"device ({self.device}): must be cpu, or cuda where a GPU is available")


def base_model_of(run: BenchmarkArguments) -> str:
    """Hub id or folder of config and processor: `base_model`, or `model`, or the published checkpoint of
    `architecture`, which is taken from `../shared` if present.

    Raises ValueError for a missing folder and for an unknown architecture.
    """
    given = run.base_model or run.model
    if given:
        check_source(given)
        return given
    if run.architecture not in ("256m", "500m"):
        raise ValueError(f"architecture ({run.architecture}): choose from 256m, 500m")
    local = SHARED / "checkpoints" / f"smolvlm-{run.architecture}-instruct"
    return str(local) if local.is_dir() else f"HuggingFaceTB/SmolVLM-{run.architecture.upper()}-Instruct"


def benchmark(run: BenchmarkArguments) -> str:
    """Time the systems of `run` and write everything to its `output_dir`; returns the table.

    Raises ValueError or OSError, before anything is timed, for arguments that cannot be used.
    """
    run.systems = present_systems(run.systems)
    if run.model:
        check_checkpoint(run.model)
    base_model = base_model_of(run)
    images = pick_images(run.images, run.repeats * run.batch_size)
    batches = [images[start : start + run.batch_size] for start in range(0, len(images), run.batch_size)]
    processors = {
        "ours": QGSAProcessor.from_pretrained(base_model),
        "stock": Idefics3Processor.from_pretrained(base_model),  # in the stock backend of this environment
    }
    tokenizer = processors["ours"].tokenizer
    keep_freed_memory()
    models = build_models(run.systems, base_model, run.model, tokenizer, torch.device(run.device))
    tuning = tune_alike([models[name] for name in TUNED if name in models])
    workload = Workload(run.tiles, run.tokens, run.new_tokens)
    runners = [Runner(name, workload, models, processors) for name in run.systems]
    rows = []
    for edge in run.longest_edges:
        measured = measure(runners, batches, edge)
        add_overhead(measured, runners, batches)
        rows += measured
    settings = vars(run) | {"base_model": Path(base_model).name, "images": Path(run.images).name}
    settings["model"] = run.model and Path(run.model).name
    return write_speed(Path(settings.pop("output_dir")), settings, tuning, rows)


def main():
    with errors_in_one_line():
        print(benchmark(parse(BenchmarkArguments, __doc__, RENAMED)))


if __name__ == "__main__":
    main()
