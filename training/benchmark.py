"""How long an answer takes: stock SmolVLM, its cheaper settings, published pruning methods and QGSA, in one run.

    python training/benchmark.py --architecture 256m --longest_edges 2048 --output_dir outputs/speed_256m

All systems see the same images in the same process and take turns; medians are over the repeats, each with an image of
its own, after a warm-up. Weights are random unless `--checkpoint` is given: what an answer costs does not depend on
them. Budgets are therefore set (`--tiles`, `--tokens`) and not estimated. Writes `results.json`, `table.md` and plots.

Published pruning methods and QGSA run in the precision of each part and the steps that are the fastest here for stock
SmolVLM too (`dense-tuned`), which the run finds out first. On a GPU everything is in bfloat16.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, Idefics3Processor

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from modeling_qgsa.selection_qgsa import QGSASelection
from modeling_qgsa.vision_qgsa import encode_blocks
from training.cli.arguments import parse
from training.costs.flops import count_flops, estimate_flops
from training.costs.meter import PARTS, now, peak_memory, time_answer, weight_bytes
from training.costs.speed_report import write_speed
from training.methods.method import layout_of
from training.methods.peers import PEERS


SHARED = Path(__file__).resolve().parents[2] / "shared"
QUESTION = "Is there evidence of an abnormality in this image?"


@dataclass
class BenchmarkArguments:
    """What to time, and on what."""

    architecture: str = field(default="256m", metadata={"help": "256m or 500m."})
    checkpoint: str | None = field(default=None, metadata={"help": "QGSA checkpoint; random weights without it."})
    files: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of config and processor; of the architecture by default."}
    )
    images: str = field(
        default=str(SHARED / "data" / "vqa_rad" / "images"), metadata={"help": "Folder of images to ask about."}
    )
    longest_edges: list[int] = field(
        default_factory=lambda: [2048], metadata={"help": "px that images are scaled to; 2048 is stock's own."}
    )
    batch_size: int = field(default=1, metadata={"help": "Questions at once."})
    systems: list[str] = field(default_factory=lambda: list(SYSTEMS), metadata={"help": "What to time."})
    repeats: int = field(default=5, metadata={"help": "How often."})
    new_tokens: int = field(default=8, metadata={"help": "Length of every answer."})
    tiles: int = field(default=2, metadata={"help": "m: high-resolution tiles that QGSA encodes."})
    tokens: int = field(default=17, metadata={"help": "k: visual tokens kept, by all that prune."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu or cuda."})
    output_dir: str = field(default="outputs/speed", metadata={"help": "Where results, table and plots go."})


@dataclass(frozen=True)
class Timed:
    """A system: which of the models, how images are prepared for it, and how it selects.

    Args:
        model: "stock" (float32), "bfloat16" (stock in bfloat16), "plain" (ours, float32) or "tuned".
        selection: ours only.
        edge: what becomes of the longest edge: "full", "half", or "native", which scales no image up beyond the next
            whole tile.
        split: whether there are tiles beside the global view.
        peer: a method of `training/methods/peers.py`.
    """

    model: str
    selection: str = "dense"
    edge: str = "full"
    split: bool = True
    peer: str | None = None

    @property
    def lazy(self) -> bool:
        return self.selection in ("before_encoder", "blocks")


SYSTEMS = {
    "dense": Timed("stock"),
    "dense-bfloat16": Timed("bfloat16"),
    "dense-tuned": Timed("tuned"),
    "dense-native-size": Timed("stock", edge="native"),
    "dense-half-resolution": Timed("stock", edge="half"),
    "dense-global-only": Timed("stock", split=False),
    **{name: Timed("tuned", "after_encoder", peer=name) for name in PEERS},
    "qgsa-after-encoder": Timed("tuned", "after_encoder"),
    "qgsa-float32": Timed("plain", "before_encoder"),
    "qgsa": Timed("tuned", "before_encoder"),
    "qgsa-native-size": Timed("plain", "before_encoder", edge="native"),
    "qgsa-blocks": Timed("tuned", "blocks"),
}


def build_models(run, processor) -> dict[str, torch.nn.Module]:
    """The models that systems name. They share no weights: precision is a matter of each."""
    files = files_of(run)
    device = torch.device(run.device)
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32

    def fresh():
        torch.manual_seed(0)
        stock = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(files), dtype=torch.float32)
        return QGSASmolVLMForConditionalGeneration.from_dense(stock, processor.tokenizer), stock

    def load():
        if run.checkpoint:
            return QGSASmolVLMForConditionalGeneration.from_pretrained(run.checkpoint, dtype=torch.float32), None
        return fresh()

    wanted = {SYSTEMS[name].model for name in run.systems}
    models = {}
    for name in wanted:
        ours, stock = load()
        model = ours if name in ("plain", "tuned") or stock is None else stock
        model = model.to(device, torch.bfloat16 if name == "bfloat16" else kind).eval()
        model.generation_config.eos_token_id = None  # every answer is to have the same length
        model.generation_config.use_cache = True  # whatever a training left in the config
        models[name] = model
    return models


def files_of(run) -> str:
    """Where config and processor come from: as given, or of the published checkpoint, from `../shared` if it is there.

    Raises ValueError for an unknown architecture.
    """
    if run.files:
        return run.files
    if run.architecture not in ("256m", "500m"):
        raise ValueError(f"architecture is {run.architecture!r}: choose from 256m, 500m")
    local = SHARED / "checkpoints" / f"smolvlm-{run.architecture}-instruct"
    return str(local) if local.is_dir() else f"HuggingFaceTB/SmolVLM-{run.architecture.upper()}-Instruct"


def tune(model, tiles: int = 6, tokens: int = 1000) -> dict:
    """Give the parts of `model` the precision, and the encoder the step, that are fastest here; returns what it tried.

    The encoder is timed over `tiles` tiles, the text model over a prefill of `tokens` tokens and a few new ones.
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
            encoder.append((seconds_of(model, partial(model.model.get_image_features, pixels)), dtype, step))
        answer = partial(model.generate, ids, attention_mask=torch.ones_like(ids), **greedy(4))
        text.append((seconds_of(model, answer), dtype))
    (_, vision_dtype, step), (_, text_dtype) = (min(tried, key=lambda one: one[0]) for tried in (encoder, text))
    model.to(text_dtype).tune(vision_dtype, step)
    return {
        "vision_dtype": str(vision_dtype).removeprefix("torch."),
        "tiles_per_step": step,
        "text_dtype": str(text_dtype).removeprefix("torch."),
        f"seconds_of_{tiles}_tiles": [[str(d).removeprefix("torch."), s, seconds] for seconds, d, s in encoder],
        f"seconds_of_{tokens}_tokens": [[str(dtype).removeprefix("torch."), seconds] for seconds, dtype in text],
    }


