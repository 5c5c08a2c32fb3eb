"""Evaluation: the same questions to every system, paired with dense, with the controls beside them."""

import time
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from modeling_qgsa.selection_qgsa import read_layout
from training.baselines import centre_scores, random_scores
from training.data.collator import QuestionCollator
from training.flops import count_flops


@dataclass(frozen=True)
class System:
    """One way to answer: a model, what it is shown, and how it selects.

    Args:
        name: as in `results.json`.
        model: a QGSA model, tuned or with the dense checkpoint's own weights.
        options: passed to `generate`.
        scores: makes `visual_token_scores` from the layout and a generator; None leaves them to the selector.
        image_kwargs: image processor options.
        blank: whether the image is replaced by a grey one.
    """

    name: str
    model: object
    options: dict = field(default_factory=dict)
    scores: object = None
    image_kwargs: dict | None = None
    blank: bool = False


DENSE = {"selection": "dense"}


def standard_systems(dense, tuned) -> list[System]:
    """Dense, the controls, and question-guided selection, in the order of the table."""
    return [
        System("dense", dense, DENSE),
        System("dense-tuned", tuned, DENSE),
        System("dense-global-only", dense, DENSE, image_kwargs={"do_image_splitting": False}),
        System("blank-image", dense, DENSE, blank=True),
        System("random", tuned, scores=random_scores),
        System("centre", tuned, scores=centre_scores),
        System("qgsa", tuned),
        System("qgsa-after-encoder", tuned, {"selection": "after_encoder"}),
    ]


@dataclass
class Answers:
    """What a system said of every question, each a list of one entry a question."""

    predictions: list[str] = field(default_factory=list)
    visual_tokens: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    pointed: list[bool | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def answer(
    systems: list[System], dataset, processor, batch_size: int, max_new_tokens: int, seed: int = 0
) -> list[Answers]:
    """Ask every system every question of `dataset` through `generate`, greedily.

    The systems take turns, batch by batch, so that a slow minute of the machine slows them all alike. Seconds are
    those of the model, the batch's divided by its size.
    """
    everything = [Answers() for _ in systems]
    generators = [torch.Generator().manual_seed(seed) for _ in systems]
    with tqdm(total=len(dataset) * len(systems), desc="asking") as progress:
        for start in range(0, len(dataset), batch_size):
            samples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            shown = {}
            for system, answers, generator in zip(systems, everything, generators):
                view = (system.blank, str(system.image_kwargs))
                if view not in shown:
                    shown[view] = show(system, samples, processor)
                ask(system, samples, shown[view], processor, max_new_tokens, generator, answers)
                progress.update(len(samples))
    return everything


def show(system: System, samples: list[dict], processor) -> dict[str, torch.Tensor]:
    """The inputs of `generate` for `samples` as `system` sees them."""
    if system.blank:
        samples = [{**sample, "image": Image.new("RGB", sample["image"].size, (128,) * 3)} for sample in samples]
    return QuestionCollator(processor, with_answer=False, image_kwargs=system.image_kwargs)(samples)


@torch.no_grad()
def ask(
    system: System, samples: list[dict], inputs: dict, processor, max_new_tokens: int, generator, answers: Answers
):
    """Add to `answers` what `system` says of `samples`.

    `pointed` says whether the highest relevance lies in a box the question is about; None where there is no box, or
    where the scores are not the selector's.
    """
    model = system.model.eval()
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    layout = layout_of(model.config, inputs["input_ids"])
    options = options_of(system, layout, generator)
    began = time.perf_counter()
    output = model.generate(
        **inputs, **options, do_sample=False, max_new_tokens=max_new_tokens, return_dict_in_generate=True
    )
    seconds = (time.perf_counter() - began) / len(samples)

    texts = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers.predictions += [text.strip() for text in texts]
    answers.seconds += [seconds] * len(samples)
    if "selection" in output:
        answers.visual_tokens += output.selection.visual_tokens.tolist()
        answers.tiles += output.selection.tiles.tolist()
        answers.pointed += [
            None if system.scores else points_into(output.selection.relevance[row], sample)
            for row, sample in enumerate(samples)
        ]
    else:
        counts = torch.bincount(layout.tile_sample, minlength=len(samples))
        answers.visual_tokens += (counts * layout.tokens_per_tile).tolist()
        answers.tiles += (counts - 1).tolist()
        answers.pointed += [None] * len(samples)


def options_of(system: System, layout, generator) -> dict:
    """What `generate` is given beside the inputs: the options of the system, and its scores where it has some."""
    if system.scores is None:
        return system.options
    return {**system.options, "visual_token_scores": system.scores(layout, generator).to(system.model.device)}


def layout_of(config, input_ids):
    """The layout of the tiles in `input_ids` `(B, L)`, by the markers of a [`QGSAConfig`]."""
    return read_layout(
        input_ids,
        config.tokens_per_tile,
        config.image_token_id,
        config.global_image_token_id,
        config.tile_token_ids,
    )


def points_into(relevance: torch.Tensor, sample: dict) -> bool | None:
    """Whether the centre of the most relevant cell lies in one of the sample's boxes; None where it has none.

    Args:
        relevance: `(rows, columns)` over the whole image.
        sample: with `image` and `boxes`, `[x0, y0, x1, y1]` in px.
    """
    if not sample["boxes"]:
        return None
    row, column = divmod(int(relevance.argmax()), relevance.shape[1])
    x = (column + 0.5) / relevance.shape[1] * sample["image"].width
    y = (row + 0.5) / relevance.shape[0] * sample["image"].height
    return any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in sample["boxes"])


