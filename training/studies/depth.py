"""How deep does vision have to go? Schedules of the text model's layers, trained or not, the policy, and rivals.

    python training/studies/depth.py --base_model DENSE --visor outputs/visor-tiny

Of every system it counts, by formula, the FLOPs of the text model on visual tokens. Tiles are encoded once for all
systems, so seconds mean nothing here: those are in `depth_speed.py`. Writes `visor_cards.json` and prints the tables.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import Subset

from modeling_qgsa.schedule_qgsa import vision_share
from training.cli.arguments import errors_in_one_line, parse
from training.data.cards import RELATIONS, Cards
from training.data.collator import QuestionCollator
from training.evaluation.answers import answer
from training.evaluation.depth import (
    by_depth,
    by_schedule,
    cheaper_schedules,
    controls,
    pruning_systems,
    trained_systems,
    untrained_systems,
    visual_flops,
)
from training.evaluation.report import delta_cell, format_by_family, write_results
from training.evaluation.rows import add_flops, compare
from training.evaluation.systems import System
from training.studies.checkpoints import load_dense, load_model


LONGEST = 8  # tokens of an answer
BATCH = 50  # questions
HARD = ("count", "locate", *RELATIONS)  # families that need several tiles, or where a tile is


@dataclass
class DepthArguments:
    """Models to compare, and the questions."""

    base_model: str = field(default="", metadata={"help": "Dense checkpoint; required."})
    visor: str = field(default="outputs/visor-tiny", metadata={"help": "It, trained by run_visor.py."})
    visor_calibrated: str | None = field(
        default=None, metadata={"help": "That one, calibrated (run_visor.py --calibration_size): adds qgsa+visor."}
    )
    calibrated: str | None = field(
        default=None, metadata={"help": "The dense one, calibrated (run_qgsa.py --task calibrate)."}
    )
    vica: str | None = field(default=None, metadata={"help": "Trained by run_visor.py with one schedule."})
    blocks: str | None = field(
        default=None, metadata={"help": "Trained by run_visor.py with --vision_cross block: adds visor-blocks."}
    )
    families: str = field(
        default="", metadata={"help": "Families of questions, with commas; those of the benchmark by default."}
    )
    ranking_size: int = field(default=40, metadata={"help": "Training questions to rank the layers on."})
    eval_split: str = field(default="test", metadata={"help": "Questions to ask: test or validation."})
    test_size: int = field(default=2000, metadata={"help": "Number of questions."})
    systems: list[str] = field(
        default_factory=list, metadata={"help": "Beginnings of the names of systems to ask; all by default."}
    )
    flops_questions: int = field(default=4, metadata={"help": "Number of questions whose FLOPs are counted."})
    name: str = field(default="visor_cards", metadata={"help": "Name of the results."})
    output_dir: str = field(default="outputs/depth", metadata={"help": "Folder for results."})

    def __post_init__(self):
        if not self.base_model:
            raise ValueError("base_model (''): give the dense checkpoint with --base_model")


def make_systems(run: DepthArguments, dense, visor, processor, words: int) -> list[System]:
    """All systems, dense first. Rivals that prune tokens have the FLOPs of `visor` at its second schedule.

    Args:
        words: number of tokens of a prompt other than visual ones.
    """
    ranking = dense.rank_vision_layers(Subset(Cards("train", run.ranking_size), range(run.ranking_size)), processor)
    trained = trained_systems(visor)
    shares = [vision_share(kinds, visor.config) for kinds in cheaper_schedules(visor.config)]
    systems = [*controls(dense, visor), *untrained_systems(dense, ranking, shares), *trained]
    if run.blocks is not None:
        systems += by_schedule(load_model(run.blocks), "visor-blocks")
    if run.vica is not None:
        systems.append(System("vica", load_model(run.vica)))
    systems += [*by_depth(dense, "untrained"), *by_depth(visor, "trained")]
    visual = 17 * dense.config.tokens_per_tile
    allowed = visual_flops(trained[1], visual, shares[1], words, LONGEST)
    systems += pruning_systems(dense, allowed, visual, words, LONGEST)
    if run.calibrated is not None:
        systems.append(System("qgsa-calibrated", load_model(run.calibrated)))
    if run.visor_calibrated is not None:
        both = load_model(run.visor_calibrated)
        most = {"vision_budget": both.config.vision_schedules[-1]}
        systems += [System("qgsa+visor, most layers", both, most), System("qgsa+visor", both)]
    wanted = tuple(run.systems)
    return [system for system in systems if not wanted or system.name.startswith(("dense", *wanted))]


def count_words(questions, processor) -> int:
    """The number of tokens of a prompt other than visual ones, on average over a batch."""
    some = [questions[index] for index in range(min(BATCH, len(questions)))]
    inputs = QuestionCollator(processor, with_answer=False)(some)
    visual = (inputs["input_ids"] == processor.image_token_id).sum()
    return round(float(inputs["attention_mask"].sum() - visual) / len(some))


def format_depth(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| system | layers | accuracy | Δ to dense, pp [95 %] | easy | hard | tokens k | LM on vision, GFLOPs "
        "| times less | total GFLOPs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        easy, hard = (halves(row, wanted) for wanted in (False, True))
        spent = row["visual_flops"]
        less = "–" if not spent else f"{rows[0]['visual_flops'] / spent:.1f}"
        lines.append(
            f"| {row['system']} | {row['schedule'] or '–'} | {row['accuracy']:.1%} | {delta_cell(row)} | {easy:.1%} "
            f"| {hard:.1%} | {row['visual_tokens_mean']:.0f} | {spent / 1e9:.3f} | {less} "
            f"| {row['flops']['total'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def halves(row: dict, hard: bool) -> float:
    """Accuracy on the hard families or on the others."""
    some = [each for family, each in row["by_family"].items() if (family in HARD) == hard]
    return sum(each["n"] * each["accuracy"] for each in some) / max(1, sum(each["n"] for each in some))


def main():
    run = parse(DepthArguments, __doc__)
    with errors_in_one_line():
        dense, processor = load_dense(run.base_model)
        visor = load_model(run.visor)
        families = run.families.split(",") if run.families else None
        questions = Cards(run.eval_split, run.test_size, families=families)
    systems = make_systems(run, dense.eval(), visor, processor, count_words(questions, processor))
    everything, asked = answer(systems, questions, processor, BATCH, LONGEST, share_features=True)
    rows = compare(systems, everything, asked, "cards")
    add_flops(rows, systems, questions, processor, LONGEST, run.flops_questions)
    for system, answers, row in zip(systems, everything, rows):
        spent = zip(answers.visual_tokens, answers.vision_shares, answers.words)
        row["visual_flops"] = float(np.mean([visual_flops(system, *each, LONGEST) for each in spent]))
        row["schedule"] = system.options.get("vision_budget")
    name = run.name if run.eval_split == "test" else f"{run.name}_{run.eval_split}"
    output = Path(run.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_results(output / f"{name}.json", "visor", "cards", len(asked), 0, rows, run.eval_split)
    print(format_depth(rows), format_by_family(rows), sep="\n\n")


if __name__ == "__main__":
    main()
