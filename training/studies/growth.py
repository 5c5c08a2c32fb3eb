"""How do seconds and memory grow? With the image, tiles, questions about one image, the batch, and new tokens.

    python training/studies/growth.py --output_dir outputs/growth

Random weights of a published architecture, its processor, real images scaled to squares, one run in which all systems
take turns. One thing is varied at a time; the others stay at one image of 2048 px, one question, 2 tiles, 17 visual
tokens and 8 new tokens. Images are cut at their own size up to `--longest_edge`, and scaled down to it beyond: the
published vocabulary names 6 x 6 tiles, 3072 px (stock SmolVLM scales all images to 2048 px). Resizing, with cutting
and tokenizing, is told apart from the question. Questions about one image share a `VisualCache`, except those of
`dense`, which encodes the image anew for each.

Writes `speed_growth_cpu.json` and `speed_growth_cpu.png` and prints the tables, with exponents: slopes of least
squares between logarithms. Takes 17 minutes on two cores of a Xeon with AVX-512 (`--dense_seconds 45`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image
from tqdm.auto import tqdm
from transformers import Idefics3Processor

from modeling_qgsa import QGSAProcessor, VisualCache
from training.cli.arguments import errors_in_one_line, parse
from training.costs.meter import keep_freed_memory, now, watch_memory
from training.costs.systems import TUNED, build_models, present_systems
from training.costs.timing import QUESTION, Workload, pick_images, row_of
from training.costs.tuning import tune_alike
from training.evaluation.engines_report import number
from training.evaluation.report import write_results
from training.studies.engines import SHARED, TorchRunner


CPU = torch.device("cpu")
NAME = "speed_growth_cpu"
LONG = 5.0  # seconds; a call that takes longer is not repeated
AXES = {
    "size": "image size, px",
    "tiles": "tiles encoded",
    "questions": "questions about one image",
    "batch_size": "questions at once",
    "new_tokens": "new tokens",
}
QUANTITIES: dict[str, Callable[[dict], float]] = {
    "resizing, s": lambda row: row["seconds"]["processing"],
    "question, s": lambda row: row["seconds_median"] - row["seconds"]["processing"],
    "memory, GB": lambda row: row["memory_bytes"] / 1e9,
}


@dataclass
class GrowthArguments:
    """The systems, and the work."""

    architecture: str = field(default="256m", metadata={"help": "256m or 500m."})
    systems: list[str] = field(
        default_factory=lambda: ["dense", "qgsa", "qgsa-blocks"], metadata={"help": "Systems to time."}
    )
    checkpoints: str = field(
        default=str(SHARED / "checkpoints"), metadata={"help": "Folder with the published configs and processors."}
    )
    images: str = field(
        default=str(SHARED / "data" / "vqa_rad" / "images"), metadata={"help": "Folder of JPEG or PNG images."}
    )
    sizes: list[int] = field(
        default_factory=lambda: [512, 1024, 2048, 3072, 4096, 8192], metadata={"help": "Image sizes in px."}
    )
    tiles: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "m: high-resolution tiles that QGSA encodes."}
    )
    questions: int = field(default=10, metadata={"help": "Questions about one image, from one to this number."})
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32],
        metadata={"help": "Questions at once, each with an image of its own."},
    )
    new_tokens: list[int] = field(
        default_factory=lambda: [1, 4, 16, 64], metadata={"help": "Lengths of the answer, in tokens."}
    )
    image_size: int = field(default=2048, metadata={"help": "Image size in px while something else is varied."})
    longest_edge: int = field(default=3072, metadata={"help": "Larger images are scaled down to this size, in px."})
    dense_seconds: float = field(
        default=70, metadata={"help": "Dense is not measured where it would take longer, judged by its tiles."}
    )
    repeats: int = field(
        default=1, metadata={"help": f"Timed calls after a first one, which counts only if it takes over {LONG:g} s."}
    )
    output_dir: str = field(default="outputs/growth", metadata={"help": "Folder for results and plot."})

    def __post_init__(self):
        self.systems = present_systems(self.systems)
        for name in ("questions", "image_size", "longest_edge", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}): must be at least 1")
        for name in ("sizes", "tiles", "batch_sizes", "new_tokens"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}): must be numbers of at least 1")

    @property
    def source(self) -> Path:
        """Folder of the config and the processor. Raises ValueError if there is none."""
        folder = Path(self.checkpoints, f"smolvlm-{self.architecture}-instruct")
        if not folder.is_dir():
            raise ValueError(f"architecture ({self.architecture}): {folder} is not a folder; choose another")
        return folder


@dataclass(frozen=True)
class Point:
    """Work to measure.

    Args:
        axis, value: what is varied, a key of `AXES`, and to which value.
        px: side of the square images.
        edge: longest edge to which they are scaled.
        batch_size: number of images, each with a question.
        questions: number of questions about each image, one after another.
        workload: budgets and length of the answer.
    """

    axis: str
    value: int
    px: int
    edge: int
    batch_size: int = 1
    questions: int = 1
    workload: Workload = field(default_factory=Workload)


def points_of(run: GrowthArguments) -> list[Point]:
    """All points of a run, axis by axis, each in increasing order."""

    def points(axis: str, values, make: Callable[[int], dict]) -> list[Point]:
        made = []
        for value in sorted(set(values)):
            fields = {"px": run.image_size} | make(value)
            made.append(Point(axis, value, edge=min(fields["px"], run.longest_edge), **fields))
        return made

    base = Workload()
    return [
        *points("size", run.sizes, lambda px: {"px": px}),
        *points("tiles", run.tiles, lambda tiles: {"workload": replace(base, tiles=tiles)}),
        *points("questions", range(1, run.questions + 1), lambda count: {"questions": count}),
        *points("batch_size", run.batch_sizes, lambda count: {"batch_size": count}),
        *points("new_tokens", run.new_tokens, lambda length: {"workload": replace(base, new_tokens=length)}),
    ]


class Growth:
    """Measures points, and keeps the rows.

    Args:
        run: arguments.
        runners: the systems, which share a processor's tiles.
        images: as many as the largest batch.
    """

    def __init__(self, run: GrowthArguments, runners: list[TorchRunner], images: list[Image.Image]):
        self.run, self.runners, self.images = run, runners, images
        self.tile = runners[0].processor.image_processor.max_image_size["longest_edge"]
        self.rows: list[dict] = []
        self.asked: dict[str, list[dict]] = {}  # by system, see `ask_again`

    def measure(self) -> list[dict]:
        """Rows of all points; those that were not measured say why (`skipped`)."""
        points = points_of(self.run)
        for runner in self.runners:  # a first answer is slower than all others
            runner.generate(runner.process(self.images[:1], self.tile))
        with tqdm(total=len(points) * len(self.runners)) as progress:
            for point in points:
                progress.set_description(f"{AXES[point.axis]}: {point.value}")
                for runner in self.runners:
                    row = self.head(runner, point)
                    self.rows.append(row | self.body(runner, point, row))
                    progress.update()
        return self.rows

    def head(self, runner: TorchRunner, point: Point) -> dict:
        """What a row says of its work."""
        side = math.ceil(point.edge / self.tile)
        return {
            "system": runner.name,
            "axis": point.axis,
            "value": point.value,
            "image_px": point.px,
            "longest_edge": point.edge,
            "image_tiles": side**2 if side > 1 else 0,
            "batch_size": point.batch_size,
            "questions": point.questions,
            "tiles": point.workload.tiles,
            "new_tokens": point.workload.new_tokens,
            "precision": runner.precision,
        }

    def body(self, runner: TorchRunner, point: Point, head: dict) -> dict:
        """What a row says of its seconds and memory; or why there are none."""
        if point.axis == "questions" and runner.name in self.asked:
            return self.asked_up_to(runner, point.questions)
        why = self.why_not(runner, head)
        if why is not None:
            return {"skipped": why}
        runner.workload = point.workload
        images = [image.resize((point.px, point.px)) for image in self.images[: point.batch_size]]
        if point.axis == "questions":
            counts = range(2, self.run.questions + 1)
            possible = [count for count in counts if self.why_not(runner, head | {"questions": count}) is None]
            self.asked[runner.name] = self.ask_again(runner, point.edge, images, max(possible, default=1))
            return self.asked_up_to(runner, point.questions)
        return self.same_work(runner, head) or self.time(runner, point, images)

    def asked_up_to(self, runner: TorchRunner, questions: int) -> dict:
        """What a row says of so many questions about an image, which were asked one after another."""
        rows = self.asked[runner.name]
        if questions <= len(rows):
            return rows[questions - 1]
        return {"skipped": f"would take about {rows[-1]['seconds_median'] * questions / len(rows):.0f} s"}

    def same_work(self, runner: TorchRunner, head: dict) -> dict | None:
        """What a row of another axis says of the same work; None if there is none."""
        varied = {"axis", "value"} | ({"tiles"} if runner.system.selection == "dense" else set())
        alike = {name: value for name, value in head.items() if name not in varied}
        for row in self.rows:
            if "skipped" not in row and row["axis"] != "questions" and alike.items() <= row.items():
                return {name: value for name, value in row.items() if name not in head}
        return None

    def why_not(self, runner: TorchRunner, head: dict) -> str | None:
        """Why dense is not measured at a point; None if it is, and for all other systems."""
        if runner.system.selection != "dense":
            return None
        if head["axis"] == "tiles" and head["value"] != head["image_tiles"]:
            return f"encodes all {head['image_tiles']} tiles"
        done = [row for row in self.rows if row["system"] == runner.name and "skipped" not in row]
        if not done:
            return None
        expected = done[-1]["seconds_median"] * tiles_in_all(head) / tiles_in_all(done[-1])
        return f"would take about {expected:.0f} s" if expected > self.run.dense_seconds else None

    def time(self, runner: TorchRunner, point: Point, images: list[Image.Image]) -> dict:
        """Seconds and memory of one batch of questions. The first call gives the memory."""
        peak = watch_memory(CPU)
        calls = [runner.time(images, point.edge)]
        memory = peak()
        if calls[0][0]["total"] <= LONG:
            calls = [runner.time(images, point.edge) for _ in range(self.run.repeats)]
        seconds, descriptions = zip(*calls)
        row = row_of(runner, point.edge, 1, list(seconds), list(descriptions), memory)  # seconds of the whole batch
        left_out = ("system", "longest_edge", "questions_per_second")
        return {name: value for name, value in row.items() if name not in left_out}

    def ask_again(self, runner: TorchRunner, edge: int, images: list[Image.Image], questions: int) -> list[dict]:
        """Seconds and memory up to each of several questions about an image, one after another."""
        cached = {} if runner.system.selection == "dense" else {"visual_cache": VisualCache()}
        peak, processing, began, rows = watch_memory(CPU), 0.0, now(CPU), []
        for count in range(questions):
            asked = now(CPU)
            inputs = runner.process(images, edge, f"{QUESTION} Look at part {count}.")
            processing += now(CPU) - asked
            runner.generate(inputs | cached)
            total = now(CPU) - began
            row = {"seconds": {"processing": processing}, "seconds_median": total, "seconds_range": [total, total]}
            rows.append(row | {"memory_bytes": peak(), "weight_bytes": runner.weight_bytes})
        return rows


def tiles_in_all(head: dict) -> int:
    """Number of tiles that dense encodes, global views included."""
    return (head["image_tiles"] + 1) * head["batch_size"] * head["questions"]


def make_runners(run: GrowthArguments) -> list[TorchRunner]:
    """Runners of random weights, QGSA's in the precision that is fastest here."""
    source = str(run.source)
    processors = {
        "ours": QGSAProcessor.from_pretrained(source),
        "stock": Idefics3Processor.from_pretrained(source),
    }
    models = build_models(run.systems, source, None, processors["ours"].tokenizer, CPU)
    tune_alike([models[name] for name in TUNED if name in models])
    return [TorchRunner(name, Workload(), models, processors) for name in run.systems]