def exact_match(predictions: list[str], references: list[str]) -> np.ndarray:
    """1 where a prediction is the answer but for case and surrounding blanks, `(n,)` float."""
    return np.array([p.strip().lower() == r.strip().lower() for p, r in zip(predictions, references)], float)


def bootstrap_interval(values: np.ndarray, seed: int = 0, draws: int = 2000) -> list[float]:
    """95 % bootstrap interval of the mean of `values` `(n,)`; of paired differences where these are differences."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def make_row(
    name: str, answers: Answers, right: np.ndarray, dense: np.ndarray, families: list[str], needed: list[str]
):
    """One row of `results.json`: `right` and `dense` are `(n,)` of 0 and 1 over the same questions."""
    families, pointed = np.array(families), np.array([point is not None for point in answers.pointed])
    row = {
        "system": name,
        "visual_tokens_mean": float(np.mean(answers.visual_tokens)),
        "tiles_mean": float(np.mean(answers.tiles)),
        "accuracy": float(right.mean()),
        "accuracy_ci95": bootstrap_interval(right),
        "delta_vs_dense_pp": float(100 * (right - dense).mean()),
        "delta_ci95": bootstrap_interval(100 * (right - dense)),
        "by_family": {
            family: {
                "n": int((families == family).sum()),
                "accuracy": float(right[families == family].mean()),
                "visual_tokens_mean": float(np.array(answers.visual_tokens)[families == family].mean()),
                "tiles_mean": float(np.array(answers.tiles)[families == family].mean()),
            }
            for family in sorted(set(families))
        },
        "grounding": {},
        "seconds_median": median(answers.seconds),
    }
    one = pointed & (np.array(needed) == "one")
    if one.any():
        hits = np.array([bool(point) for point in answers.pointed])
        row["grounding"] = {"pointing_accuracy_one_tile": float(hits[one].mean()), "n": int(one.sum())}
    return row


def evaluate_systems(systems: list[System], dataset, processor, batch_size: int, max_new_tokens: int, seed: int = 0):
    """Rows of `results.json` for `systems`, the first of which is the dense one that all are paired with."""
    everything = answer(systems, dataset, processor, batch_size, max_new_tokens, seed)
    samples = (dataset[index] for index in range(len(dataset)))
    known = [(sample["answer"], sample["family"], sample["tiles_needed"]) for sample in samples]
    references, families, needed = zip(*known)
    rows, dense = [], None
    for system, answers in zip(systems, everything):
        right = exact_match(answers.predictions, references)
        dense = right if dense is None else dense
        row = make_row(system.name, answers, right, dense, families, needed)
        row["speedup_vs_dense"] = (rows[0] if rows else row)["seconds_median"] / row["seconds_median"]
        rows.append(row)
    return rows


def add_flops(rows: list[dict], systems: list[System], dataset, processor, max_new_tokens: int, questions: int = 8):
    """Put the mean FLOPs of the first `questions`, asked one at a time, into the rows as `flops`.

    The cross-modal attention of QGSA's own table is not measured here: None.
    """
    generator = torch.Generator().manual_seed(0)
    for row, system in zip(rows, systems):
        counts = []
        for index in range(min(questions, len(dataset))):
            inputs = show(system, [dataset[index]], processor)
            inputs = {name: value.to(system.model.device) for name, value in inputs.items()}
            options = options_of(system, layout_of(system.model.config, inputs["input_ids"]), generator)
            counts.append(count_flops(system.model, inputs, max_new_tokens, **options))
        row["flops"] = {part: float(np.mean([count[part] for count in counts])) for part in counts[0]}
        row["flops"]["cross_modal_attention"] = None
