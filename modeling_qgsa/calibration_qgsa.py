"""Calibration of the attention pointer: which attention to read, and how much of what it points at is enough.

It needs images and questions, but no answers, boxes or gradients: the dense model's own answers are the target.
Weights are fitted to what each tile adds to the likelihood of the answer, and a budget is chosen by which the answers
stay the same. What that keeps is measured on each half of the samples after a fit on the other half. Sizes as in
`layout_qgsa`.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from .configuration_qgsa import MAX_BUDGET, QGSAConfig
from .layout_qgsa import VisualLayout, tile_relevance
from .pointer_qgsa import AttentionPointer, attention_layers, attention_scores, nowhere_share, tiles_to_cover
from .prompt_qgsa import Prompt
from .request_qgsa import Request
from .selection_qgsa import positions_to_keep, top_k_per_image
from .utility_qgsa import read_answers, tile_utility
from .vision_qgsa import encode_tiles


logger = logging.get_logger(__name__)
ANSWER_TOKENS = 16  # of the dense answer; the rest of a long one hardly depends on what else is seen
PENALTY = 30.0  # on the squared weights of standardized maps
KEEP_ALL = {"selection": "after_encoder", "min_visual_tokens": MAX_BUDGET, "max_visual_tokens": MAX_BUDGET}
EVERY_TILE = 36  # the largest grid that the markers allow
FOLDS = 5  # of the samples that a budget is chosen on
COVERAGES = 1 - torch.logspace(-0.1, -3, 30)
NOWHERE_QUANTILES = (0.5, 0.35, 0.2, 0.1, 0.05)
BOOTSTRAP = 2000


@dataclass(frozen=True)
class Observation:
    """A question, its dense answer, and what each tile adds to it.

    Args:
        input_ids, labels: `(1, L)` int64, the prompt with the dense answer, and the answer alone.
        features: `(T, P, D)`, the tiles.
        maps: `(I, layers, 2, C)`, see `AttentionPointer.read`.
        utility: `(T,)`, see `tile_utility`.
        dense: log-likelihood of the answer given everything.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor
    maps: torch.Tensor
    utility: torch.Tensor
    dense: float

    @property
    def probability(self) -> float:
        """The dense model's own probability of its answer: how little it guesses."""
        return float(torch.tensor(self.dense).exp())

    @property
    def importance(self) -> float:
        """How much it matters that this answer stays the same: the square of its probability.

        One factor is how much the answer means to the model, the other how likely it would repeat it itself, if it
        were asked again and drew its answer. A guess among many changes with anything that is left out.
        """
        return self.probability**2

    @cached_property
    def prompt(self) -> Prompt:
        return Prompt.of(self.input_ids, labels=self.labels)


@torch.no_grad()
def observe(model, inputs: dict[str, torch.Tensor]) -> Observation:
    """Encode every tile of one sample, answer its question, and read the answer with each tile alone.

    All layers of the text model are full, whatever schedule the configuration has.

    Args:
        inputs: output of the processor for one sample, on the device of the model.
    """
    request = Request.take(model.config, dict(inputs) | {"pointer": "attention", "selection": "after_encoder"})
    layout, config = request.layout, model.config
    assert layout is not None and request.prompt is not None and request.question_mask is not None
    assert request.answer_position is not None
    features = encode_tiles(model.model, request.visual, layout, torch.ones_like(layout.is_global))
    pointer = AttentionPointer(
        model.model.text_model, config, request.prompt, layout, request.answer_position, request.budget
    )
    question = model.get_input_embeddings()(request.prompt.input_ids)[layout.image_sample]
    layers = attention_layers(config.text_config.num_hidden_layers)
    maps = pointer.read(question, request.question_mask, features[layout.is_global], layers)
    text = {"input_ids": request.prompt.input_ids, "attention_mask": request.prompt.attention_mask}
    options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "pointer": "attention", **KEEP_ALL}
    options["vision_budget"] = ["full"] * config.text_config.num_hidden_layers
    input_ids = model.generate(**text, image_hidden_states=features, **options)
    labels = input_ids.clone()
    labels[:, : text["input_ids"].shape[1]] = -100
    prompt = Prompt.of(input_ids, labels=labels)
    layout = VisualLayout.of(config, input_ids)
    every = torch.ones_like(layout.is_global)
    embeds = model.model.embed(input_ids, layout, features, every)
    keep = prompt.attention_mask.bool()
    dense = float(read_answers(model, keep.new_zeros(1).long(), keep, embeds, prompt).log_likelihood)
    return Observation(input_ids, labels, features, maps, tile_utility(model, layout, features, prompt), dense)


