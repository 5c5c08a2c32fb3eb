"""Where does a guide pay? Seconds, FLOPs and memory of pairs, the guide included, against the target alone.

    python training/studies/guided_speed.py --target 500m --output_dir outputs/guided_speed

Random weights of the published architectures, their processors, real images, one run in which all systems take turns.
256M guides 500M, with which it shares its encoder, or 2.2B, whose tiles differ. An early exit saves what a row asks of
the target: rows called "alone" are those of a guide that answered, all others asked both models. Writes
`speed_sgl_<target>_cpu.json` and prints the table.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

from modeling_qgsa import GuidedVLM, QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.cli.arguments import errors_in_one_line, parse
from training.costs.counter import count_flops
from training.costs.meter import fixed_length, keep_freed_memory, now, peak_memory, weight_bytes
from training.costs.timing import QUESTION, pick_images
from training.evaluation.report import write_results
from training.evaluation.systems import whole_tiles


SHARED = Path(__file__).resolve().parents[3] / "shared"
TARGETS = ("500m", "2b")
# What SmolVLM-2.2B has in place of the sizes of 500M: no file of it is at hand.
TEXT_2B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 64,
}
VISION_2B = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


@dataclass
class GuidedSpeedArguments:
    """The target, and the work."""

    target: str = field(default="500m", metadata={"help": "500m or 2b."})
    checkpoints: str = field(
        default=str(SHARED / "checkpoints"), metadata={"help": "Folder with the published configs and processors."}
    )
    images: str = field(
        default=str(SHARED / "data" / "vqa_rad" / "images"), metadata={"help": "Folder of JPEG or PNG images."}
    )
    repeats: int = field(default=3, metadata={"help": "Timed images."})
    new_tokens: int = field(default=8, metadata={"help": "Length of every answer, in tokens."})
    tiles: int = field(default=2, metadata={"help": "m: high-resolution tiles that are chosen per image."})
    retention: float = field(default=0.09, metadata={"help": "Share of tokens kept before the text model."})
    output_dir: str = field(default="outputs/guided_speed", metadata={"help": "Folder for results."})

    def __post_init__(self):
        if self.target not in TARGETS:
            raise ValueError(f"target ({self.target!r}): choose from {', '.join(TARGETS)}")
        if self.repeats < 1:
            raise ValueError(f"repeats ({self.repeats}) must be at least 1")


def build(checkpoints: str, size: str) -> tuple[QGSASmolVLMForConditionalGeneration, QGSAProcessor]:
    """A model of random weights in float32, and its processor."""
    source = f"{checkpoints}/smolvlm-{'500m' if size == '2b' else size}-instruct"
    config, processor = AutoConfig.from_pretrained(source), QGSAProcessor.from_pretrained(source)
    if size == "2b":
        for part, changes in ((config.text_config, TEXT_2B), (config.vision_config, VISION_2B)):
            for name, value in changes.items():
                setattr(part, name, value)
        config.scale_factor = 3
        images = processor.image_processor
        images.size, images.max_image_size = {"longest_edge": 1536}, {"longest_edge": 384}
        parts = {"image_seq_len": 81, "chat_template": processor.chat_template}
        processor = QGSAProcessor(images, processor.tokenizer, **parts)
    torch.manual_seed(0)
    dense = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model = QGSASmolVLMForConditionalGeneration.from_dense(dense, processor.tokenizer).eval()
    model.generation_config.eos_token_id = None  # all answers must have the same length
    return model, processor


def make_systems(run: GuidedSpeedArguments) -> tuple[dict[str, tuple], GuidedVLM]:
    """Models, or pairs of them, and options of `generate`, by name; and a pair whose processors prepare the inputs."""
    (guide, small), (target, large) = (build(run.checkpoints, size) for size in ("256m", run.target))
    if run.target == "500m":  # as the published ones
        target.model.vision_model.load_state_dict(guide.model.vision_model.state_dict())
    pair, dense = partial(GuidedVLM, guide, target, (small, large)), {"selection": "dense"}
    alone, asked = {"exit_threshold": -1.0}, {"exit_threshold": 2.0}
    chosen = {"max_tiles": run.tiles}
    pruned = {"prune_layer": 0, "retention": run.retention}
    apart = pair(**chosen)
    apart.shares_encoder = False
    systems = {
        "target, dense": (target, dense),
        "target, qgsa-attention": (target, {"pointer": "attention"} | whole_tiles(target.config, run.tiles)),
        "guide, dense": (guide, dense),
        "guide, qgsa-attention": (guide, {"pointer": "attention"} | whole_tiles(guide.config, run.tiles)),
        "sgl": (pair(**pruned), {}),
        "sgl-before-encoder": (pair(**chosen), {}),
        "sgl-before-encoder, exit asked": (pair(**chosen, **asked), {}),
        "sgl-before-encoder, guide alone": (pair(**chosen, **alone), {}),
        "sgl-before-encoder, glance": (pair(**chosen, view="glance"), {}),
        "sgl-before-encoder, glance, exit asked": (pair(**chosen, **asked, view="glance"), {}),
        "sgl-before-encoder, glance, guide alone": (pair(**chosen, **alone, view="glance"), {}),
        "sgl-before-encoder, pointer": (pair(**chosen, view="glance", scores="pointer"), {}),
    }
    if run.target == "500m":
        systems["sgl-before-encoder, each its own encoder"] = (apart, {})
    return systems, apart


def make_inputs(pair: GuidedVLM, model, image) -> dict:
    """Inputs of `generate` for a question about an image: of one model, or of the whole pair."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = pair.processors[1].apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = pair.prepare(text=[text], images=[[image]])
    own = inputs.pop("guide_inputs")
    if model is pair.guide:
        return own
    return inputs if model is pair.target else inputs | {"guide_inputs": own}


