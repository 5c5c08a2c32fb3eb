"""Rows of `results.json`: every system graded on the same questions and paired with dense."""

from collections import Counter, defaultdict
from functools import partial
from statistics import median

import numpy as np
import torch
from tqdm.auto import trange

from modeling_qgsa.layout_qgsa import VisualLayout
from training.costs.counter import count_flops
from training.data.sets import get_dataset
from training.evaluation.answers import Answers, answer, selection_options, show
from training.evaluation.systems import System
from training.metrics.loyalty.loyalty import loyalty_metric
from training.metrics.selection.selection import points_into, selection_metric


def bootstrap_interval(values: np.ndarray, seed: int = 0, draws: int = 2000) -> list[float]:
    """95 % bootstrap interval `[low, high]` of the mean of `values` `(n,)`; paired if these are differences."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def make_row(name: str, answers: Answers, samples: list[dict], grades: np.ndarray, dense: np.ndarray) -> dict:
    """One row of `results.json`; `grades` and those of `dense` are `(n,)`, 0 to 1, of the same questions."""
    families = np.array([sample["family"] for sample in samples])
    row = {
        "system": name,
        "visual_tokens_mean": float(np.mean(answers.visual_tokens)),
        "tiles_mean": float(np.mean(answers.tiles)),
        "visual_tokens_counts": {str(k): n for k, n in sorted(Counter(answers.visual_tokens).items())},
        "accuracy": float(grades.mean()),
        "accuracy_ci95": bootstrap_interval(grades),
        "delta_vs_dense_pp": float(100 * (grades - dense).mean()),
        "delta_ci95": bootstrap_interval(100 * (grades - dense)),
        "by_family": {
            family: {
                "n": int((families == family).sum()),
                "accuracy": float(grades[families == family].mean()),
                "visual_tokens_mean": float(np.array(answers.visual_tokens)[families == family].mean()),
                "tiles_mean": float(np.array(answers.tiles)[families == family].mean()),
            }
            for family in sorted(set(families))
        },
        "grounding": grounding_of(answers, samples),
        "vision_share_mean": float(np.mean(answers.vision_shares)),
        "seconds_median": median(answers.seconds),
    }
    return row


def grounding_of(answers: Answers, samples: list[dict]) -> dict:
    """How well the selector points, on questions with boxes; {} without such questions or without a selector.

    `pointing_accuracy_one_tile` is over the `n` questions that need exactly one tile.
    """
    found = selection_metric(
        answers.visual_tokens, answers.tiles, answers.relevance, [sample["boxes"] for sample in samples]
    )
    if not found["n_pointed"]:
        return {}
    names = ("pointing_accuracy", "relevance_in_boxes", "n_pointed")
    grounding = {name: found[name] for name in names}
    one = [
        points_into(relevance, sample["boxes"])
        for relevance, sample in zip(answers.relevance, samples)
        if sample["tiles_needed"] == "one"
    ]
    return grounding | ({"pointing_accuracy_one_tile": float(np.mean(one)), "n": len(one)} if one else {})


def grade_answers(grading: str, everything: list[Answers], samples: list[dict]) -> np.ndarray:
    """Grades of all systems, `(systems, n)` float, 0 to 1, by the rules of the data set `grading`."""
    dataset = get_dataset(grading)
    return np.array([dataset.grade_all(answers.predictions, samples) for answers in everything])


def evaluate_systems(
    systems: list[System],
    dataset,
    processor,
    batch_size: int,
    max_new_tokens: int,
    seed: int = 0,
    grading: str = "cards",
    share_features: bool = False,
) -> list[dict]:
    """Rows of `results.json` for `systems`; the first one is dense, which all are paired with.

    `grading` names the data set by whose rules answers are graded. Its own metric becomes a row's `scores`; the
    `loyalty` of a system is how often it answers as dense does.
    """
    everything, samples = answer(systems, dataset, processor, batch_size, max_new_tokens, seed, share_features)
    return compare(systems, everything, samples, grading)


def compare(systems: list[System], everything: list[Answers], samples: list[dict], grading: str) -> list[dict]:
    """Rows of `results.json` for the answers of some systems, see `evaluate_systems`."""
    grades, rows = grade_answers(grading, everything, samples), []
    for system, answers, own in zip(systems, everything, grades):
        row = make_row(system.name, answers, samples, own, grades[0])
        row["speedup_vs_dense"] = (rows[0] if rows else row)["seconds_median"] / row["seconds_median"]
        row["scores"] = get_dataset(grading).metric(answers.predictions, samples, answers.kept)
        if any(answers.by_guide):
            row["answered_by_guide"] = float(np.mean(answers.by_guide))
        row["loyalty"] = loyalty_metric(answers.predictions, everything[0].predictions, own, grades[0])
        rows.append(row)
    return rows


def add_flops(rows: list[dict], systems: list[System], dataset, processor, max_new_tokens: int, questions: int = 8):
    """Add to each row the mean FLOPs of the first `questions` of `dataset`, asked one at a time, as `flops`.

    The cross-modal attention of QGSA's own table is not measured here: None.
    """
    # One random stream per method: a new method changes no other's numbers.
    generators = defaultdict(lambda: torch.Generator().manual_seed(0))
    for row, system in zip(rows, systems):
        counts = []
        for index in trange(min(questions, len(dataset)), desc=f"FLOPs of {system.name}", leave=False):
            inputs = show(system, [dataset[index]], processor)
            inputs = {name: value.to(system.model.device) for name, value in inputs.items()}
            layout = VisualLayout.of(system.model.config, inputs["input_ids"])
            options = partial(selection_options, system, inputs, layout, generators[system.method])
            counts.append(count_flops(system.model, inputs, max_new_tokens, options, uncounted_modules(system)))
        row["flops"] = {part: float(np.mean([count[part] for count in counts])) for part in counts[0]}
        row["flops"]["cross_modal_attention"] = None


def uncounted_modules(system: System) -> tuple:
    """Modules excluded from the FLOP count: they run but do not influence the selection."""
    if system.method is None:
        return ()
    inner = system.model.model
    return inner.selector, inner.complexity_estimator