# Exponents


def exponent(points: list[tuple[float, float]]) -> float | None:
    """Slope of least squares between logarithms of points `(x, y)`; None for fewer than two x, or y of 0 or less."""
    if len({x for x, _ in points}) < 2 or any(y <= 0 for _, y in points):
        return None
    xs, ys = ([math.log(each) for each in column] for column in zip(*points))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys)) / sum((x - x_mean) ** 2 for x in xs)


def measured(rows: list[dict], axis: str, system: str) -> list[dict]:
    """The rows of a system on an axis that were measured."""
    return [row for row in rows if (row["axis"], row["system"]) == (axis, system) and "skipped" not in row]


def fit(rows: list[dict], axis: str, system: str, quantity: str) -> tuple[float, int, int] | None:
    """Exponent of a quantity in `value`, and the range of values that it is fitted over; None if there is none.

    With the image size, question and memory are fitted where an image has several tiles and is not scaled down:
    below and beyond, their number does not change.
    """
    found = measured(rows, axis, system)
    if axis == "size" and quantity != "resizing, s":
        found = [row for row in found if row["image_tiles"] and row["longest_edge"] == row["value"]]
    slope = exponent([(row["value"], QUANTITIES[quantity](row)) for row in found])
    return None if slope is None else (slope, found[0]["value"], found[-1]["value"])


