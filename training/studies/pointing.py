"""Who points best? The text model's attention, calibrated or not, the trained selector and controls at equal tiles.

    python training/studies/pointing.py --base_model DENSE --calibrated outputs/calibrated --model outputs/demo

Every chosen tile is kept whole, and the dense model reads them, untouched; only the trained selector has a text model
of its own, which was trained to read less. Tiles are encoded once for all systems, so seconds mean nothing here; FLOPs
are counted with every system on its own. Writes `pointing_cards.json` and prints the table.
"""

from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import Subset

from modeling_qgsa.calibration_qgsa import check_promise
from training.cli.arguments import errors_in_one_line, parse
from training.data.cards import Cards, parse_canvas
from training.evaluation.report import delta_cell, pointing_cell, write_results
from training.evaluation.rows import add_flops, evaluate_systems
from training.evaluation.systems import DENSE, System, whole_tiles
from training.methods import METHODS
from training.studies.checkpoints import load_dense, load_model


TILES = (1, 2, 4, 8)


@dataclass
class PointingArguments:
    """Models to compare, and the questions."""

    base_model: str = field(default="", metadata={"help": "Dense checkpoint; required."})
    calibrated: str = field(
        default="outputs/calibrated", metadata={"help": "It, calibrated (run_qgsa.py --task calibrate)."}
    )
    model: str | None = field(default=None, metadata={"help": "QGSA checkpoint trained on it; none by default."})
    families: str = field(
        default="", metadata={"help": "Families of questions, with commas; those of the benchmark by default."}
    )
    canvas: str = field(default="4x4", metadata={"help": "Canvas of the questions, as rows x columns in tiles."})
    eval_split: str = field(default="test", metadata={"help": "Questions to ask: test or validation."})
    test_size: int = field(default=2000, metadata={"help": "Number of questions."})
    promise_size: int = field(
        default=2000, metadata={"help": "Number of them, from the first on, that the promise is checked on."}
    )
    flops_questions: int = field(default=20, metadata={"help": "Number of questions whose FLOPs are counted."})
    output_dir: str = field(default="outputs/pointing", metadata={"help": "Folder for results."})

    def __post_init__(self):
        if not self.base_model:
            raise ValueError("base_model (''): give the dense checkpoint with --base_model")


def make_systems(dense, calibrated, model) -> list[System]:
    """Dense and the controls, each pointer with its own budget, then all of them at every number of tiles.

    Args:
        model: the trained model; None leaves it out.
    """
    attention = {"pointer": "attention"}
    systems = [
        System("dense", dense, DENSE),
        System("dense-global-only", dense, DENSE, image_kwargs={"do_image_splitting": False}),
        System("blank-image", dense, DENSE, blank=True),
        System("qgsa-calibrated", calibrated),
    ]
    if model is not None:
        systems.append(System("qgsa", model))
    for tiles in TILES:
        fixed = {"selection": "before_encoder"} | whole_tiles(dense.config, tiles)
        systems += [
            System(f"qgsa-attention, m = {tiles}", dense, attention | fixed),
            System(f"qgsa-calibrated, m = {tiles}", calibrated, attention | fixed),
            System(f"random, m = {tiles}", dense, fixed, METHODS["random-tiles"]),
            System(f"centre, m = {tiles}", dense, fixed, METHODS["centre"]),
        ]
        if model is not None:
            systems.append(System(f"qgsa, m = {tiles}", model, fixed))
    return systems


def format_pointing(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| system | accuracy | Δ to dense, pp [95 %] | tiles m | tokens k | pointing | loyalty |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['system']} | {row['accuracy']:.1%} | {delta_cell(row)} | {row['tiles_mean']:.2f} "
            f"| {row['visual_tokens_mean']:.1f} | {pointing_cell(row)} | {row['loyalty']['loyalty']:.1%} |"
        )
    for row in rows:
        if "promise" in row:
            kept, (low, high) = row["promise"], row["promise"]["loyalty_ci95"]
            lines += [
                "",
                f"`{row['system']}` promised to keep {row['calibration']['target_loyalty']:.1%} of the dense answers, "
                "weighted by the square of their probability, and of "
                f"{kept['held_out_samples']} it keeps {kept['loyalty']:.1%} [{low:.1%}, {high:.1%}]; unweighted "
                f"{kept['loyalty_unweighted']:.1%}.",
            ]
    return "\n".join(lines)


def main():
    run = parse(PointingArguments, __doc__)
    with errors_in_one_line():
        dense, processor = load_dense(run.base_model)
        calibrated = load_model(run.calibrated)
        model = None if run.model is None else load_model(run.model)
        families = run.families.split(",") if run.families else None
        questions = Cards(run.eval_split, run.test_size, canvases=[parse_canvas(run.canvas)], families=families)
    output = Path(run.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    systems = make_systems(dense, calibrated, model)
    rows = evaluate_systems(systems, questions, processor, 50, max_new_tokens=8, share_features=True)
    add_flops(rows, systems, questions, processor, 8, run.flops_questions)
    rows[3]["calibration"] = calibrated.config.calibration
    rows[3]["promise"] = check_promise(
        calibrated, Subset(questions, range(min(run.promise_size, run.test_size))), processor
    )
    name = "pointing_cards.json" if run.eval_split == "test" else f"pointing_cards_{run.eval_split}.json"
    write_results(output / name, "calibrate", "cards", run.test_size, 0, rows, run.eval_split)
    print(format_pointing(rows))


if __name__ == "__main__":
    main()
