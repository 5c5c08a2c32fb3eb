"""Evaluation: the same questions to every system, paired with dense, with the controls beside them."""

import time
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from statistics import median

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm, trange

from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.processing_qgsa import kept_maps
from modeling_qgsa.selection_qgsa import read_layout
from modeling_qgsa.vision_qgsa import Views
from training.costs.counter import count_flops
from training.data.collator import QuestionCollator
from training.data.dataset import without_image
from training.data.sets import get_dataset
from training.methods.baselines import centre_scores, random_scores
from training.metrics.loyalty.loyalty import loyalty_metric
from training.metrics.selection.selection import points_into, selection_metric


@dataclass(frozen=True)
class System:
    """One way to answer: a model, what it is shown, and how it selects.

    Args:
        name: as in `results.json`.
        model: a QGSA model, tuned or with the dense checkpoint's own weights.
        options: passed to `generate`.
        scores: makes `visual_token_scores` from the layout and a generator; None leaves them to the selector.
        peer: a method of `training/methods/peers.py`, whose budget is `max_visual_tokens` of the options.
        image_kwargs: image processor options.
        blank: whether the image is replaced by a grey one.
    """

    name: str
    model: object
    options: dict = field(default_factory=dict)
    scores: object = None
    peer: object = None
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
    """What a system said of every question, each a list of one entry a question.

    `relevance` holds maps, `(rows, columns)` in lists, where the scores are the selector's, and [] elsewhere; `kept`
    the regions kept of the image, boxes `[x0, y0, x1, y1]` in shares of its sides.
    """

    predictions: list[str] = field(default_factory=list)
    visual_tokens: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    relevance: list[list] = field(default_factory=list)
    kept: list[list] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: list["Answers"]) -> "Answers":
        """The answers of all parts, one after the other."""
        return cls(*([value for part in parts for value in getattr(part, each.name)] for each in fields(cls)))


def answer(
    systems: list[System],
    dataset,
    processor,
    batch_size: int,
    max_new_tokens: int,
    seed: int = 0,
    share_features: bool = False,
) -> tuple[list[Answers], list[dict]]:
    """Ask every system every question of `dataset` through `generate`, greedily.

    The systems take turns, batch by batch, so that a slow minute of the machine slows them all alike. Several
    processes share the batches, and each gets the answers to all of them. Seconds are those of the model, the batch's
    divided by its size. With `share_features` the first system's model encodes every tile once for all systems that
    encode whole tiles: answers are the same where their encoders are, seconds are not.

    Returns the answers of each system, and the samples that were asked, see `without_image`.
    """
    state, chunks = PartialState(), []
    starts = range(0, len(dataset), batch_size)[state.process_index :: state.num_processes]
    with tqdm(total=len(starts) * len(systems), desc="asking", disable=not state.is_main_process) as progress:
        for start in starts:
            samples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            shown, said = {}, [Answers() for _ in systems]
            for system, answers in zip(systems, said):
                view = (system.blank, str(system.image_kwargs))
                if view not in shown:
                    shown[view] = show(system, samples, processor)
                    if share_features and not system.blank:
                        shown[view]["image_hidden_states"] = encode_all(systems[0].model, shown[view])
                # By the batch and not by what came before: a share of the batches has the scores that all have.
                generator = torch.Generator().manual_seed(seed + start)
                ask(system, samples, shown[view], processor, max_new_tokens, generator, answers)
                progress.update()
            chunks.append((start, said, [without_image(sample) for sample in samples]))
    chunks = sorted(gather_object(chunks), key=lambda chunk: chunk[0])
    everything = [Answers.joined([said[number] for _, said, _ in chunks]) for number in range(len(systems))]
    return everything, [sample for _, _, told in chunks for sample in told]


def show(system: System, samples: list[dict], processor) -> dict[str, torch.Tensor]:
    """The inputs of `generate` for `samples` as `system` sees them."""
    if system.blank:
        samples = [{**sample, "image": Image.new("RGB", sample["image"].size, (128,) * 3)} for sample in samples]
    return QuestionCollator(processor, with_answer=False, image_kwargs=system.image_kwargs)(samples)


@torch.no_grad()
def ask(
    system: System, samples: list[dict], inputs: dict, processor, max_new_tokens: int, generator, answers: Answers
):
    """Add to `answers` what `system` says of `samples`."""
    model = system.model.eval()
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    if Budget.of(model.config, **system.options).selection in ("dense", "blocks"):
        inputs.pop("image_hidden_states", None)
    layout = layout_of(model.config, inputs["input_ids"])
    began = time.perf_counter()
    options = options_of(system, inputs, layout, generator)
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
        maps = [[]] * len(samples) if system.scores or system.peer else output.selection.relevance.tolist()
        answers.relevance += maps
        answers.kept += [kept_regions(output.selection, row, layout.tokens_per_tile) for row in range(len(samples))]
    else:
        counts = torch.bincount(layout.tile_sample, minlength=len(samples))
        answers.visual_tokens += (counts * layout.tokens_per_tile).tolist()
        answers.tiles += (counts - 1).tolist()
        answers.relevance += [[]] * len(samples)
        answers.kept += [[[0.0, 0.0, 1.0, 1.0]]] * len(samples)


