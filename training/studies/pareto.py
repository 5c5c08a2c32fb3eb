"""Accuracy against cost on cards: QGSA, its variants, four published pruning methods and the controls at equal k.

    python training/studies/pareto.py --checkpoint outputs/demo --blocks_checkpoint outputs/demo_blocks

All that prune use one checkpoint's text model, which was trained to read few tokens; what they are compared by is what
they keep. Tiles are encoded once for all systems, so seconds say nothing here (`training/benchmark.py` times), FLOPs
are counted with every system on its own. Writes `pareto_cards.json`, the table and a plot.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from matplotlib import pyplot as plt

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.cli.arguments import check_source, parse
from training.data.cards import Cards
from training.evaluation.report import write_results
from training.evaluation.systems import DENSE, System, add_flops, evaluate_systems
from training.methods.baselines import centre_scores, random_scores
from training.methods.peers import PEERS


BUDGETS = {8: 1, 17: 1, 32: 3, 64: 8}  # tiles at each number of tokens, for what looks at tiles


@dataclass
class ParetoArguments:
    """What to compare, and on how many questions."""

    checkpoint: str = field(default="outputs/demo", metadata={"help": "QGSA checkpoint, trained on cards."})
    blocks_checkpoint: str | None = field(
        default=None, metadata={"help": "The same with adapters for blocks; the first one without it."}
    )
    base_model: str = field(default="hub_cards/tiny-dense", metadata={"help": "The dense model they were made from."})
    split: str = field(default="test", metadata={"help": "Questions to ask: test or validation."})
    size: int = field(default=2000, metadata={"help": "How many of them."})
    flops_questions: int = field(default=100, metadata={"help": "Of how many the FLOPs are counted."})
    output_dir: str = field(default="outputs/pareto", metadata={"help": "Where results and plot go."})


def spend(tiles: int, tokens: int, selection: str) -> dict:
    """Options that spend (m, k) on every question."""
    fixed = {"min_tiles": tiles, "max_tiles": tiles, "min_visual_tokens": tokens, "max_visual_tokens": tokens}
    return {"selection": selection} | fixed


def systems_of(dense, model, blocks) -> list[System]:
    """Dense and the controls, QGSA with its own budgets, and everything at each k."""
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
        for name, scores in (("random", random_scores), ("centre", centre_scores)):
            options = spend(tiles, tokens, "before_encoder")
            systems.append(System(f"{name}, k = {tokens}", model, options, scores=scores))
        for name, peer in PEERS.items():
            systems.append(System(f"{name}, k = {tokens}", model, spend(16, tokens, "after_encoder"), peer=peer))
        for name, of, selection in (
            ("qgsa-after-encoder", model, "after_encoder"),
            ("qgsa", model, "before_encoder"),
            ("qgsa-blocks", blocks, "blocks"),
        ):
            systems.append(System(f"{name}, k = {tokens}", of, spend(tiles, tokens, selection)))
    return systems


def pareto_front(rows: list[dict]) -> set[str]:
    """Names of the rows that no other is both as accurate as and cheaper than, or as cheap as and more accurate."""

    def beaten(row):
        cost, accuracy = row["flops"]["total"], row["accuracy"]
        return any(
            (other["flops"]["total"] <= cost and other["accuracy"] > accuracy)
            or (other["flops"]["total"] < cost and other["accuracy"] >= accuracy)
            for other in rows
        )

    return {row["system"] for row in rows if not beaten(row)}


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
    """Δ to dense against all FLOPs of an answer, a line a method."""
    figure, axes = plt.subplots(figsize=(7.5, 4.8))
    axes.set_prop_cycle(color=plt.cm.tab20.colors)
    names = dict.fromkeys(row["system"].partition(", k")[0] for row in rows)
    for name in names:
        of = [row for row in rows if row["system"].startswith(f"{name}, k")]
        of = sorted((row["flops"]["total"] / 1e9, row["delta_vs_dense_pp"]) for row in of)
        ours = name.startswith("qgsa") and name != "qgsa-after-encoder"
        if of:
            axes.plot(*zip(*of), marker="o", label=name, linewidth=2.5 if ours else 1, alpha=1 if ours else 0.7)
    for name in names:  # without a fixed k: dense, its cheaper settings, and QGSA with its own budgets
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


def main():
    run = parse(ParetoArguments, __doc__)
    for name in filter(None, (run.checkpoint, run.blocks_checkpoint, run.base_model)):
        check_source(name)
    output = Path(run.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    processor = QGSAProcessor.from_pretrained(run.base_model, backend="pil")
    load = partial(QGSASmolVLMForConditionalGeneration.from_pretrained, dtype="float32")
    model = load(run.checkpoint).eval()
    blocks = load(run.blocks_checkpoint).eval() if run.blocks_checkpoint else model
    dense = QGSASmolVLMForConditionalGeneration.from_dense(run.base_model)
    for name, weight in dense.model.vision_model.state_dict().items():
        if not torch.equal(weight, model.model.vision_model.state_dict()[name]):
            raise ValueError(f"checkpoint {run.checkpoint} has not the encoder of base_model {run.base_model}: {name}")
    systems, questions = systems_of(dense, model, blocks), Cards(run.split, run.size)
    rows = evaluate_systems(systems, questions, processor, 50, max_new_tokens=8, share_features=True)
    add_flops(rows, systems, questions, processor, max_new_tokens=8, questions=run.flops_questions)
    for row in rows:  # of shared features
        del row["seconds_median"], row["speedup_vs_dense"]
    write_results(output / "pareto_cards.json", "demo", "cards", len(questions), 0, rows, run.split)
    plot_pareto(rows, output / "pareto_cards.png")
    print(format_pareto(rows))


if __name__ == "__main__":
    main()
