"""Model cards, filled from results: every number comes from a results file or from the checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from training.costs.environment import describe_environment, environment
from training.costs.formula import attention_pointer_flops, selector_flops, vision_flops
from training.costs.speed_report import format_speed
from training.data.sets import get_dataset
from training.evaluation.report import format_families, format_table


TEMPLATES = Path(__file__).resolve().parent / "templates"
PARTS = ("vision", "prefill", "decode", "total")
RESULTS_FIELDS = {"dataset", "split", "n", "environment", "rows"}
FLOPS_BY_FORMULA = (
    "By formula, for an image of 4 x 4 tiles, a question of 20 tokens, 8 new tokens and k = 17. Tests compare the "
    "formula with counted FLOPs."
)
FLOPS_COUNTED = (
    "Means over the first 8 questions (one with random weights), batch size 1; with other budgets they differ."
)


@dataclass
class CardContent:
    """Content of a model card.

    Args:
        name: name of the model.
        repo_id: Hub id or folder from which the code example loads the model.
        made_from: dense checkpoint that the model was made from.
        base_model: Hub id of that checkpoint; None if it has none.
        budgets: budgets of the checkpoint in words, see `budgets_in_words`.
        command: command that trains the model.
        pointer_cost: FLOPs of the pointer as a share of those of one tile, see `pointer_share`.
        trained: whether the trained selector points, rather than the text model's attention.
        parameters: number of parameters, given for the tiny stand-in only.
        accuracy: results of an evaluation with its controls (`results.json`); None if nothing was measured.
        speed: results of `training/benchmark.py` for this architecture; None if there are none.
        depth: results of `training/studies/depth_speed.py` for this architecture; None if there are none.
        flops: rows with the FLOPs of an answer by part; None for those in `accuracy`.
        picture: path of the figure of selections, relative to the card; None if there is none.
        calibration: what calibration measured, `config.calibration`; None without it.
    """

    name: str
    repo_id: str
    made_from: str
    base_model: str | None
    budgets: str
    command: str
    pointer_cost: float
    trained: bool
    parameters: int | None = None
    accuracy: dict | None = None
    speed: dict | None = None
    depth: dict | None = None
    flops: list[dict] | None = None
    picture: str | None = None
    calibration: dict | None = None


def budgets_in_words(config) -> str:
    """The budgets of a [`QGSAConfig`] in words."""
    if config.pointer == "attention" and config.attention_coverage == 1:
        return f"{config.max_tiles} tiles and {config.max_visual_tokens} visual tokens per image"
    return (
        f"{config.min_tiles} to {config.max_tiles} tiles and {config.min_visual_tokens} to "
        f"{config.max_visual_tokens} visual tokens per image, depending on the estimated complexity of the question"
    )


def pointer_share(config) -> float:
    """FLOPs of the pointer, the selector and its estimator or the attention pass, as a share of those of one tile.

    They are taken for a question of 20 tokens in a prompt of 43 without images, and two high-resolution tiles.
    """
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    if config.pointer == "attention":
        spent = attention_pointer_flops(config, 43 + config.tokens_per_tile, 20)
    else:
        spent = selector_flops(config, 20, 3)
    return spent / vision_flops(config, [patches])


def run_content(folder: Path, config, results: dict, base_model: str, command: str) -> CardContent:
    """Content of the card of a trained and evaluated run.

    Args:
        folder: output folder of the run.
        config: [`QGSAConfig`] of its checkpoint.
        results: its `results.json`.
        base_model: Hub id or folder of the dense checkpoint that the run started from.
        command: command of the run.
    """
    picture = "figures/selections.png"
    return CardContent(
        name=f"qgsa-{results['preset']}",
        repo_id=str(folder),
        made_from=base_model,
        base_model=None if Path(base_model).exists() else base_model,
        budgets=budgets_in_words(config),
        command=command,
        pointer_cost=pointer_share(config),
        trained=config.pointer == "selector",
        calibration=config.calibration,
        accuracy=results,
        picture=picture if (folder / picture).exists() else None,
    )


def check_results(results: dict):
    """Raises ValueError if a results file lacks a field that cards need, or has a data set without a grading rule."""
    missing = sorted(RESULTS_FIELDS - set(results))
    if missing:
        raise ValueError(f"results ({', '.join(missing)}): missing; evaluate again with --task evaluate")
    get_dataset(results["dataset"])


def render_card(content: CardContent) -> ModelCard:
    """The model card, with `model-index` metadata for everything that was measured and nothing else.

    Raises ValueError for results that `check_results` refuses.
    """
    accuracy, speed = content.accuracy, content.speed
    if accuracy:
        check_results(accuracy)
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
        template_path=str(TEMPLATES / "card.md"),
        repo_id=content.repo_id,
        made_from=content.made_from,
        budgets=content.budgets,
        command=content.command,
        picture=content.picture,
        title=content.name,
        tiny=content.parameters is not None,
        trained=content.trained,
        calibration=content.calibration,
        pointer_cost=f"{content.pointer_cost:.1%}",
        graded_by=get_dataset(accuracy["dataset"]).graded_by if accuracy else None,
        parameters=None if content.parameters is None else f"{content.parameters:,}",
        accuracy=accuracy,
        environment=accuracy and describe_environment(accuracy["environment"]),
        table=format_table(rows),
        families=format_families(rows) if qgsa else None,
        flops_table=format_flops(flops) if flops else None,
        flops_note=FLOPS_BY_FORMULA if content.flops else FLOPS_COUNTED,
        speed=speed,
        environment_of_speed=speed and describe_environment(speed["environment"]),
        speed_table=speed and format_speed(speed["rows"], 2048),
        depth_environment=content.depth and describe_environment(content.depth["environment"]),
        depth_table=content.depth and format_depth(content.depth["rows"]),
        kept_table=format_kept(qgsa) if qgsa and "visual_tokens_counts" in qgsa else None,
        dense_tokens=f"{rows[0]['visual_tokens_mean']:g}" if rows else None,
    )


def eval_results(accuracy: dict, qgsa: dict) -> list[EvalResult]:
    """The `model-index` entries for the row `qgsa` of the results `accuracy`."""
    split = accuracy["split"]
    measured = {
        "accuracy": (f"Accuracy ({get_dataset(accuracy['dataset']).graded_by})", qgsa["accuracy"]),
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


def format_depth(rows: list[dict]) -> str:
    """Seconds and bytes by schedule of the text model's layers, for one question, as a Markdown table."""
    lines = ["| layers | visual tokens | prefill, s | per token, s | KV-cache, MB |", "|---|---|---|---|---|"]
    for row in rows:
        if row.get("batch_size") == 1:
            seconds = f"{row['prefill']:.2f} | {row['per_token']:.3f}"
            tokens, held = row["visual_tokens_mean"], row["kv_cache_bytes"] / 1e6
            lines.append(f"| {row['system']} | {tokens} | {seconds} | {held:.1f} |")
    return "\n".join(lines)