def kept_regions(selection, index: int, tokens_per_tile: int) -> list[list[float]]:
    """The cells of the high-resolution tokens kept of an image, boxes in shares of its sides; of the glance where the
    image is a single tile."""
    tiles, glance, _ = kept_maps(selection, index, tokens_per_tile)
    cells = tiles if tiles.any() or selection.grids[index].any() else glance
    rows, columns = cells.shape
    return [
        [column / columns, row / rows, (column + 1) / columns, (row + 1) / rows]
        for row, column in np.argwhere(cells).tolist()
    ]


def options_of(system: System, inputs: dict, layout, generator) -> dict:
    """What `generate` is given beside the inputs: the options of the system, and its scores where it has some."""
    if system.peer is not None:
        made = system.peer(system.model, inputs, layout, system.options["max_visual_tokens"])
        inputs.pop("image_hidden_states", None)
        return system.options | made
    if system.scores is not None:
        return system.options | {"visual_token_scores": system.scores(layout, generator).to(system.model.device)}
    return system.options


@torch.no_grad()
def encode_all(model, inputs: dict) -> torch.Tensor:
    """Features of every tile of some inputs, `(T, P, D)`; those in the inputs where they are known."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    layout = layout_of(model.config, inputs["input_ids"])
    views = Views(inputs["pixel_values"], inputs.get("pixel_attention_mask"), inputs.get("image_hidden_states"))
    return model.model.encode_tiles(views, layout, torch.ones_like(layout.is_global))


def unused_by(system: System) -> tuple:
    """The modules that run, but have no say in what `system` keeps: the selector where scores come from elsewhere."""
    inner = system.model.model
    return (inner.selector, inner.complexity_estimator) if system.scores or system.peer else ()


def layout_of(config, input_ids):
    """The layout of the tiles in `input_ids` `(B, L)`, by the markers of a [`QGSAConfig`]."""
    return read_layout(
        input_ids,
        config.tokens_per_tile,
        config.image_token_id,
        config.global_image_token_id,
        config.tile_token_ids,
    )


def bootstrap_interval(values: np.ndarray, seed: int = 0, draws: int = 2000) -> list[float]:
    """95 % bootstrap interval of the mean of `values` `(n,)`; of paired differences where these are differences."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def make_row(name: str, answers: Answers, samples: list[dict], right: np.ndarray, dense: np.ndarray) -> dict:
    """One row of `results.json`: `right` and `dense` are `(n,)` of 0 to 1 over the same questions."""
    families = np.array([sample["family"] for sample in samples])
    row = {
        "system": name,
        "visual_tokens_mean": float(np.mean(answers.visual_tokens)),
        "tiles_mean": float(np.mean(answers.tiles)),
        "visual_tokens_counts": {str(k): n for k, n in sorted(Counter(answers.visual_tokens).items())},
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
        "grounding": grounding_of(answers, samples),
        "seconds_median": median(answers.seconds),
    }
    return row


def grounding_of(answers: Answers, samples: list[dict]) -> dict:
    """How well the selector points, on questions that have boxes; nothing where there are none, or no selector.

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


def evaluate_systems(
    systems: list[System],
    dataset,
    processor,
    batch_size: int,
    max_new_tokens: int,
    seed: int = 0,
    scoring: str = "cards",
    share_features: bool = False,
) -> list[dict]:
    """Rows of `results.json` for `systems`, the first of which is the dense one that all are paired with.

    `scoring` is the name of the data set whose rules say what is right, see `training/data/sets.py`; its own
    metric is in a row's `scores`, and how far it answers as the dense one does in its `loyalty`.
    """
    everything, samples = answer(systems, dataset, processor, batch_size, max_new_tokens, seed, share_features)
    rows, dense = [], None
    for system, answers in zip(systems, everything):
        right = get_dataset(scoring).grade_all(answers.predictions, samples)
        dense = right if dense is None else dense
        row = make_row(system.name, answers, samples, right, dense)
        row["speedup_vs_dense"] = (rows[0] if rows else row)["seconds_median"] / row["seconds_median"]
        row["scores"] = get_dataset(scoring).metric(answers.predictions, samples, answers.kept)
        row["loyalty"] = loyalty_metric(answers.predictions, everything[0].predictions, right, dense)
        rows.append(row)
    return rows


def add_flops(rows: list[dict], systems: list[System], dataset, processor, max_new_tokens: int, questions: int = 8):
    """Put the mean FLOPs of the first `questions`, asked one at a time, into the rows as `flops`.

    The cross-modal attention of QGSA's own table is not measured here: None.
    """
    generator = torch.Generator().manual_seed(0)
    for row, system in zip(rows, systems):
        counts = []
        for index in trange(min(questions, len(dataset)), desc=f"FLOPs of {system.name}", leave=False):
            inputs = show(system, [dataset[index]], processor)
            inputs = {name: value.to(system.model.device) for name, value in inputs.items()}
            layout = layout_of(system.model.config, inputs["input_ids"])
            options = partial(options_of, system, inputs, layout, generator)
            counts.append(count_flops(system.model, inputs, max_new_tokens, options, unused_by(system)))
        row["flops"] = {part: float(np.mean([count[part] for count in counts])) for part in counts[0]}
        row["flops"]["cross_modal_attention"] = None
