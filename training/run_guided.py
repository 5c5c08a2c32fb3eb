"""Evaluate SGL: a small model guides a large one, and answers alone when it is sure.

    python training/run_guided.py --guide HuggingFaceTB/SmolVLM-256M-Instruct \
        --target HuggingFaceTB/SmolVLM-500M-Instruct --dataset vqa_rad

Nothing is trained. The threshold of the early exit is set on questions of the training split, without their answers.
Prints a table of both models alone, SGL as published and before the target's encoder, rivals at equal cost and
controls; writes it with the curve of the exit to `sgl_<dataset>.json`, and the calibrated pair to `pair`, both in the
output folder. Features of the target are shared by its systems, so seconds mean nothing here; FLOPs are counted with
every system on its own, the guide included.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import Subset
from transformers import PretrainedConfig

from modeling_qgsa import QGSAConfig, QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.cli.arguments import Parser, check_source, errors_in_one_line
from training.cli.groups import AnswerArguments
from training.data.arguments import DataArguments
from training.data.sets import load_data
from training.evaluation.answers import answer
from training.evaluation.guided import exit_curve, exit_pairs, guided_systems
from training.evaluation.guided_report import format_exits, format_guided, format_guided_families, plot_exits
from training.evaluation.report import write_results
from training.evaluation.rows import add_flops, compare, grade_answers
from training.evaluation.systems import System


@dataclass
class PairArguments:
    """The pair, and how its exit is calibrated."""

    _argument_group_name = "pair"

    guide: str = field(default="", metadata={"help": "The small model: Hub id or folder; required."})
    target: str = field(default="", metadata={"help": "The large model; required."})
    calibrated_guide: str | None = field(
        default=None, metadata={"help": "The guide, calibrated (run_qgsa.py --task calibrate): adds its pointer."}
    )
    calibrated_target: str | None = field(
        default=None, metadata={"help": "The target, calibrated: adds its own pointer."}
    )
    coverage: float = field(default=0.6, metadata={"help": "Share of the guide's map that chosen tiles cover."})
    target_loyalty: float = field(default=0.99, metadata={"help": "Share of answers to keep in the early exit."})
    calibration_size: int = field(default=200, metadata={"help": "Questions to calibrate the exit on."})
    flops_questions: int = field(default=8, metadata={"help": "Number of questions whose FLOPs are counted."})
    output_dir: str = field(default="outputs/guided", metadata={"help": "Folder for results and the pair."})

    def __post_init__(self):
        for name in ("guide", "target"):
            if not getattr(self, name):
                raise ValueError(f"{name} (''): required. Name a Hub id or a folder with --{name}")
        if self.calibration_size < 20:
            raise ValueError(f"calibration_size ({self.calibration_size}) must be at least 20")


def load_part(source: str) -> QGSASmolVLMForConditionalGeneration:
    """A QGSA checkpoint as it is, or a dense one with everything that it is made of, in float32."""
    check_source(source)
    made = PretrainedConfig.get_config_dict(source)[0].get("model_type") == QGSAConfig.model_type
    load = (
        QGSASmolVLMForConditionalGeneration.from_pretrained if made else QGSASmolVLMForConditionalGeneration.from_dense
    )
    return load(source).float().eval()


def evaluate(pair: PairArguments, data: DataArguments, answering: AnswerArguments) -> list[dict]:
    """Calibrate the exits, ask all systems, and write the results."""
    train, questions = load_data(data, 0)
    guide, target = load_part(pair.guide), load_part(pair.target)
    calibrated = [
        None if source is None else load_part(source) for source in (pair.calibrated_guide, pair.calibrated_target)
    ]
    processor = QGSAProcessor.from_pretrained(pair.target, backend="pil")
    processors = QGSAProcessor.from_pretrained(pair.guide, backend="pil"), processor
    systems = guided_systems(guide, target, processors, pair.coverage, *calibrated)
    samples, exits = Subset(train, range(min(pair.calibration_size, len(train)))), {}
    for name, each in exit_pairs(guide, target, processors, pair.coverage).items():
        each.calibrate(samples, pair.target_loyalty, answering.max_new_tokens)
        systems.append(System(name, each))
        exits[name] = each.guidance.calibration
    output = Path(pair.output_dir)
    systems[-1].model.save_pretrained(output / "pair")
    size, length = answering.test_batch_size, answering.max_new_tokens
    everything, asked = answer(systems, questions, processor, size, length, share_features=True)
    rows = compare(systems, everything, asked, data.dataset)
    add_flops(rows, systems, questions, processor, length, pair.flops_questions)
    grades = dict(zip((row["system"] for row in rows), grade_answers(data.dataset, everything, asked)))
    for row, answers in zip(rows, everything):
        if row["system"] in exits:
            row["calibration"] = exits[row["system"]]
            alone = grades["guide, glance" if "glance" in row["system"] else "guide"]
            row["exit_curve"] = exit_curve(answers, alone, grades["dense"])
    name = f"sgl_{data.dataset}" + ("" if data.eval_split == "test" else f"_{data.eval_split}")
    write_results(output / f"{name}.json", "guided", data.dataset, len(asked), 0, rows, data.eval_split)
    plot_exits(rows, output / f"{name}_exits.png")
    return rows


def main():
    kinds = (PairArguments, DataArguments, AnswerArguments)
    with errors_in_one_line():
        rows = evaluate(*Parser(kinds, description=__doc__).parse(sys.argv[1:]))
        print(format_guided(rows), format_guided_families(rows), format_exits(rows), sep="\n\n")


if __name__ == "__main__":
    main()