def format_kept(row: dict) -> str:
    """Number of questions by number of visual tokens kept, as a Markdown table."""
    counts = {int(tokens): count for tokens, count in row["visual_tokens_counts"].items()}
    total = sum(counts.values())
    lines = ["| tokens k | questions | share |", "|---|---|---|"]
    lines += [f"| {tokens} | {counts[tokens]} | {counts[tokens] / total:.1%} |" for tokens in sorted(counts)]
    return "\n".join(lines)


def write_card(folder: Path, content: CardContent):
    """Write the card as `README.md` of `folder`."""
    (folder / "README.md").write_text(f"{render_card(content)}\n")


def format_needs(row: dict, n: int, needed: dict[str, str]) -> str:
    """Accuracy by family, by number of tiles needed, and of all `n` questions, as a Markdown table.

    Args:
        row: row of a results file.
        needed: number of high-resolution tiles that each family needs: "none", "one" or "many".
    """
    lines = ["| family | tiles needed | n | accuracy |", "|---|---|---|---|"]
    for family, graded in row["by_family"].items():
        lines.append(f"| {family} | {needed[family]} | {graded['n']} | {graded['accuracy']:.1%} |")
    for tiles in ("none", "one", "many"):
        families = [graded for family, graded in row["by_family"].items() if needed[family] == tiles]
        if not families:
            continue
        count = sum(graded["n"] for graded in families)
        right = sum(graded["n"] * graded["accuracy"] for graded in families)
        lines.append(f"| **all that need {tiles}** | {tiles} | {count} | **{right / max(count, 1):.1%}** |")
    lines.append(f"| **all** | | {n} | **{row['accuracy']:.1%}** |")
    return "\n".join(lines)


def render_dense_card(
    name: str, parameters: int, n: int, row: dict, needed: dict[str, str], command: str, measured_in: dict[str, str]
) -> str:
    """The card of a tiny dense model.

    Args:
        parameters: number of parameters.
        n, row, needed: as in `format_needs`.
        command: command that trained the model.
        measured_in: the `environment` of that run.
    """
    return (
        (TEMPLATES / "dense_card.md")
        .read_text()
        .format(
            name=name,
            parameters=parameters,
            n=n,
            families=format_needs(row, n, needed),
            command=command,
            environment=describe_environment(measured_in),
        )
    )


def write_dense_card(
    folder: Path, name: str, parameters: int, n: int, row: dict, needed: dict[str, str], command: str
) -> str:
    """Write the card of a tiny dense model, see `render_dense_card`, as `README.md` of `folder`.

    Returns its table of families.
    """
    card = render_dense_card(name, parameters, n, row, needed, command, environment())
    (folder / "README.md").write_text(card)
    return format_needs(row, n, needed)