# Tables and plot


def format_growth(rows: list[dict], axis: str) -> str:
    """The rows of one axis as a Markdown table, each quantity for every system."""
    rows = [row for row in rows if row["axis"] == axis]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    columns = [(name, system) for name in QUANTITIES for system in systems]
    lines = [
        f"| {AXES[axis]} | " + " | ".join(f"{name}: {system}" for name, system in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for value in dict.fromkeys(row["value"] for row in rows):
        by_system = {row["system"]: row for row in rows if row["value"] == value}
        cells = [
            "not measured" if "skipped" in by_system[system] else number(QUANTITIES[name](by_system[system]), 2)
            for name, system in columns
        ]
        lines.append(f"| {value} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_exponents(rows: list[dict]) -> str:
    """The exponents of all axes as a Markdown table, with the range that each is fitted over."""
    lines = [
        "| grows with | system | " + " | ".join(f"{name.partition(',')[0]} [range]" for name in QUANTITIES) + " |",
        "|---" * (len(QUANTITIES) + 2) + "|",
    ]
    for axis in AXES:
        for system in dict.fromkeys(row["system"] for row in rows):
            found = [fit(rows, axis, system, name) for name in QUANTITIES]
            cells = ["–" if each is None else "{:.2f} [{}, {}]".format(*each) for each in found]
            lines.append(f"| {AXES[axis]} | {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth_tables(rows: list[dict]) -> list[str]:
    """All tables of the results page."""
    return [*(format_growth(rows, axis) for axis in AXES), format_exponents(rows)]


def plot_growth(rows: list[dict], path: Path):
    """Draw seconds and memory against all axes, one line per system, with exponents; resizing is dashed."""
    figure = Figure(figsize=(4 * len(AXES), 9), layout="constrained")
    grid = figure.subplots(2, len(AXES), sharey="row")
    for column, axis in enumerate(AXES):
        for axes, quantity in ((grid[0, column], "question, s"), (grid[1, column], "memory, GB")):
            for system in dict.fromkeys(row["system"] for row in rows):
                found, slope = measured(rows, axis, system), fit(rows, axis, system, quantity)
                label = system if slope is None else "{}: {:.2f} [{}, {}]".format(system, *slope)
                points = [(row["value"], QUANTITIES[quantity](row)) for row in found]
                (line,) = axes.plot(*zip(*points), marker="o", label=label) if points else axes.plot([], label=label)
                if axis == "size" and quantity == "question, s":
                    resizing = [QUANTITIES["resizing, s"](row) for row in found]
                    axes.plot([x for x, _ in points], resizing, ls="--", lw=1, color=line.get_color())
            ticks = list(dict.fromkeys(row["value"] for row in rows if row["axis"] == axis))
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(ticks, list(map(str, ticks)), rotation=45)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            axes.grid(alpha=0.3, which="both")
            above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.01)}
            axes.legend(fontsize=8, title="exponents [range]", title_fontsize=8, **above)
        grid[1, column].set_xlabel(AXES[axis])
    grid[0, 0].set_ylabel("seconds without resizing (dashed: resizing)")
    grid[1, 0].set_ylabel("peak memory beyond the weights, GB")
    figure.savefig(path, dpi=130, bbox_inches="tight")


def main():
    run = parse(GrowthArguments, __doc__)
    with errors_in_one_line():
        images = pick_images(run.images, max(run.batch_sizes))
        keep_freed_memory()
        rows = Growth(run, make_runners(run), images).measure()
    output = Path(run.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_results(output / f"{NAME}.json", NAME, "vqa_rad images", max(run.batch_sizes), 0, rows, "none")
    plot_growth(rows, output / f"{NAME}.png")
    print("\n\n".join(growth_tables(rows)))


if __name__ == "__main__":
    main()