@torch.no_grad()
def seconds_of(model, call) -> float:
    """The fastest of two calls, after one that warms up."""
    times = []
    for _ in range(3):
        began = now(model.device)
        call()
        times.append(now(model.device) - began)
    return min(times[1:])


def pick_images(folder: str, count: int) -> list[Image.Image]:
    """`count` images, evenly spaced among those of the folder by name. Raises ValueError where there are fewer."""
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(paths) < count:
        raise ValueError(f"images: {folder} holds {len(paths)} images, {count} are needed")
    return [Image.open(paths[index * len(paths) // count]).convert("RGB") for index in range(count)]


def greedy(length: int) -> dict:
    """Options of `generate` for an answer of exactly `length` tokens."""
    return {"do_sample": False, "max_new_tokens": length, "min_new_tokens": length}


class Runner:
    """Asks one system about one batch of images, as a user would."""

    def __init__(self, name: str, run, models: dict, processors: dict):
        self.name, self.run, self.system = name, run, SYSTEMS[name]
        self.model = models[self.system.model]
        self.processor = processors["stock" if self.system.selection == "dense" else "ours"]

    def process(self, images: list[Image.Image], edge: int) -> dict:
        """The inputs of `generate` for a question about each image, the longest edge being `edge` px."""
        if self.system.edge == "half":
            edge //= 2
        if self.system.edge == "native":
            edge = min(edge, max(max(image.size) for image in images))
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        options = {"lazy_tiles": True} if self.system.lazy else {}
        inputs = self.processor(
            text=[text] * len(images),
            images=[[image] for image in images],
            size={"longest_edge": edge},
            do_image_splitting=self.system.split,
            padding=True,
            return_tensors="pt",
            **options,
        )
        return dict(inputs.to(self.model.device))

    def options(self) -> dict:
        """Options of `generate` that say what is selected."""
        options = {}
        if self.system.selection != "dense":
            options = {
                "selection": self.system.selection,
                "min_tiles": self.run.tiles,
                "max_tiles": self.run.tiles,
                "min_visual_tokens": self.run.tokens,
                "max_visual_tokens": self.run.tokens,
            }
        elif isinstance(self.model, QGSASmolVLMForConditionalGeneration):
            options = {"selection": "dense"}
        return options

    def choose(self, inputs: dict) -> dict:
        """Options of `generate` that a published method makes of the inputs; none for the others."""
        if self.system.peer is None:
            return {}
        layout = layout_of(self.model.config, inputs["input_ids"])
        return PEERS[self.system.peer](self.model, inputs, layout, self.run.tokens)

    def generate(self, inputs: dict):
        """Answer. Returns the output of `generate`."""
        options = self.options() | self.choose(inputs) | greedy(self.run.new_tokens)
        return self.model.generate(**inputs, **options, return_dict_in_generate=True)

    def count(self, inputs: dict) -> dict[str, int]:
        """FLOPs of an answer, counted, where the formula does not know what the method spends on choosing."""
        unused = (self.model.model.selector, self.model.model.complexity_estimator)
        make = partial(self.choose, inputs)
        counted = count_flops(self.model, inputs, self.run.new_tokens, make, unused, **self.options())
        return {part: flops / len(inputs["input_ids"]) for part, flops in counted.items()}

    def describe(self, inputs: dict, selection: QGSASelection | None) -> dict:
        """Tokens, tiles, FLOPs and KV-cache of an answer, each a question's mean."""
        config, samples = self.model.config, len(inputs["input_ids"])
        per_tile = (config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor) ** 2
        placeholders = int((inputs["input_ids"] == config.image_token_id).sum()) / samples
        length = float(inputs["attention_mask"].sum()) / samples
        tiles, tokens, looked = placeholders / per_tile, placeholders, placeholders / per_tile - 1
        shown = [(round(tiles), round(length), None, ())] * samples
        if selection is not None:
            tokens, looked = (float(of.float().mean()) for of in (selection.visual_tokens, selection.tiles))
            length = float((selection.keep_indices >= 0).sum()) / samples
            lengths, asked = (selection.keep_indices >= 0).sum(1).tolist(), inputs["question_mask"].sum(1).tolist()
            shown = []
            for number, count in enumerate(selection.tiles.tolist()):
                blocks = ()
                if self.system.selection == "blocks" and count:  # how they are spread over the tiles costs nothing
                    blocks = (min(self.run.tokens, count * per_tile) - count + 1, *[1] * (count - 1))
                shown.append((1 + count - len(blocks), lengths[number], asked[number], blocks))
        costs = [estimate_flops(config, *one[:2], self.run.new_tokens, *one[2:]) for one in shown]
        text = config.text_config
        head = text.hidden_size // text.num_attention_heads
        cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head * self.model.lm_head.weight.itemsize
        return {
            "visual_tokens_mean": tokens,
            "tiles_mean": looked,
            "flops": {part: sum(cost[part] for cost in costs) / samples for part in costs[0]},
            "kv_cache_bytes": cached * (length + self.run.new_tokens - 1),
            "prompt_tokens": length,
        }


def measure(runners: list[Runner], batches: list[list], edge: int) -> list[dict]:
    """Rows of `results.json` for one image size, the systems taking turns batch by batch."""
    seconds = {runner.name: [] for runner in runners}
    told, memory = {}, {}
    with tqdm(total=(len(batches) + 1) * len(runners), desc=f"{edge} px") as progress:
        for runner in runners:  # the warm-up: on small images, then as they are, which says how much memory it takes

            def answer(edge, runner=runner):
                runner.generate(runner.process(batches[0], edge))

            answer(edge // 4)
            memory[runner.name] = peak_memory(runner.model.device, partial(answer, edge))
            progress.update()
        for batch in batches:
            for runner in runners:
                kept = {}

                def process(runner=runner, kept=kept, batch=batch):
                    kept["inputs"] = runner.process(batch, edge)
                    return dict(kept["inputs"])

                spent, output = time_answer(runner.model, process, runner.generate)
                seconds[runner.name].append(spent)
                told.setdefault(runner.name, []).append(runner.describe(kept["inputs"], output.get("selection")))
                if runner.system.peer:
                    told[runner.name][-1]["flops"] = runner.count(kept["inputs"])
                progress.update()
    return [row_of(runner, edge, seconds[runner.name], told[runner.name], memory[runner.name]) for runner in runners]


def row_of(runner: Runner, edge: int, seconds: list[dict], told: list[dict], memory: int) -> dict:
    """One row: medians over the repeats, each of a batch divided by its size."""
    size = runner.run.batch_size
    totals = sorted(spent["total"] / size for spent in seconds)
    mean = {name: sum(one[name] for one in told) / len(told) for name in told[0] if name != "flops"}
    return {
        "system": runner.name,
        "longest_edge": edge,
        **mean,
        "flops": {part: sum(one["flops"][part] for one in told) / len(told) for part in told[0]["flops"]},
        "seconds": {part: median(spent[part] / size for spent in seconds) for part in PARTS},
        "seconds_median": median(totals),
        "seconds_range": [totals[0], totals[-1]],
        "questions_per_second": 1 / median(totals),
        "memory_bytes": memory,
        "weight_bytes": weight_bytes(runner.model),
    }


def add_overhead(rows: list[dict], runners: list[Runner], batches: list[list], edge: int):
    """Put into the rows of what looks at parts: the seconds of the tiles, tokens and steps it did, measured alone.

    `alone` is the encoder over so many tiles (and blocks) and the text model over a prompt of so many tokens, with as
    many new ones; `overhead` is the time of the whole model, processing left out, divided by that.
    """
    for row, runner in zip(rows, runners):
        if not runner.system.lazy or runner.system.edge == "native":  # whose images differ in tiles
            continue
        model, side = runner.model, runner.model.config.vision_config.image_size
        pixels = torch.randn(1, 1, 3, side, side, device=model.device)
        length = round(row["prompt_tokens"])
        ids = torch.ones(runner.run.batch_size, length, dtype=torch.long, device=model.device)
        blocks, scale = runner.system.selection == "blocks", model.config.scale_factor
        image = torch.zeros(
            -(-runner.run.tokens // model.config.tokens_per_tile), dtype=torch.long, device=model.device
        )
        per_tile = model.config.tokens_per_tile
        chosen = torch.arange(-(-runner.run.tokens // per_tile) * per_tile, device=model.device)
        chosen = (chosen < runner.run.tokens).view(-1, per_tile)
        times, encoder = [], (model.model.vision_model, model.model.connector)
        for _ in batches:
            began = now(model.device)
            with torch.no_grad():
                for _ in range(runner.run.batch_size):
                    tiles = 1 if blocks else 1 + round(row["tiles_mean"])
                    model.model.get_image_features(pixels.expand(-1, tiles, -1, -1, -1))
                    if blocks:
                        encode_blocks(*encoder, pixels[0].expand(len(image), -1, -1, -1), chosen, image, scale)
                model.generate(ids, attention_mask=torch.ones_like(ids), **greedy(runner.run.new_tokens))
            times.append((now(model.device) - began) / runner.run.batch_size)
        row["alone"] = median(times)
        row["overhead"] = (row["seconds_median"] - row["seconds"]["processing"]) / row["alone"]


def main():
    run = parse(BenchmarkArguments, __doc__)
    unknown = [name for name in run.systems if name not in SYSTEMS]
    if unknown:
        raise SystemExit(f"unknown systems {', '.join(unknown)}: choose from {', '.join(SYSTEMS)}")
    files = files_of(run)
    processors = {
        "ours": QGSAProcessor.from_pretrained(files, backend="pil"),
        "stock": Idefics3Processor.from_pretrained(files),  # in the backend that is stock's here
    }
    images = pick_images(run.images, run.repeats * run.batch_size)
    batches = [images[start : start + run.batch_size] for start in range(0, len(images), run.batch_size)]
    models = build_models(run, processors["ours"])
    tuning = tune(models["tuned"]) if "tuned" in models else None
    runners = [Runner(name, run, models, processors) for name in run.systems]
    rows = []
    for edge in run.longest_edges:
        measured = measure(runners, batches, edge)
        add_overhead(measured, runners, batches, edge)
        rows += measured
    settings = vars(run) | {"files": Path(files).name, "images": Path(run.images).name}
    settings["checkpoint"] = run.checkpoint and Path(run.checkpoint).name
    print(write_speed(Path(settings.pop("output_dir")), settings, tuning, rows))


if __name__ == "__main__":
    main()
