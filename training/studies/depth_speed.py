"""Where does it pay that few layers see vision? Seconds, memory and bytes of keys and values of the text model.

    python training/studies/depth_speed.py --size 256m --output_dir outputs/depth_speed

Random weights of a published architecture, in one run in which all schedules take turns; features of the encoder are
given, random too, so that the text model alone is timed. With all layers full it does what stock SmolVLM does, bit for
bit. Last, ten questions about one real image with a `VisualCache`, the encoder included. Writes
`speed_visor_<size>_<dtype>_cpu.json` and prints the tables.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
from tqdm.auto import tqdm

from modeling_qgsa import VisualCache
from modeling_qgsa.schedule_qgsa import parse_schedule, vision_share
from training.cli.arguments import errors_in_one_line, parse
from training.costs.formula import cache_bytes
from training.costs.meter import fixed_length, keep_freed_memory, now, peak_memory
from training.costs.timing import QUESTION, pick_images
from training.evaluation.depth import EVERYTHING
from training.evaluation.report import write_results
from training.methods.schedules import evenly
from training.studies.guided_speed import SHARED, build


QUESTIONS = 10  # about one image
LENGTHS = (1, 8, 64)  # new tokens
CPU = torch.device("cpu")


@dataclass
class DepthSpeedArguments:
    """The model, and the work."""

    size: str = field(default="256m", metadata={"help": "256m or 500m."})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16."})
    checkpoints: str = field(
        default=str(SHARED / "checkpoints"), metadata={"help": "Folder with the published configs and processors."}
    )
    images: str = field(
        default=str(SHARED / "data" / "vqa_rad" / "images"), metadata={"help": "Folder of JPEG or PNG images."}
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Questions at once."})
    repeats: int = field(default=3, metadata={"help": "Timed runs; the median counts."})
    output_dir: str = field(default="outputs/depth_speed", metadata={"help": "Folder for results."})

    def __post_init__(self):
        if self.size not in ("256m", "500m"):
            raise ValueError(f"size ({self.size!r}): choose from 256m, 500m")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype ({self.dtype!r}): choose from float32, bfloat16")
        if self.repeats < 1:
            raise ValueError(f"repeats ({self.repeats}) must be at least 1")


def schedules_of(layers: int) -> dict[str, str]:
    """The schedules to time, in letters, by name: where the full layers are does not matter for time."""
    some, spread = layers // 15, evenly(layers // 3, layers).replace("C", "T").replace("F", "C")
    return {
        "all full": "F" * layers,
        "half full": evenly(layers // 2, layers),
        f"{some} full, others cross": evenly(some, layers),
        "1 full, a third cross, others text only": "F" + spread[1:],
        "all text only": "T" * layers,
    }


def make_inputs(model, processor, image, samples: int) -> dict:
    """Inputs of `generate` for a question about an image, with the features of its tiles, random, in their place."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = dict(processor(text=[text] * samples, images=[[image]] * samples, return_tensors="pt"))
    pixels = inputs.pop("pixel_values")
    inputs.pop("pixel_attention_mask")
    tiles, config = pixels.shape[0] * pixels.shape[1], model.config
    width = config.text_config.hidden_size
    features = torch.randn(tiles, config.tokens_per_tile, width, generator=torch.Generator().manual_seed(0))
    return inputs | {"image_hidden_states": features.to(model.dtype)}


def seconds_of(model, given: dict) -> dict[str, float]:
    """Seconds up to the first new token, up to each number of new tokens, and per token after the first."""
    marks = []
    hook = model.lm_head.register_forward_hook(lambda *_: marks.append(now(CPU)))
    try:
        began = now(CPU)
        model.generate(**given, **fixed_length(max(LENGTHS)))
    finally:
        hook.remove()
    found = {f"seconds_{length}": marks[length - 1] - began for length in LENGTHS}
    return found | {"prefill": marks[0] - began, "per_token": (marks[-1] - marks[0]) / (len(marks) - 1)}


