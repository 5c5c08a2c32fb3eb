"""Model cards, filled from results: nothing stands in them that is not in a results file, or in the checkpoint.

    python training/model_card.py

writes the committed cards anew from hub_cards/results: those of 256M, 500M and the tiny one.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from modeling_qgsa import QGSAConfig
from training.costs.environment import describe_environment
from training.costs.formula import selector_flops, vision_flops
from training.costs.speed_report import format_speed
from training.evaluation.report import format_families, format_table


HUB_CARDS = Path(__file__).resolve().parents[1] / "hub_cards"
PARTS = ("vision", "prefill", "decode", "total")
RESULTS_FIELDS = {"dataset", "split", "n", "environment", "rows"}
SCORED_BY = {  # see training/evaluation/grading.py
    "cards": "exact match",
    "vqa_rad": "exact match, closed questions by whole words",
    "aokvqa": "the choice that is named, or min(1, matches / 3) over ten annotators",
    "refcoco": "boxes with an IoU of at least 0.5",
}


@dataclass
class CardContent:
    """What a card is made of.

    Args:
        name: of the model.
        repo_id: Hub id or folder that the card's lines load.
        made_from: the dense checkpoint.
        base_model: its Hub id; None where it has none.
        budgets: what the checkpoint's config says of them, in words.
        command: what trains it.
        selector_cost: FLOPs of the selector for a question, as a share of one tile's.
        trained: whether its selector is.
        parameters: how many weights, told of the tiny stand-in; None for others.
        accuracy: a results file of a run, with its controls; None where nothing was measured.
        speed: a results file of `training/benchmark.py` of this architecture; None where there is none.
        flops: rows of an answer's FLOPs by part; None for those of `accuracy`.
        picture: path of the figure of selections, as seen from the card; None where there is none.
    """

    name: str
    repo_id: str
    made_from: str
    base_model: str | None
    budgets: str
    command: str
    selector_cost: float
    trained: bool
    parameters: int | None = None
    accuracy: dict | None = None
    speed: dict | None = None
    flops: list[dict] | None = None
    picture: str | None = None


def budgets_in_words(config) -> str:
    """The budgets of a [`QGSAConfig`] in words."""
    return (
        f"{config.min_tiles} to {config.max_tiles} tiles and {config.min_visual_tokens} to "
        f"{config.max_visual_tokens} visual tokens an image, by the estimated complexity of the question"
    )


def selector_share(config) -> float:
    """FLOPs of the selector and the estimator for a question of 20 tokens and two tiles, as a share of a tile's."""
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return selector_flops(config, 20, 3) / vision_flops(config, [patches])


def render_card(content: CardContent) -> ModelCard:
    """The card, with `model-index` metadata of what was measured and of nothing else.

    Raises ValueError for results that lack something, and for those of a data set that has no rule of what is right.
    """
    accuracy, speed = content.accuracy, content.speed
    lacking = RESULTS_FIELDS - set(accuracy or RESULTS_FIELDS)
    if lacking:
        raise ValueError(f"results lack {', '.join(sorted(lacking))}: evaluate anew (--task evaluate)")
    if accuracy and accuracy["dataset"] not in SCORED_BY:
        raise ValueError(f"results are of {accuracy['dataset']!r}: cards are of {', '.join(SCORED_BY)}")
    rows = accuracy["rows"] if accuracy else []
    qgsa = next((row for row in rows if row["system"] == "qgsa"), None)
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["qgsa", "smolvlm", "custom_code", "visual-question-answering", "efficient-inference"],
        base_model=content.base_model,
        metrics=["accuracy"] if qgsa else None,
        model_name=content.name,
        eval_results=eval_results(accuracy, qgsa) if qgsa else None,
    )
    flops = content.flops or [row for row in rows if row.get("flops")]
    return ModelCard.from_template(
        data,
        template_path=str(HUB_CARDS / "card_template.md"),
        repo_id=content.repo_id,
        made_from=content.made_from,
        budgets=content.budgets,
        command=content.command,
        picture=content.picture,
        title=content.name,
        tiny=content.parameters is not None,
        trained=content.trained,
        selector_cost=f"{content.selector_cost:.1%}",
        scored_by=SCORED_BY[accuracy["dataset"]] if accuracy else None,
        parameters=None if content.parameters is None else f"{content.parameters:,}",
        accuracy=accuracy,
        environment=accuracy and describe_environment(accuracy["environment"]),
        table=format_table(rows),
        families=format_families(rows) if qgsa else None,
        flops_table=format_flops(flops) if flops else None,
        flops_note=FLOPS_BY_FORMULA
        if content.flops
        else "Means of the first questions (8; with random weights one), batch 1: other budgets cost otherwise.",
        speed=speed,
        environment_of_speed=speed and describe_environment(speed["environment"]),
        speed_table=speed and format_speed(speed["rows"], 2048),
        kept_table=format_kept(qgsa) if qgsa and "visual_tokens_counts" in qgsa else None,
        dense_tokens=f"{rows[0]['visual_tokens_mean']:g}" if rows else None,
    )


