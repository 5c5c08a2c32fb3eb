"""Timing of many systems on the same images: one runner per system, one row of results per system and image size."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from tqdm.auto import tqdm

from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from modeling_qgsa.configuration_qgsa import MAX_BUDGET
from modeling_qgsa.layout_qgsa import VisualLayout, covered_by
from modeling_qgsa.schedule_qgsa import parse_schedule
from modeling_qgsa.selection_qgsa import QGSASelection, positions_to_keep
from modeling_qgsa.vision_qgsa import encode_blocks
from training.costs.counter import count_flops
from training.costs.formula import cache_bytes, estimate_flops, schedule_flops
from training.costs.meter import PARTS, fixed_length, now, peak_memory, time_answer, weight_bytes
from training.costs.systems import SYSTEMS
from training.methods import METHODS


QUESTION = "Is there evidence of an abnormality in this image?"


@dataclass(frozen=True)
class Workload:
    """The work that every system has to do.

    Args:
        tiles: m, the number of high-resolution tiles that QGSA encodes per image.
        tokens: k, the number of visual tokens that every selecting system keeps per image.
        new_tokens: length of every answer.
    """

    tiles: int = 2
    tokens: int = 17
    new_tokens: int = 8


def pick_images(folder: str, count: int) -> list[Image.Image]:
    """`count` RGB images, evenly spaced among the JPEG and PNG files of `folder` in the order of their names.

    Raises ValueError if the folder does not exist or holds fewer images.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"images ({folder}): not a folder; give one with images of your own")
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(paths) < count:
        raise ValueError(
            f"images ({folder}): must hold at least {count} JPEG or PNG files, one per repeat and batch element, but "
            f"has {len(paths)}; lower repeats or batch_size"
        )
    return [Image.open(paths[index * len(paths) // count]).convert("RGB") for index in range(count)]


class Runner:
    """One system, asked about one batch of images at a time, as a user would ask.

    Args:
        name: key of `SYSTEMS`.
        workload: budgets and length of the answer.
        models: output of `build_models`.
        processors: "stock" for dense systems, "ours" for the others.
    """

    def __init__(self, name: str, workload: Workload, models: dict, processors: dict):
        self.name, self.workload, self.system = name, workload, SYSTEMS[name]
        self.model = models[self.system.model]
        self.processor = processors["stock" if self.system.selection == "dense" else "ours"]

    def process(self, images: list[Image.Image], edge: int, question: str = QUESTION) -> dict:
        """The inputs of `generate` for a question about each image, its longest edge scaled to `edge` px."""
        return self.prepare(images, question, **self.cutting(images, edge))

    def cutting(self, images: list[Image.Image], edge: int) -> dict:
        """Options of the processor that scale and cut images, their longest edge to `edge` px."""
        if self.system.edge == "half":
            edge //= 2
        if self.system.edge == "native":
            edge = min(edge, max(max(image.size) for image in images))
        return {"size": {"longest_edge": edge}, "do_image_splitting": self.system.split}

    def prepare(self, images: list, question: str, **cutting) -> dict:
        """The inputs of `generate` for a question about each image, or about each opened one."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        options = {"lazy_tiles": True} if self.system.lazy else {}
        inputs = self.processor(
            text=[text] * len(images),
            images=[[image] for image in images],
            padding=True,
            return_tensors="pt",
            **cutting,
            **options,
        )
        return dict(inputs.to(self.model.device))

    def options(self) -> dict:
        """Options of `generate` that set the selection and its budget."""
        if self.system.selection != "dense":
            tokens = MAX_BUDGET if self.system.keeps_all else self.workload.tokens
            return {
                "selection": self.system.selection,
                "pointer": self.system.pointer,
                "min_tiles": self.workload.tiles,
                "max_tiles": self.workload.tiles,
                "min_visual_tokens": tokens,
                "max_visual_tokens": tokens,
                "vision_budget": self.system.schedule(self.model.config.text_config.num_hidden_layers),
            }
        ours = isinstance(self.model, QGSASmolVLMForConditionalGeneration)
        return {"selection": "dense"} if ours else {}

    def choose(self, inputs: dict) -> dict:
        """Options of `generate` that a selection method makes from the inputs; empty for other systems."""
        if self.system.method is None:
            return {}
        layout = VisualLayout.of(self.model.config, inputs["input_ids"])
        generator = torch.Generator().manual_seed(0)
        return METHODS[self.system.method].options(self.model, inputs, layout, self.workload.tokens, generator)

    def generate(self, inputs: dict):
        """Answer. Returns the output of `generate`."""
        options = self.options() | self.choose(inputs) | fixed_length(self.workload.new_tokens)
        return self.model.generate(**inputs, **options, return_dict_in_generate=True)

    def time(self, images: list[Image.Image], edge: int) -> tuple[dict, dict]:
        """Seconds by part of one batch, see `time_answer`, and its description, see `describe`."""
        inputs = {}

        def process():
            inputs.update(self.process(images, edge))
            return dict(inputs)

        seconds, output = time_answer(self.model, process, self.generate)
        description = self.describe(inputs, output.get("selection"))
        if self.system.method is not None:
            description["flops"] = self.count(inputs)
        return seconds, description

    def warm_up(self, images: list[Image.Image], edge: int) -> int:
        """Answer once small and once at full size; returns the peak memory of the latter in bytes."""
        self.generate(self.process(images, edge // 4))
        return peak_memory(self.model.device, lambda: self.generate(self.process(images, edge)))

    @property
    def weight_bytes(self) -> int:
        """Size of the weights in bytes."""
        return weight_bytes(self.model)

    def count(self, inputs: dict) -> dict[str, float]:
        """Counted FLOPs per question: the formula does not know how much a selection method spends on choosing."""
        unused = (self.model.model.selector, self.model.model.complexity_estimator)
        make = partial(self.choose, inputs)
        counted = count_flops(self.model, inputs, self.workload.new_tokens, make, unused, **self.options())
        return {part: flops / len(inputs["input_ids"]) for part, flops in counted.items()}

    def describe(self, inputs: dict, selection: QGSASelection | None) -> dict:
        """Visual tokens, tiles, FLOPs by formula, KV-cache in bytes and prompt tokens: means per question."""
        config, samples = self.model.config, len(inputs["input_ids"])
        per_tile = (config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor) ** 2
        if selection is None:
            tokens = int((inputs["input_ids"] == config.image_token_id).sum()) / samples
            length = float(inputs["attention_mask"].sum()) / samples
            tiles = tokens / per_tile
            looked = tiles - 1
            flops = [estimate_flops(config, round(tiles), round(length), self.workload.new_tokens)] * samples
        else:
            tokens, looked = (float(n.float().mean()) for n in (selection.visual_tokens, selection.tiles))
            length = float((selection.keep_indices >= 0).sum()) / samples
            flops = self.selected_flops(inputs, selection, per_tile)
        kinds = parse_schedule(
            "", self.system.schedule(config.text_config.num_hidden_layers), config.text_config.num_hidden_layers
        )
        words = length - tokens + self.workload.new_tokens - 1
        return {
            "visual_tokens_mean": tokens,
            "tiles_mean": looked,
            "flops": {part: sum(cost[part] for cost in flops) / samples for part in flops[0]},
            "kv_cache_bytes": cache_bytes(config, kinds, tokens, words, self.model.lm_head.weight.itemsize),
            "prompt_tokens": length,
        }

    def selected_flops(self, inputs: dict, selection: QGSASelection, per_tile: int) -> list[dict[str, int]]:
        """FLOPs of each question by formula, for the tiles and tokens in `selection`."""
        lengths, asked = (selection.keep_indices >= 0).sum(1).tolist(), inputs["question_mask"].bool()
        if self.system.pointer == "attention":  # which does not read what opens a turn
            asked = asked & ~covered_by(inputs["input_ids"], self.model.config.user_token_ids)
        questions, glances, flops = asked.sum(1).tolist(), self.glances(inputs), []
        for tiles, length, question, glance in zip(selection.tiles.tolist(), lengths, questions, glances):
            blocks = ()
            if self.system.keeps_all:  # nothing points
                question = None
            if self.system.selection == "blocks" and tiles:  # their distribution over the tiles does not matter
                blocks = (min(self.workload.tokens, tiles * per_tile) - tiles + 1, *[1] * (tiles - 1))
            whole = 1 + tiles - len(blocks)
            sizes = (whole, length, self.workload.new_tokens, question, blocks, glance)
            flops.append(estimate_flops(self.model.config, *sizes))
        for cost, length, tokens in zip(flops, lengths, selection.visual_tokens.tolist()):
            self.leave_out(cost, tokens, length - tokens)
        return flops

    def leave_out(self, cost: dict[str, int], tokens: int, words: int):
        """Take from the FLOPs of a question, in place, what layers that do not update visual tokens leave out."""
        config, new = self.model.config, self.workload.new_tokens
        layers = config.text_config.num_hidden_layers
        full, own = (
            schedule_flops(config, parse_schedule("", letters, layers), tokens, words, new)
            for letters in ("F" * layers, self.system.schedule(layers))
        )
        for part in ("prefill", "decode"):
            cost[part] += own[part] - full[part]
            cost["total"] += own[part] - full[part]

    def glances(self, inputs: dict) -> list[int | None]:
        """Number of prompt tokens of each question that the attention pointer reads; None for the selector."""
        if self.system.pointer != "attention":
            return [None] * len(inputs["input_ids"])
        layout = VisualLayout.of(self.model.config, inputs["input_ids"])
        shown = layout.is_global[:, None].expand(-1, layout.tokens_per_tile)
        return positions_to_keep(inputs["attention_mask"], layout, shown).sum(1).tolist()


def measure(runners: list[Runner], batches: list[list], edge: int) -> list[dict]:
    """Rows of `results.json` for one image size. The systems take turns batch by batch, after a warm-up.

    The warm-up runs each system on the first batch, small and then at full size, which also gives the peak memory.
    """
    seconds, descriptions, memory = ({runner.name: [] for runner in runners} for _ in range(3))
    with tqdm(total=(len(batches) + 1) * len(runners), desc=f"{edge} px") as progress:
        for runner in runners:
            memory[runner.name] = runner.warm_up(batches[0], edge)
            progress.update()
        for batch in batches:
            for runner in runners:
                spent, description = runner.time(batch, edge)
                seconds[runner.name].append(spent)
                descriptions[runner.name].append(description)
                progress.update()
    return [
        row_of(runner, edge, len(batches[0]), seconds[runner.name], descriptions[runner.name], memory[runner.name])
        for runner in runners
    ]


def row_of(
    runner: Runner, edge: int, batch_size: int, seconds: list[dict], descriptions: list[dict], memory: int
) -> dict:
    """One row: medians of the seconds over the batches, of all parts that are known, and means of the descriptions,
    per question.
    """
    totals = sorted(spent["total"] / batch_size for spent in seconds)
    first, known = descriptions[0], [part for part in PARTS if part in seconds[0]]
    mean = {key: sum(each[key] for each in descriptions) / len(descriptions) for key in first if key != "flops"}
    flops = {part: sum(each["flops"][part] for each in descriptions) / len(descriptions) for part in first["flops"]}
    return {
        "system": runner.name,
        "longest_edge": edge,
        **mean,
        "flops": flops,
        "seconds": {part: median(spent[part] / batch_size for spent in seconds) for part in known},
        "seconds_median": median(totals),
        "seconds_range": [totals[0], totals[-1]],
        "questions_per_second": 1 / median(totals),
        "memory_bytes": memory,
        "weight_bytes": runner.weight_bytes,
    }


def add_overhead(rows: list[dict], runners: list[Runner], batches: list[list]):
    """Add `alone` and `overhead` to the rows of systems that encode only part of an image, in place.

    `alone` is the seconds of the same work without the model around it, see `seconds_alone`; `overhead` is the
    seconds of the whole answer, without processing, divided by `alone`.
    """
    for row, runner in zip(rows, runners):
        system = runner.system
        if not system.lazy or system.edge == "native" or system.full_layers:  # at native size images differ in tiles
            continue
        row["alone"] = seconds_alone(runner, row, len(batches), len(batches[0]))
        row["overhead"] = (row["seconds_median"] - row["seconds"]["processing"]) / row["alone"]


@torch.no_grad()
def seconds_alone(runner: Runner, row: dict, repeats: int, batch_size: int) -> float:
    """Median seconds per question of the bare work of an answer.

    That is the encoder on as many random tiles (and blocks) as in `row`, and the text model on a prompt of as many
    tokens, with as many new ones.
    """
    model, k, per_tile = runner.model, runner.workload.tokens, runner.model.config.tokens_per_tile
    side, blocks = model.config.vision_config.image_size, runner.system.selection == "blocks"
    pixels = torch.randn(1, 1, 3, side, side, device=model.device)
    ids = torch.ones(batch_size, round(row["prompt_tokens"]), dtype=torch.long, device=model.device)
    in_part = -(-k // per_tile)  # tiles that hold k blocks
    image = torch.zeros(in_part, dtype=torch.long, device=model.device)
    chosen = (torch.arange(in_part * per_tile, device=model.device) < k).view(-1, per_tile)
    encoder, scale = (model.model.vision_model, model.model.connector), model.config.scale_factor
    tiles = 1 if blocks else 1 + round(row["tiles_mean"])
    times = []
    for _ in range(repeats):
        began = now(model.device)
        for _ in range(batch_size):
            model.model.get_image_features(pixels.expand(-1, tiles, -1, -1, -1))
            if blocks:
                encode_blocks(*encoder, pixels[0].expand(in_part, -1, -1, -1), chosen, image, scale)
        model.generate(ids, attention_mask=torch.ones_like(ids), **fixed_length(runner.workload.new_tokens))
        times.append((now(model.device) - began) / batch_size)
    return median(times)