def measure(model, processor, image, run: DepthSpeedArguments) -> list[dict]:
    """Rows of the text model alone, for many and for few visual tokens."""
    config, rows = model.config, []
    layers = config.text_config.num_hidden_layers
    few = {**EVERYTHING, "min_visual_tokens": 17, "max_visual_tokens": 17}
    cases = [(tokens, size) for size in run.batch_sizes for tokens in ("all", "17")]
    names = schedules_of(layers)
    with tqdm(total=len(cases) * len(names) * (run.repeats + 1), desc="timing") as progress:
        for tokens, size in cases:
            inputs = make_inputs(model, processor, image, size)
            visual = int((inputs["input_ids"][0] == config.image_token_id).sum())
            if tokens == "17":  # chosen beforehand: pointing is not timed
                inputs["visual_token_scores"] = torch.rand(size, visual, generator=torch.Generator().manual_seed(1))
            found: dict[str, list] = {name: [] for name in names}
            memory = {}
            for turn in range(run.repeats + 1):  # the first one warms up, and gives the memory
                for name, letters in names.items():
                    budget = EVERYTHING if tokens == "all" else few
                    given = {**inputs, **budget, "vision_budget": letters}
                    if turn:
                        found[name].append(seconds_of(model, given))
                    else:
                        memory[name] = peak_memory(CPU, partial(model.generate, **given, **fixed_length(2)))
                    progress.update()
            kept = visual if tokens == "all" else 17
            selection = model.select(**inputs, **budget)
            words = int((selection.keep_indices[0] >= 0).sum()) - kept
            for name, letters in names.items():
                kinds = parse_schedule("", letters, layers)
                row = {"system": name, "batch_size": size, "visual_tokens_mean": kept, "words": words}
                row |= {"schedule": letters, "vision_share": vision_share(kinds, config)}
                row |= {part: median(each[part] for each in found[name]) for part in found[name][0]}
                row["kv_cache_bytes"] = size * cache_bytes(config, kinds, kept, words, model.lm_head.weight.itemsize)
                rows.append(row | {"memory_bytes": memory[name]})
    return rows


def ask_again(model, processor, image) -> list[dict]:
    """Seconds of ten questions about one image, whose tiles are encoded once, by schedule."""
    names, rows = schedules_of(model.config.text_config.num_hidden_layers), []
    for name in list(names)[::2]:
        cache, spent = VisualCache(), []
        for number in range(QUESTIONS):
            content = [{"type": "image"}, {"type": "text", "text": f"{QUESTION} Look at part {number}."}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = dict(processor(text=[text], images=[[image]], return_tensors="pt"))
            given = {**inputs, **EVERYTHING, "visual_cache": cache, "vision_budget": names[name]}
            began = now(CPU)
            model.generate(**given, **fixed_length(8))
            spent.append(now(CPU) - began)
        rows.append({"system": f"{name}, {QUESTIONS} questions", "first": spent[0], "later": median(spent[1:])})
    return rows


def format_depth_speed(rows: list[dict]) -> str:
    """The rows of the text model alone as a Markdown table."""
    lines = [
        "| layers | batch | visual tokens | prefill, s | times faster | per token, s | 64 tokens, s | KV, MB "
        "| peak memory, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "prefill" not in row:
            continue
        alike = ("batch_size", "visual_tokens_mean")
        full = next(each for each in rows if all(each[name] == row[name] for name in alike))
        lines.append(
            f"| {row['system']} | {row['batch_size']} | {row['visual_tokens_mean']} | {row['prefill']:.2f} "
            f"| {full['prefill'] / row['prefill']:.1f} | {row['per_token']:.3f} | {row['seconds_64']:.2f} "
            f"| {row['kv_cache_bytes'] / 1e6:.1f} | {row['memory_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def format_questions(rows: list[dict]) -> str:
    """The rows of ten questions about one image as a Markdown table."""
    lines = ["| layers | first question, s | each later one, s |", "|---|---|---|"]
    for row in rows:
        if "later" in row:
            lines.append(f"| {row['system'].rpartition(',')[0]} | {row['first']:.2f} | {row['later']:.2f} |")
    return "\n".join(lines)


def main():
    run = parse(DepthSpeedArguments, __doc__)
    with errors_in_one_line():
        image = pick_images(run.images, 1)[0].resize((1024, 1024))  # 4 x 4 tiles and the thumbnail
        model, processor = build(run.checkpoints, run.size)
        model.to(torch.bfloat16 if run.dtype == "bfloat16" else torch.float32)
    keep_freed_memory()
    rows = measure(model, processor, image, run) + ask_again(model, processor, image)
    output = Path(run.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    name = f"speed_visor_{run.size}_{run.dtype}_cpu"
    write_results(output / f"{name}.json", name, "vqa_rad images", run.repeats, 0, rows, "none")
    print(format_depth_speed(rows), format_questions(rows), sep="\n\n")


if __name__ == "__main__":
    main()