def weigh(model, inputs: dict, new_tokens: int, options: dict) -> tuple[dict[str, int], int]:
    """FLOPs and peak memory in bytes of one answer."""
    counted = []

    def answer():
        counted.append(count_flops(model, inputs, new_tokens, min_new_tokens=new_tokens, **options))

    memory = peak_memory(torch.device("cpu"), answer)
    return counted[0], memory


def measure(systems: dict[str, tuple], pair: GuidedVLM, images: list, new_tokens: int) -> list[dict]:
    """Rows of results: FLOPs and peak memory of the first image, then seconds, all systems taking turns.

    Args:
        systems, pair: as `make_systems` returns them.
    """
    rows: dict[str, dict] = {}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    with tqdm(total=(len(images) + 1) * len(systems), desc="timing") as progress:
        for name, (model, options) in systems.items():
            flops, memory = weigh(model, make_inputs(pair, model, images[0]), new_tokens, options)
            models = (model.guide, model.target) if isinstance(model, GuidedVLM) else (model,)
            weights = sum(map(weight_bytes, models))
            rows[name] = {"system": name, "flops": flops, "memory_bytes": memory, "weight_bytes": weights}
            progress.update()
        for image in images:
            for name, (model, options) in systems.items():
                given = make_inputs(pair, model, image) | options | fixed_length(new_tokens)
                began = now(torch.device("cpu"))
                model.generate(**given)
                seconds[name].append(now(torch.device("cpu")) - began)
                progress.update()
    for name, row in rows.items():
        row |= {"seconds_median": median(seconds[name]), "seconds_range": [min(seconds[name]), max(seconds[name])]}
        row["speedup_vs_dense"] = rows["target, dense"]["seconds_median"] / row["seconds_median"]
    return list(rows.values())


def format_speed(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| system | seconds [range] | times faster | TFLOPs | peak memory, GB | weights, GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["seconds_range"]
        memory, weights = row["memory_bytes"] / 1e9, row["weight_bytes"] / 1e9
        lines.append(
            f"| {row['system']} | {row['seconds_median']:.2f} [{low:.2f}, {high:.2f}] | {row['speedup_vs_dense']:.1f} "
            f"| {row['flops']['total'] / 1e12:.2f} | {memory:.2f} | {weights:.2f} |"
        )
    return "\n".join(lines)


def main():
    run = parse(GuidedSpeedArguments, __doc__)
    with errors_in_one_line():
        images = pick_images(run.images, run.repeats)
        keep_freed_memory()
        rows = measure(*make_systems(run), images, run.new_tokens)
    output = Path(run.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    name = f"speed_sgl_{run.target}_cpu"
    write_results(output / f"{name}.json", name, "vqa_rad images", run.repeats, 0, rows, "none")
    print(format_speed(rows))


if __name__ == "__main__":
    main()
