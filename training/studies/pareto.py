"""Accuracy against cost on cards: QGSA, its variants and every method of `training/methods` at equal k.

    python training/studies/pareto.py --model outputs/demo --blocks_model outputs/demo_blocks

All systems that prune share the text model of one checkpoint, trained to read few tokens; the comparison is about the
tokens that they keep. Tiles are encoded once for all systems, so seconds mean nothing here (`training/benchmark.py`
measures time); FLOPs are counted with every system on its own. Writes `pareto_cards.json`, the table and a plot.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib import pyplot as plt

from training.cli.arguments import errors_in_one_line, parse
from training.data.cards import Cards
from training.evaluation.report import on_front, write_results
from training.evaluation.rows import add_flops, evaluate_systems
from training.evaluation.systems import DENSE, System
from training.methods import METHODS
from training.studies.checkpoints import RENAMED, base_model_of, load_dense, load_model


BUDGETS = {8: 1, 17: 1, 32: 3, 64: 8}  # tiles per number of tokens, for systems that choose tiles


@dataclass
class ParetoArguments:
    """Models to compare, and the number of questions."""

    model: str = field(default="outputs/demo", metadata={"help": "QGSA checkpoint, trained on cards."})
    blocks_model: str | None = field(
        default=None, metadata={"help": "The same with adapters for blocks; --model by default."}
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "Dense checkpoint that they are made from; by default as in --model's run.json."},
    )
    eval_split: str = field(default="test", metadata={"help": "Questions to ask: test or validation."})
    test_size: int = field(default=2000, metadata={"help": "Number of questions."})
    flops_questions: int = field(default=100, metadata={"help": "Number of questions whose FLOPs are counted."})
    output_dir: str = field(default="outputs/pareto", metadata={"help": "Folder for results and plot."})


def spend(tiles: int, tokens: int, selection: str) -> dict:
    """Options that spend (m, k) on every question."""
    fixed = {"min_tiles": tiles, "max_tiles": tiles, "min_visual_tokens": tokens, "max_visual_tokens": tokens}
    return {"selection": selection} | fixed


def make_systems(dense, model, blocks) -> list[System]:
    """Dense and its cheaper settings, QGSA with its own budgets, then every method and QGSA at each k."""
    half = {"size": {"longest_edge": 128}}
    systems = [
        System("dense", dense, DENSE),
        System("dense-half-resolution", dense, DENSE, image_kwargs=half),
        System("dense-global-only", dense, DENSE, image_kwargs={"do_image_splitting": False}),
        System("blank-image", dense, DENSE, blank=True),
        System("qgsa", model, {"selection": "before_encoder"}),
        System("qgsa-blocks", blocks, {"selection": "blocks"}),
    ]
    for tokens, tiles in BUDGETS.items():
        for name, method in METHODS.items():
            systems.append(System(f"{name}, k = {tokens}", model, spend(tiles, tokens, method.selection), method))
        for name, pruned, selection in (
            ("qgsa-after-encoder", model, "after_encoder"),
            ("qgsa", model, "before_encoder"),
            ("qgsa-blocks", blocks, "blocks"),
        ):
            systems.append(System(f"{name}, k = {tokens}", pruned, spend(tiles, tokens, selection)))
    return systems


def pareto_front(rows: list[dict]) -> set[str]:
    """Names of the rows that no other row beats: as accurate for less, or more accurate for as much."""
    best = on_front([(row["flops"]["total"], row["accuracy"]) for row in rows])
    return {row["system"] for row, unbeaten in zip(rows, best) if unbeaten}


def format_pareto(rows: list[dict]) -> str:
    """The rows as a Markdown table; those on the Pareto front are bold."""
    front = pareto_front(rows)
    lines = [
        "| system | Δ to dense, pp [95 %] | tokens k | tiles m | GFLOPs: vision | prefill | total |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["delta_ci95"]
        name = f"**{row['system']}**" if row["system"] in front else row["system"]
        flops = {part: value / 1e9 for part, value in row["flops"].items() if value is not None}
        lines.append(
            f"| {name} | {row['delta_vs_dense_pp']:+.1f} [{low:+.1f}, {high:+.1f}] | {row['visual_tokens_mean']:.1f} "
            f"| {row['tiles_mean']:.2f} | {flops['vision']:.3f} | {flops['prefill']:.3f} | {flops['total']:.3f} |"
        )
    return "\n".join(lines)


def plot_pareto(rows: list[dict], path: Path):
    """Plot Δ to dense against the FLOPs of an answer, one line per method."""
    figure, axes = plt.subplots(figsize=(7.5, 4.8))
    axes.set_prop_cycle(color=plt.cm.tab20.colors)
    names = dict.fromkeys(row["system"].partition(", k")[0] for row in rows)
    for name in names:
        line = [row for row in rows if row["system"].startswith(f"{name}, k")]
        line = sorted((row["flops"]["total"] / 1e9, row["delta_vs_dense_pp"]) for row in line)
        ours = name.startswith("qgsa") and name != "qgsa-after-encoder"
        if line:
            axes.plot(*zip(*line), marker="o", label=name, linewidth=2.5 if ours else 1, alpha=1 if ours else 0.7)
    for name in names:  # no fixed k: dense, its cheaper settings, and QGSA with its own budgets
        for row in (row for row in rows if row["system"] == name):
            label = f"{name}, own budgets" if name.startswith("qgsa") else name
            axes.plot(row["flops"]["total"] / 1e9, row["delta_vs_dense_pp"], marker="*", ls="", ms=11, label=label)
    axes.set_xscale("log")
    axes.set_xticks([0.2, 0.3, 0.5, 0.8, 1.2, 2], ["0.2", "0.3", "0.5", "0.8", "1.2", "2"])
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("GFLOPs of an answer, encoder included")
    axes.set_ylabel("Δ to dense, pp")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def check_same_encoder(dense, model, names: tuple[str, str]):
    """Raise ValueError unless both models, called `names`, have the same vision encoder: features are shared."""
    own = model.model.vision_model.state_dict()
    for weight, value in dense.model.vision_model.state_dict().items():
        if not torch.equal(value, own[weight]):
            raise ValueError(f"base_model ({names[0]}): its encoder differs from that of model {names[1]} in {weight}")


def main():
    run = parse(ParetoArguments, __doc__, RENAMED)
    with errors_in_one_line():
        base_model = base_model_of(run.model, run.base_model)
        model = load_model(run.model)
        blocks = load_model(run.blocks_model) if run.blocks_model else model
        dense, processor = load_dense(base_model)
        check_same_encoder(dense, model, (base_model, run.model))
        questions = Cards(run.eval_split, run.test_size)
    output = Path(run.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    systems = make_systems(dense, model, blocks)
    rows = evaluate_systems(systems, questions, processor, 50, max_new_tokens=8, share_features=True)
    add_flops(rows, systems, questions, processor, max_new_tokens=8, questions=run.flops_questions)
    for row in rows:  # meaningless with shared features
        del row["seconds_median"], row["speedup_vs_dense"]
    write_results(output / "pareto_cards.json", "demo", "cards", len(questions), 0, rows, run.eval_split)
    plot_pareto(rows, output / "pareto_cards.png")
    print(format_pareto(rows))


if __name__ == "__main__":
    main()
