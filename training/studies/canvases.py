"""Does a selection hold on canvases of other shapes? Every system on cards, canvas by canvas.

    python training/studies/canvases.py --model outputs/demo_canvases --output_dir outputs/canvases

Each canvas has questions of its own, and every row is paired with dense on the same ones. Takes about three minutes
per canvas and 2000 questions on two cores. Writes `canvases_cards.json` (one row per canvas and system) and prints the
accuracy by canvas and system, and by family and canvas.
"""

from dataclasses import dataclass, field
from pathlib import Path

from training.cli.arguments import errors_in_one_line, parse
from training.data.cards import FAMILIES, Cards, parse_canvas
from training.evaluation.report import delta_cell, pointing_cell, write_results
from training.evaluation.rows import evaluate_systems
from training.evaluation.systems import System, choose_systems
from training.studies.checkpoints import base_model_of, load_dense, load_model


@dataclass
class CanvasesArguments:
    """Model to study, the canvases, and the number of questions."""

    model: str = field(default="outputs/demo_canvases", metadata={"help": "QGSA checkpoint, trained on cards."})
    base_model: str | None = field(
        default=None,
        metadata={"help": "Dense checkpoint that it is made from; by default as in its run.json."},
    )
    canvases: list[str] = field(
        default_factory=lambda: ["4x4", "3x4", "4x3", "2x4", "4x2"],
        metadata={"help": "Canvases, as rows x columns in tiles; --preset canvases leaves out 4x2."},
    )
    systems: list[str] = field(
        default_factory=lambda: ["dense", "dense-global-only", "blank-image", "random", "centre", "qgsa"],
        metadata={"help": "Systems to evaluate; dense and qgsa must be among them."},
    )
    eval_split: str = field(default="test", metadata={"help": "Questions to ask: test or validation."})
    test_size: int = field(default=2000, metadata={"help": "Number of questions per canvas."})
    output_dir: str = field(default="outputs/canvases", metadata={"help": "Folder for results."})


def rows_by_canvas(systems: list[System], questions: dict[str, Cards], processor) -> list[dict]:
    """One row per canvas and system, with its `canvas`.

    Args:
        systems: systems to evaluate, dense first.
        questions: the questions of each canvas.
    """
    rows = []
    for canvas, asked in questions.items():
        print(f"canvas {canvas}", flush=True)
        rows += [{"canvas": canvas} | row for row in evaluate_systems(systems, asked, processor, 50, max_new_tokens=8)]
    return rows


def format_canvases(rows: list[dict]) -> str:
    """Every system on every canvas as a Markdown table."""
    lines = [
        "| canvas | system | accuracy | Δ to dense, pp [95 %] | tokens k | tiles m | pointing |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['canvas']} | {row['system']} | {row['accuracy']:.1%} | {delta_cell(row)} "
            f"| {row['visual_tokens_mean']:.1f} | {row['tiles_mean']:.2f} | {pointing_cell(row)} |"
        )
    return "\n".join(lines)


def format_canvas_families(rows: list[dict]) -> str:
    """Accuracy of dense and QGSA by family and canvas, as a Markdown table; a dash for a family without questions."""
    canvases = list(dict.fromkeys(row["canvas"] for row in rows))
    found = {(row["canvas"], row["system"]): row["by_family"] for row in rows}
    lines = [f"| family: dense → qgsa | {' | '.join(canvases)} |", "|---" * (1 + len(canvases)) + "|"]
    for family in FAMILIES:
        pairs = [[found[canvas, system].get(family) for system in ("dense", "qgsa")] for canvas in canvases]
        cells = [" → ".join("–" if each is None else f"{each['accuracy']:.1%}" for each in pair) for pair in pairs]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    run = parse(CanvasesArguments, __doc__)
    with errors_in_one_line():
        base_model = base_model_of(run.model, run.base_model)
        model = load_model(run.model)
        dense, processor = load_dense(base_model)
        systems = choose_systems(run.systems, dense, model)
        questions = {
            name: Cards(run.eval_split, run.test_size, canvases=[parse_canvas(name)]) for name in run.canvases
        }
    output = Path(run.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    rows = rows_by_canvas(systems, questions, processor)
    name = "canvases_cards.json" if run.eval_split == "test" else f"canvases_cards_{run.eval_split}.json"
    write_results(output / name, "demo", "cards", run.test_size, 0, rows, run.eval_split)
    print(f"{format_canvases(rows)}\n\n{format_canvas_families(rows)}")


if __name__ == "__main__":
    main()