def prepare(samples: Sequence[dict], processor) -> Iterator[dict[str, torch.Tensor]]:
    """Processor outputs of single samples. Raises ValueError, naming the sample, if one cannot be read."""
    for number in range(len(samples)):
        try:
            sample = samples[number]
            images = sample["image"] if isinstance(sample["image"], (list, tuple)) else [sample["image"]]
            content = [{"type": "image"}] * len(images) + [{"type": "text", "text": sample["question"]}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            yield dict(processor(text=[text], images=[list(images)], return_tensors="pt"))
        except Exception as error:  # an image may fail to decode in as many ways as there are formats
            raise ValueError(
                f"sample {number} of {len(samples)} cannot be read ({type(error).__name__}: {error}): samples need an "
                "`image` and a `question`"
            ) from error


class Observations:
    """Observations on disk, so that an interrupted calibration continues; without a folder they stay in memory.

    Args:
        folder: created if it does not exist.
        model: an observation is found again if weights and inputs are the same.
    """

    def __init__(self, folder: str | Path | None, model):
        self.folder = None if folder is None else Path(folder)
        seen = hashlib.sha256()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            seen.update(b"" if model.config.glance_downscale == 1 else bytes([model.config.glance_downscale]))
            for weight in model.parameters():
                seen.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.maker = seen

    def of(self, model, inputs: dict[str, torch.Tensor]) -> Observation:
        """The observation of one sample: read, or made and stored. Files are complete or absent."""
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        if self.folder is None:
            return observe(model, inputs)
        key = self.maker.copy()
        for name, value in sorted(inputs.items()):
            key.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        path = self.folder / f"{key.hexdigest()[:32]}.pt"
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}.part")
            torch.save(asdict(observe(model, inputs)), part)
            part.replace(path)
        return Observation(**torch.load(path, weights_only=True, map_location=model.device))


def taught(each: Observation, layout: VisualLayout) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """What an observation teaches about each image with several tiles: `(image, (tiles, target, weight))`.

    The target of a tile is its share of a softmax over the utilities of the image's tiles. Images count by the
    probability of the dense answer and by how much the best tile adds: where no tile adds anything, or the model
    guesses, there is nothing to learn.
    """
    for image in range(len(layout.grids)):
        tiles = (layout.tile_image == image) & ~layout.is_global
        if tiles.any():
            utility = each.utility[tiles]
            weight = each.probability * (utility.max() - utility.mean()).clamp(min=0)
            yield image, (tiles, utility.softmax(0), weight)