FLOPS_BY_FORMULA = (
    "By formula, for 4 x 4 tiles, 20 words of question, 8 new tokens and k = 17; tests hold it to the counter."
)


def eval_results(accuracy: dict, qgsa: dict) -> list[EvalResult]:
    """What `model-index` says of the row `qgsa` of a results file."""
    split = accuracy["split"]
    measured = {
        "accuracy": (f"Accuracy ({SCORED_BY[accuracy['dataset']]})", qgsa["accuracy"]),
        "delta_vs_dense_pp": ("Difference to dense, percentage points", qgsa["delta_vs_dense_pp"]),
        "visual_tokens_mean": ("Visual tokens kept, mean", qgsa["visual_tokens_mean"]),
        "tiles_mean": ("High-resolution tiles encoded, mean", qgsa["tiles_mean"]),
    }
    return [
        EvalResult(
            task_type="image-text-to-text",
            task_name="Visual question answering",
            dataset_type=accuracy["dataset"],
            dataset_name=f"{accuracy['dataset']} ({split}, n = {accuracy['n']})",
            dataset_split=split,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, (name, value) in measured.items()
    ]


def format_flops(rows: list[dict]) -> str:
    """GFLOPs of an answer by part, as a Markdown table."""
    lines = ["| system | tokens k | GFLOPs: " + " | ".join(PARTS) + " |", "|---" * (len(PARTS) + 2) + "|"]
    for row in rows:
        flops = " | ".join(f"{row['flops'][part] / 1e9:.3f}" for part in PARTS)
        lines.append(f"| {row['system']} | {row['visual_tokens_mean']:.1f} | {flops} |")
    return "\n".join(lines)


def format_kept(row: dict) -> str:
    """How many questions got how many visual tokens, as a Markdown table."""
    counts = {int(tokens): count for tokens, count in row["visual_tokens_counts"].items()}
    total = sum(counts.values())
    lines = ["| tokens k | questions | share |", "|---|---|---|"]
    lines += [f"| {tokens} | {counts[tokens]} | {counts[tokens] / total:.1%} |" for tokens in sorted(counts)]
    return "\n".join(lines)


def count_parameters(folder: Path) -> int:
    """Weights in the `model.safetensors` of a folder."""
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())


def write_card(folder: Path, content: CardContent):
    """Write the card of `content` as `README.md` of `folder`."""
    (folder / "README.md").write_text(str(render_card(content)) + "\n")


def of_architecture(size: str) -> QGSAConfig:
    """What costs depend on, of SmolVLM-256M (`size` 256m) or 500M: tests hold it to the published config."""
    width, heads, layers = {"256m": (576, 9, 30), "500m": (960, 15, 32)}[size]
    text = {"model_type": "llama", "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    vision = {"image_size": 512, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072}
    vision |= {"num_hidden_layers": 12, "num_attention_heads": 12}
    return QGSAConfig(text_config=text, vision_config=vision, scale_factor=4)


def committed_cards() -> dict[Path, CardContent]:
    """The cards of this repository, by where they lie."""
    results = {path.stem: json.loads(path.read_text()) for path in (HUB_CARDS / "results").glob("*.json")}
    tiny = QGSAConfig.from_pretrained(HUB_CARDS / "tiny-qgsa")
    cards = {
        HUB_CARDS / "tiny-qgsa" / "README.md": CardContent(
            name="qgsa-smolvlm-tiny",
            repo_id="org/qgsa-smolvlm-tiny",
            made_from="hub_cards/tiny-dense",
            base_model=None,
            budgets=budgets_in_words(tiny),
            command="python training/run_qgsa.py --preset demo",
            selector_cost=selector_share(tiny),
            trained=True,
            parameters=count_parameters(HUB_CARDS / "tiny-qgsa"),
            accuracy=results["cards"],
            picture="../results/cards_selections.png",
        )
    }
    for size in ("256m", "500m"):
        base = f"HuggingFaceTB/SmolVLM-{size.upper()}-Instruct"
        config = of_architecture(size)
        cards[HUB_CARDS / f"qgsa-smolvlm-{size}.md"] = CardContent(
            name=f"qgsa-smolvlm-{size}",
            repo_id=f"org/qgsa-smolvlm-{size}",
            made_from=base,
            base_model=base,
            budgets=budgets_in_words(config),
            command=f"python training/run_qgsa.py --preset vqa_rad_{size}",
            selector_cost=selector_share(config),
            trained=False,
            picture="results/cards_selections.png",
            speed=results[f"speed_{size}_cpu"],
            flops=results["flops"]["answers"][f"smolvlm-{size}-instruct"],
        )
    return cards


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path, content in committed_cards().items():
        path.write_text(str(render_card(content)) + "\n")
        print(path.relative_to(HUB_CARDS.parent))
