"""What would a user run instead on a CPU? Seconds of other engines, and of the thumbnail alone, beside ours.

    make engines llama
    python training/studies/engines.py --architectures 256m --accuracy hub_cards/results

Random weights of the published architectures, the images of their processors (2048 px), one run in which all systems
take turns image by image: torch in this process, ONNX Runtime, OpenVINO and llama.cpp each in one of its own, with as
many threads. `make engines` sets up their environment and files, and `make llama` compiles llama.cpp. An engine that
is missing is skipped, and its rows say why. Writes `speed_engines_cpu.json`, and prints a table and draws a plot per
architecture.

Further questions about an image are timed for our systems, which reuse its encoded tiles (`VisualCache` in torch).
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import Idefics3Processor

from modeling_qgsa import QGSAProcessor, VisualCache
from modeling_qgsa.tuning_qgsa import name_of
from training.cli.arguments import errors_in_one_line, parse
from training.costs.meter import keep_freed_memory, now
from training.costs.speed_report import add_speedups
from training.costs.systems import SYSTEMS, TUNED, build_models, present_systems
from training.costs.timing import QUESTION, Runner, Workload, measure, pick_images
from training.costs.tuning import tune_alike
from training.engines.protocol import ROOT, EngineError, Worker
from training.evaluation.engines_report import (
    format_engines,
    format_own_budgets,
    plot_accuracy,
    plot_engines,
    read_accuracy,
)
from training.evaluation.report import write_results


SHARED = ROOT.parent / "shared"
CPU = torch.device("cpu")
NAME = "speed_engines_cpu"
OURS = (
    "qgsa-attention",
    "qgsa-attention-half-glance",
    "qgsa-attention-blocks",
    "qgsa-attention-blocks-half-glance",
    "qgsa",
    "qgsa-half-glance",
    "qgsa-blocks",
    "qgsa-blocks-half-glance",
)
COMPARED = ("dense", "dense-fast", "dense-global-only", "dense-global-only-fast", *OURS)


@dataclass(frozen=True)
class Engine:
    """An engine beside torch.

    Args:
        worker: module that runs it.
        folder: folder of its files, below that of the architecture.
        arguments: command line of the worker between that folder and the number of threads.
        systems: systems that it runs.
        apart: whether it needs the environment of `make engines`.
        target: what sets it up.
    """

    worker: str
    folder: str
    arguments: tuple[str, ...] = ()
    systems: tuple[str, ...] = ("dense", "dense-global-only")
    apart: bool = True
    target: str = "make engines"


ENGINES = {
    **{
        f"onnxruntime-{name}": Engine(
            "training.engines.onnx_worker",
            "onnx",
            (variant,),
            ("dense", "dense-global-only", *OURS),
            apart=False,
        )
        for name, variant in (("float32", "fp32"), ("int8", "int8"))
    },
    "openvino-float32": Engine("training.engines.openvino_worker", "openvino-fp32"),
    "openvino-int8": Engine("training.engines.openvino_worker", "openvino-int8"),
    "llama.cpp-q8_0": Engine("training.engines.llama_worker", "llama", target="make llama"),
}


@dataclass
class EnginesArguments:
    """The engines, and the work."""

    architectures: list[str] = field(
        default_factory=lambda: ["256m", "500m"], metadata={"help": "Sizes of SmolVLM, one after another."}
    )
    systems: list[str] = field(default_factory=lambda: list(COMPARED), metadata={"help": "Systems to time in torch."})
    engines: list[str] = field(
        default_factory=lambda: list(ENGINES), metadata={"help": "Other engines, for those systems that they run."}
    )
    checkpoints: str = field(
        default=str(SHARED / "checkpoints"), metadata={"help": "Folder with the published configs and processors."}
    )
    images: str = field(
        default=str(SHARED / "data" / "vqa_rad" / "images"), metadata={"help": "Folder of JPEG or PNG images."}
    )
    engine_files: str = field(
        default=str(ROOT / "outputs" / "engine_files"), metadata={"help": "Files of the engines: see make engines."}
    )
    engine_python: str = field(
        default=str(ROOT / ".venv-engines" / "bin" / "python"),
        metadata={"help": "Python of the environment that make engines sets up."},
    )
    repeats: int = field(default=3, metadata={"help": "Timed images."})
    questions: int = field(default=10, metadata={"help": "Questions about one image; those after the first count."})
    new_tokens: int = field(default=8, metadata={"help": "Length of every answer, in tokens."})
    tiles: list[int] = field(
        default_factory=lambda: [2, 1],
        metadata={
            "help": "m: high-resolution tiles that QGSA encodes per image; all but the first for whole tiles only."
        },
    )
    tokens: int = field(default=17, metadata={"help": "k: visual tokens that QGSA keeps per image."})
    accuracy: str | None = field(
        default=None, metadata={"help": "Folder with results on cards: what each system loses is shown beside it."}
    )
    output_dir: str = field(default="outputs/engines", metadata={"help": "Folder for results."})

    def __post_init__(self):
        self.systems = present_systems(self.systems)
        unknown = [name for name in self.engines if name not in ENGINES]
        if unknown:
            raise ValueError(f"engines ({', '.join(unknown)}): unknown; choose from {', '.join(ENGINES)}")
        if len(set(self.tiles)) < len(self.tiles) or min(self.tiles, default=0) < 1:
            raise ValueError(f"tiles ({', '.join(map(str, self.tiles))}): must be at least 1, each number once")
        for name, least in (("repeats", 1), ("questions", 2), ("new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}): must be at least {least}")

    def source(self, architecture: str) -> Path:
        """Folder of the config and the processor of an architecture. Raises ValueError if there is none."""
        folder = Path(self.checkpoints, f"smolvlm-{architecture}-instruct")
        if not folder.is_dir():
            raise ValueError(f"architectures ({architecture}): {folder} is not a folder; choose another")
        return folder

    def workloads(self, system: str) -> dict[str, Workload]:
        """The work of a system, by the name of its row: for whole tiles once with each m, otherwise with the first."""
        first, *others = (Workload(tiles, self.tokens, self.new_tokens) for tiles in self.tiles)
        if SYSTEMS[system].selection != "before_encoder":
            return {system: first}
        return {system: first} | {f"{system}, m = {other.tiles}": other for other in others}


class TorchRunner(Runner):
    """A runner that keeps the description of its last answer, which other engines share.

    Args:
        system: key of `SYSTEMS`.
        workload: budgets and length of the answer.
        models, processors: see `Runner`.
        name: what its row is called; by default as the system.
    """

    engine = f"torch {torch.__version__}"

    def __init__(self, system: str, workload: Workload, models: dict, processors: dict, name: str | None = None):
        super().__init__(system, workload, models, processors)
        self.key, self.name = system, name or system

    def time(self, images: list[Image.Image], edge: int) -> tuple[dict, dict]:
        seconds, self.description = super().time(images, edge)
        return seconds, self.description

    def ask_again(self, images: list[Image.Image], edge: int, questions: list[str]) -> list[float]:
        """Seconds of the questions about an image after the first; it stays scaled, and its tiles stay encoded."""
        cache, spent = VisualCache(), []
        opened = [self.processor.open(image, **self.cutting(images, edge)) for image in images]
        for question in (QUESTION, *questions):
            began = now(CPU)
            self.generate(self.prepare(opened, question) | {"visual_cache": cache})
            spent.append(now(CPU) - began)
        return spent[1:]

    @property
    def precision(self) -> str:
        """Dtypes of the encoder and of the text model, in one word if they agree."""
        vision, text = name_of(self.model.model.vision_model.dtype), name_of(self.model.lm_head.weight.dtype)
        return text if vision == text else f"{vision}, text {text}"


class EngineRunner:
    """A system in another engine, timed like one in torch.

    Args:
        name: key of `ENGINES`.
        worker: its process.
        twin: the same system in torch, which comes before it on every image.
        folder: folder for the image.
    """

    def __init__(self, name: str, worker: Worker, twin: TorchRunner, folder: Path):
        self.name, self.worker, self.twin = f"{name}, {twin.name}", worker, twin
        self.system = twin.system
        self.image, self.weight_bytes = folder / "image.png", worker.weight_bytes
        self.engine, self.precision = worker.version, name.rpartition("-")[2]

    def request(self, images: list[Image.Image]) -> dict:
        """The question about an image, as the worker takes it."""
        (image,) = images
        image.save(self.image)
        work = {"system": self.twin.key, **vars(self.twin.workload)}
        return {"image": str(self.image), "question": QUESTION, **work}

    def warm_up(self, images: list[Image.Image], edge: int) -> int:
        """Answer once; returns the peak memory in bytes, beyond the weights."""
        return self.worker.peak_memory(**self.request(images)) - self.weight_bytes

    def time(self, images: list[Image.Image], edge: int) -> tuple[dict, dict]:
        """Seconds of an answer, by those parts that the engine tells apart, and what the answer took besides."""
        shared = {name: value for name, value in self.twin.description.items() if name != "kv_cache_bytes"}
        return self.worker.ask(**self.request(images)), shared

    def ask_again(self, images: list[Image.Image], edge: int, questions: list[str]) -> list[float]:
        """Seconds of the questions about an image after the first, whose tiles stay encoded."""
        return self.worker.ask(**self.request(images), later=questions)["later"]


def torch_runners(run: EnginesArguments, architecture: str) -> list[TorchRunner]:
    """Runners of random weights in torch, the fast ones in the precision that is fastest here."""
    source = str(run.source(architecture))
    processors = {
        "ours": QGSAProcessor.from_pretrained(source),
        "stock": Idefics3Processor.from_pretrained(source),
    }
    models = build_models(run.systems, source, None, processors["ours"].tokenizer, CPU)
    tune_alike([models[name] for name in TUNED if name in models])
    return [
        TorchRunner(system, workload, models, processors, name)
        for system in run.systems
        for name, workload in run.workloads(system).items()
    ]


def start(run: EnginesArguments, architecture: str, name: str) -> Worker:
    """The process of an engine. Raises EngineError, which says what is missing."""
    engine, output = ENGINES[name], Path(run.output_dir)
    files = Path(run.engine_files, architecture, engine.folder)
    python = run.engine_python if engine.apart else sys.executable
    for missing, path in (("environment", Path(python)), ("files", files)):
        if not path.exists():
            raise EngineError(f"no {missing}: run {engine.target}")
    arguments = [str(files.resolve()), *engine.arguments, str(torch.get_num_threads())]
    log = output / f"{name}-{architecture}.log"
    return Worker(engine.worker, arguments, python, log, (files.resolve(),))


def engine_runners(
    run: EnginesArguments, architecture: str, twins: list[TorchRunner], folder: Path, open_until: ExitStack
) -> Iterator[EngineRunner | dict]:
    """Runners of the other engines, each asked once already; or, for an engine that fails, rows that say why.

    Args:
        twins: runners of torch.
        folder: for images.
        open_until: closes the processes.
    """
    small = Image.new("RGB", (64, 64))
    for name in tqdm(run.engines, desc=f"{architecture}: starting engines"):
        systems = [twin for twin in twins if twin.key in ENGINES[name].systems]
        try:
            worker = open_until.enter_context(closing(start(run, architecture, name)))
            runners = [EngineRunner(name, worker, twin, folder) for twin in systems]
            for runner in runners:
                worker.ask(**runner.request([small]))
            yield from runners
        except EngineError as error:
            engine, _, precision = name.rpartition("-")
            for twin in systems:
                yield {"system": twin.name, "engine": engine, "precision": precision, "skipped": str(error)}


def time_architecture(run: EnginesArguments, architecture: str) -> list[dict]:
    """Rows of one architecture: all systems in torch, then those of the other engines, skipped ones last."""
    images = pick_images(run.images, run.repeats)
    twins = torch_runners(run, architecture)
    edge = twins[0].processor.image_processor.size["longest_edge"]
    with TemporaryDirectory() as folder, ExitStack() as open_until:
        others = list(engine_runners(run, architecture, twins, Path(folder), open_until))
        runners = [*twins, *(each for each in others if isinstance(each, EngineRunner))]
        rows = measure(runners, [[image] for image in images], edge)
        questions = [f"{QUESTION} Look at part {number}." for number in range(1, run.questions)]
        asked = tqdm(list(zip(rows, runners)), desc=f"{architecture}: {run.questions} questions about one image")
        for row, runner in asked:
            row |= {"engine": runner.engine, "precision": runner.precision}
            if isinstance(runner, EngineRunner):
                row["system"] = runner.twin.name
            if runner.system.selection != "dense":  # which encodes all tiles anew
                row["seconds_later"] = median(runner.ask_again(images[:1], edge, questions))
    add_speedups(rows)
    rows += [each for each in others if isinstance(each, dict)]
    return [{"architecture": architecture, **row} for row in rows]


def main():
    with errors_in_one_line():
        run = parse(EnginesArguments, __doc__)
        output, rows = Path(run.output_dir), []
        accuracy = read_accuracy(Path(run.accuracy)) if run.accuracy else {}  # before anything is timed
        for architecture in run.architectures:
            run.source(architecture)
        output.mkdir(parents=True, exist_ok=True)
        keep_freed_memory()
        for architecture in run.architectures:
            rows += time_architecture(run, architecture)
            write_results(output / f"{NAME}.json", NAME, "vqa_rad images", run.repeats, 0, rows, "none")
            plot_engines(rows, architecture, output / f"{NAME}_{architecture}.png")
            if accuracy:
                plot_accuracy(rows, architecture, accuracy, output / f"{NAME}_{architecture}_accuracy.png")
            for table in (format_engines, format_own_budgets):
                print(table(rows, architecture, accuracy), flush=True)  # the second may be empty


if __name__ == "__main__":
    main()