def fit_weights(observations: list[Observation], config: QGSAConfig) -> list[list[float]]:
    """Weights of the attention maps, `layers x 2`, by penalized multinomial logistic regression.

    They maximize the likelihood of the shares of `taught` under the relevance of the tiles, so that this relevance can
    be read as a probability: a question that may be about any of five cards has five tiles of equal relevance.
    """
    cells, tiles_of_cells, targets, weights = [], [], [], []
    for each in observations:
        layout = VisualLayout.of(config, each.input_ids)
        count = layout.tokens_per_tile
        # Tiles are sums of cells: one column for each cell that has all of the relevance.
        shares = [tile_relevance(one.expand(len(layout.grids), -1), layout) for one in torch.eye(count).to(each.maps)]
        for image, (tiles, target, weight) in taught(each, layout):
            cells.append(each.maps[image].flatten(0, 1).T)
            tiles_of_cells.append(torch.stack(shares, dim=1)[tiles])
            targets.append(target)
            weights.append(weight)
    x = torch.stack(cells).double()  # (I, C, weights)
    a, y = (pad_sequence(rows, batch_first=True).double() for rows in (tiles_of_cells, targets))
    w = torch.stack(weights).double()
    w = w / w.sum().clamp(min=torch.finfo(w.dtype).tiny)
    scale = torch.einsum("i,icw->w", w, (x - x.mean(1, keepdim=True)).square() / x.shape[1]).sqrt().clamp(min=1e-9)
    w = w / w.square().sum().clamp(min=torch.finfo(w.dtype).tiny)  # the effective number of images
    fitted = torch.zeros_like(scale, requires_grad=True)
    optimizer = torch.optim.LBFGS([fitted], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        relevance = (x @ (fitted / scale)).softmax(1)
        likelihood = (y * (a @ relevance[..., None])[..., 0].clamp(min=1e-9).log()).sum(1)
        penalized = PENALTY * fitted.square().sum() - (w * likelihood).sum()
        penalized.backward()
        return penalized

    with torch.enable_grad():
        optimizer.step(loss)
    return (fitted.detach() / scale).view(-1, 2).tolist()


def scores_of(observations: list[Observation], weights: list[list[float]]) -> list[torch.Tensor]:
    """Scores of the cells of each sample's images, `(I, C)`."""
    return [attention_scores(each.maps, weights) for each in observations]


def cross_fitted_scores(observations: list[Observation], config: QGSAConfig) -> list[torch.Tensor]:
    """As `scores_of`, each by weights that were fitted without its sample: they point as well as on new samples."""
    scores = [torch.empty(0)] * len(observations)
    for fold in range(FOLDS):
        rest = [each for number, each in enumerate(observations) if number % FOLDS != fold]
        scores[fold::FOLDS] = scores_of(observations[fold::FOLDS], fit_weights(rest, config))
    return scores


class Spending(NamedTuple):
    """How relevance becomes tiles: fields of [`QGSAConfig`] without `attention_`."""

    temperature: float
    coverage: float
    nowhere: float | None


EVERYTHING = Spending(1.0, 1.0, None)


class Trials:
    """Answers of some observations with the tiles that a spending encodes; each is read once.

    Args:
        model: the QGSA model.
        observations: the samples.
        scores: of the cells of each sample's images.
    """

    def __init__(self, model, observations: list[Observation], scores: list[torch.Tensor]):
        self.model, self.observations, self.scores = model, observations, scores
        self.layouts = [VisualLayout.of(model.config, each.input_ids) for each in observations]
        self.importance = torch.tensor([each.importance for each in observations], dtype=torch.float64)
        self.read: dict[tuple[int, ...], bool] = {}

    def mass(self, number: int, temperature: float) -> torch.Tensor:
        """Relevance of the tiles of one sample, `(T,)`."""
        return tile_relevance((self.scores[number] / temperature).softmax(1), self.layouts[number])

    def tiles(self, spent: Spending) -> list[torch.Tensor]:
        """The number of tiles that each image of each sample would get."""
        counts = []
        for number, (scores, layout) in enumerate(zip(self.scores, self.layouts)):
            nowhere = nowhere_share(scores, spent.temperature, spent.nowhere)
            counts.append(tiles_to_cover(self.mass(number, spent.temperature), layout, spent.coverage, nowhere))
        return counts

    def cost(self, spent: Spending) -> float:
        """Mean number of tiles of an image."""
        return float(torch.cat(self.tiles(spent)).float().mean())

    def agrees(self, number: int, tiles: torch.Tensor, temperature: float) -> bool:
        """Whether a sample is answered as by the dense model with this many tiles of each image, the best ones."""
        each, layout = self.observations[number], self.layouts[number]
        chosen = top_k_per_image(self.mass(number, temperature), ~layout.is_global, layout, tiles) | layout.is_global
        key = (number, *chosen.nonzero()[:, 0].tolist())
        if key not in self.read:
            shown = chosen[:, None].expand(each.features.shape[:2])
            markers_stay = self.model.config.keep_tile_markers
            keep = positions_to_keep(each.prompt.attention_mask, layout, shown, markers_stay)
            embeds = self.model.model.embed(each.input_ids, layout, each.features, torch.ones_like(chosen))
            self.read[key] = bool(read_answers(self.model, tiles.new_zeros(1), keep, embeds, each.prompt).agrees)
        return self.read[key]

    def loyalty(self, spent: Spending, target: float | None = None) -> torch.Tensor | None:
        """Which samples agree, `(n,)` bool; None as soon as they cannot reach a weighted share of `target`.

        The share is the mean of its posterior under Jeffreys' prior, (k + 1/2) / (n + 1) of the answers lost: the
        cheapest of many spendings that happens to lose few would otherwise promise too much. Losing none is enough.
        """
        tiles, allowed = self.tiles(spent), float("inf")
        if target is not None:
            one = self.importance.mean()
            allowed = max(0.0, float((1 - target) * (self.importance.sum() + one) - one / 2))
        agreed = torch.ones(len(tiles), dtype=torch.bool)
        for number in self.importance.argsort(descending=True).tolist():
            agreed[number] = self.agrees(number, tiles[number], spent.temperature)
            if self.importance[~agreed].sum() > allowed:
                return None
        return agreed


def choose_spending(trials: Trials, target_loyalty: float) -> Spending | None:
    """The lowest coverage that keeps the answers; None if none below the dense cost does.

    A score of looking nowhere is added where it saves a fifth of the tiles or more, and no answer.
    """
    everything = torch.cat([layout.grids.prod(1) for layout in trials.layouts]).float().mean()
    for coverage in COVERAGES.tolist():
        chosen = Spending(1.0, coverage, None)
        agreed, cost = trials.loyalty(chosen, target_loyalty), trials.cost(chosen)
        if agreed is not None:
            break
    if agreed is None or cost >= 0.9 * everything:
        return None
    highest = torch.stack([scores.amax() for scores in trials.scores])
    for nowhere in torch.quantile(highest, highest.new_tensor(NOWHERE_QUANTILES)).tolist():
        frugal = chosen._replace(nowhere=nowhere)
        still = trials.loyalty(frugal)
        if trials.cost(frugal) <= 0.8 * cost and still is not None and (still >= agreed).all():
            return frugal
    return chosen


class Measured(NamedTuple):
    """Of some samples, whether each agrees `(n,)`, its importance `(n,)`, and the tiles of each image `(I,)`."""

    agreed: torch.Tensor
    importance: torch.Tensor
    tiles: torch.Tensor


def bootstrap_interval(agreed: torch.Tensor, weights: torch.Tensor) -> list[float]:
    """95 % interval of a weighted share, by resampling the samples."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(agreed), (BOOTSTRAP, len(agreed)), generator=generator)
    shares = (agreed.double() * weights)[drawn].sum(1) / weights[drawn].sum(1)
    return torch.quantile(shares, torch.tensor([0.025, 0.975], dtype=shares.dtype)).tolist()


def measure(trials: Trials, spent: Spending) -> Measured:
    """Loyalty and cost of a spending."""
    agreed = trials.loyalty(spent)
    assert agreed is not None
    return Measured(agreed, trials.importance, torch.cat(trials.tiles(spent)))


def describe(parts: Sequence[Measured]) -> dict[str, Any]:
    """What was measured on several parts of the samples, together."""
    agreed, importance, tiles = (torch.cat(each) for each in zip(*parts))
    return {
        "loyalty": float((agreed.double() * importance).sum() / importance.sum()),
        "loyalty_ci95": bootstrap_interval(agreed, importance),
        "loyalty_unweighted": float(agreed.double().mean()),
        "tiles_mean": float(tiles.float().mean()),
        "held_out_samples": len(agreed),
    }


def check_promise(model, samples: Sequence[dict], processor) -> dict[str, Any]:
    """Loyalty and cost of a calibrated `model` on other `samples`, by the measure that it was calibrated by.

    Raises ValueError if the model was not calibrated, or a sample cannot be read.
    """
    config = model.config
    if config.attention_weights is None:
        raise ValueError("attention_weights (None): the model was not calibrated, so that there is nothing to check")
    observations = observe_all(model, samples, processor, None)
    spent = Spending(config.attention_temperature, config.attention_coverage, config.attention_nowhere)
    with torch.no_grad():
        return describe(
            [measure(Trials(model, observations, scores_of(observations, config.attention_weights)), spent)]
        )


def check_samples(samples: Sequence[dict], target_loyalty: float, layers: int):
    """Raise ValueError if there are too few samples for the weights of so many layers, or the loyalty is no share."""
    if not 0 < target_loyalty <= 1:
        raise ValueError(f"target_loyalty ({target_loyalty}) must be in (0, 1]")
    least = 2 * 2 * layers
    if len(samples) < least:
        raise ValueError(
            f"samples ({len(samples)}) must be at least {least}: half of them fit {2 * layers} weights, 2 for each of "
            f"{layers} layers"
        )


def observe_all(model, samples: Sequence[dict], processor, folder: str | Path | None) -> list[Observation]:
    """Observe every sample, with a progress bar, after an estimate of the time that it takes.

    Raises ValueError if a sample cannot be read, or if no image has more than one tile.
    """
    store, observations = Observations(folder, model), []
    began = time.perf_counter()
    for inputs in tqdm(prepare(samples, processor), total=len(samples), desc="calibration"):
        observations.append(store.of(model, inputs))
        if len(observations) == 1:
            minutes = (time.perf_counter() - began) * len(samples) / 60
            logger.warning(f"calibration: about {minutes:.1f} minutes for {len(samples)} samples")
    if all((each.utility == float("-inf")).all() for each in observations):
        raise ValueError(
            f"samples ({len(samples)}): every image has one tile only, so that there is nothing to choose from"
        )
    return observations


def fit(model, observations: list[Observation], target_loyalty: float) -> tuple[list[list[float]], Spending | None]:
    """The weights of the attention, and what to spend by them; None if only everything keeps the answers."""
    scores = cross_fitted_scores(observations, model.config)
    return fit_weights(observations, model.config), choose_spending(
        Trials(model, observations, scores), target_loyalty
    )


def calibrate_pointer(
    model, samples: Sequence[dict], processor, target_loyalty: float = 0.99, folder: str | Path | None = None
) -> dict[str, Any]:
    """Fit the attention pointer and its budget to this model, and write both into the config.

    It takes images and questions, 100 to 200 at best, but no answers: those of the dense model are the target. What
    is reported was measured on each half of the samples after fitting on the other one; then all of them are fitted.

    Args:
        samples: sequence of dicts with `image` (PIL, or a list of them) and `question`.
        target_loyalty: share of the answers that should be those of the dense model, weighted by the square of its
            probability for them, see [`Observation`]; if no smaller budget keeps it, `selection` becomes "dense".
        folder: keeps what was observed, so that an interrupted calibration continues; about 3 MB per sample.

    Returns what was measured, also `config.calibration`. Raises ValueError, before anything is changed, for fewer
    samples than twice the weights, samples that cannot be read, and images that all have a single tile.
    """
    config, layers = model.config, attention_layers(model.config.text_config.num_hidden_layers)
    check_samples(samples, target_loyalty, layers)
    training = model.training
    try:
        observations = observe_all(model.eval(), samples, processor, folder)
        with torch.no_grad():
            halves = observations[::2], observations[1::2]
            held_out = []
            for half, other in (halves, halves[::-1]):
                weights, chosen = fit(model, half, target_loyalty)
                held_out.append(measure(Trials(model, other, scores_of(other, weights)), chosen or EVERYTHING))
            weights, chosen = fit(model, observations, target_loyalty)
    finally:
        model.train(training)
    record = {"target_loyalty": target_loyalty, "samples": len(samples), **describe(held_out), "dense": chosen is None}
    config.selection = "dense" if chosen is None else "before_encoder"
    config.pointer, config.attention_weights = "attention", weights
    config.attention_temperature, config.attention_coverage, config.attention_nowhere = chosen or EVERYTHING
    config.min_tiles, config.max_tiles, config.calibration = 0, EVERY_TILE, record
    config.keep_whole_tiles()
    if chosen is None:
        logger.warning(
            f"calibration: no budget below the dense cost keeps {target_loyalty:.1%} of the answers, so selection is "
            'set to "dense"'
        )
    return record
