"""From attention to relevance, and from relevance to a selection under a budget. Sizes as in `inputs`.

Pure functions on arrays, with the results of their namesakes in `modeling_qgsa`.
"""

from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from .inputs import Prompt


MAX_BUDGET = 2**31 - 1  # effectively "keep everything"
SELECTIONS = ("before_encoder", "blocks", "dense")


@dataclass(frozen=True)
class Budget:
    """The variant, and how many visual tokens and high-resolution tiles it may use per image; see QGSAConfig."""

    selection: str
    min_visual_tokens: int
    max_visual_tokens: int
    min_tiles: int
    max_tiles: int

    @classmethod
    def of(cls, config: dict, overrides: dict[str, Any]) -> "Budget":
        """The configured budget with the overrides of one call; None keeps the configured value.

        Args:
            overrides: fields, and `max_image_tokens`, see `limited_to`.

        Raises ValueError if it is out of range, TypeError for an unknown field.
        """
        names = [each.name for each in fields(cls)]
        unknown = sorted(overrides.keys() - {"max_image_tokens", *names})
        if unknown:
            raise TypeError(f"generate() got unexpected arguments: {', '.join(unknown)}")
        given = {name: value for name, value in overrides.items() if value is not None}
        number, budget = given.pop("max_image_tokens", None), cls(**{name: config[name] for name in names})
        if number is not None:
            budget = budget.limited_to(number, config["tokens_per_tile"], given)
        budget = replace(budget, **given)
        budget.check()
        return budget

    def limited_to(self, max_image_tokens: int, tokens_per_tile: int, given: dict[str, Any]) -> "Budget":
        """This budget with at most `max_image_tokens` visual tokens, and tiles in proportion to them.

        There are at least as many tiles as can deliver so many tokens together with the global view.

        Args:
            given: fields that the call sets besides.

        Raises ValueError if the number is out of range, or contradicts what is given.
        """
        number = max_image_tokens
        if isinstance(number, bool) or not isinstance(number, Integral) or not 1 <= number <= MAX_BUDGET:
            raise ValueError(f"max_image_tokens ({number!r}) must be an integer of 1 to {MAX_BUDGET}")
        if given.get("selection", self.selection) == "dense":
            raise ValueError(f'max_image_tokens ({number}): not available with selection "dense", which keeps all')
        fill, proportion = -(-number // tokens_per_tile) - 1, -(-number * self.max_tiles // self.max_visual_tokens)
        tiles = min(max(fill, proportion), MAX_BUDGET)
        for name, most in {"max_visual_tokens": number, "min_visual_tokens": number, "min_tiles": tiles}.items():
            value = given.get(name)
            if isinstance(value, Integral) and (value > most or name == "max_visual_tokens"):
                raise ValueError(
                    f"max_image_tokens ({number}, at most {tiles} tiles) contradicts {name} ({value}): give one of "
                    "them"
                )
        return replace(
            self,
            min_visual_tokens=min(self.min_visual_tokens, number),
            max_visual_tokens=number,
            min_tiles=min(self.min_tiles, tiles),
            max_tiles=tiles,
        )

    def check(self):
        """Raise ValueError, naming the field and both numbers, if the budget is out of range."""
        if self.selection not in SELECTIONS:
            raise ValueError(
                f"selection ({self.selection!r}): choose from {', '.join(SELECTIONS)}; the others need torch"
            )
        for name, low, high, least in (
            ("visual_tokens", self.min_visual_tokens, self.max_visual_tokens, 1),
            ("tiles", self.min_tiles, self.max_tiles, 0),
        ):
            for end, number in (("min", low), ("max", high)):
                if isinstance(number, bool) or not isinstance(number, Integral) or number > MAX_BUDGET:
                    raise ValueError(f"{end}_{name} ({number!r}) must be an integer of at most {MAX_BUDGET}")
            if low < least:
                raise ValueError(f"min_{name} ({low}) must be at least {least}")
            if low > high:
                raise ValueError(f"min_{name} ({low}) must not exceed max_{name} ({high})")

    @property
    def is_fixed(self) -> bool:
        """Whether it is the same for every question."""
        return self.min_visual_tokens == self.max_visual_tokens and self.min_tiles == self.max_tiles

    def resolve(self, complexity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(m, k) per image, `(I,)` int64 each, from its complexity, `(I,)` float32 in 0 .. 1."""
        m = self.min_tiles + complexity * (self.max_tiles - self.min_tiles)
        k = self.min_visual_tokens + complexity * (self.max_visual_tokens - self.min_visual_tokens)
        return np.rint(m).astype(np.int64), np.rint(k).astype(np.int64)


class Pointing(NamedTuple):
    """Where to look, and how much.

    Args:
        relevance: `(I, C)` float32, log-probabilities of the cells of the glance.
        complexity: `(I,)` float32, 0 to 1: how much of the budget the question needs.
        question_state: `(I, D)`, with which a selector matches tokens; `(I, 0)` for attention.
    """

    relevance: np.ndarray
    complexity: np.ndarray
    question_state: np.ndarray

    @classmethod
    def nowhere(cls, images: int, cells: int) -> "Pointing":
        """All cells are alike, and complexity is 1."""
        relevance = np.full((images, cells), -np.log(cells), np.float32)
        return cls(relevance, np.ones(images, np.float32), relevance[:, :0])


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-softmax over the last dimension."""
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def complexity_at(logits: np.ndarray, quantile: float) -> np.ndarray:
    """The lowest complexity that suffices with probability `quantile`, `(I,)`, from logits of each `(I, levels)`."""
    highest = logits.shape[1] - 1
    level = (np.cumsum(np.exp(log_softmax(logits)), axis=1) < quantile).sum(1)
    return (np.minimum(level, highest) / highest).astype(np.float32)


def attention_maps(attention: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Maps over the cells of each glance, `(I, layers, 2, C)`, each with sum 1: the question's words, and the answer.

    Args:
        attention: `(layers, words + 1, K)`, of each word, then of the position that predicts the answer.
        cells: `(I, C)`, where the tokens of each glance stand among the K positions.
    """
    maps = attention[:, :, cells].transpose(2, 0, 1, 3)  # (I, layers, words + 1, C)
    maps = np.stack([maps[:, :, :-1].max(2), maps[:, :, -1]], axis=2)
    return maps / np.maximum(maps.sum(-1, keepdims=True), np.finfo(np.float32).tiny)


def attention_scores(maps: np.ndarray, weights: list[list[float]] | None) -> np.ndarray:
    """Scores of the cells, `(I, C)`, from maps `(I, layers, 2, C)`; for weights see QGSAConfig.attention_weights."""
    if weights is not None:
        return np.einsum("ilrc,lr->ic", maps, np.array(weights, np.float32))
    spread = np.maximum(maps.std(-1, ddof=1, keepdims=True), np.finfo(np.float32).tiny)
    return ((maps - maps.mean(-1, keepdims=True)) / spread).mean(1).max(1)


def read_attention(maps: np.ndarray, prompt: Prompt, limits: Budget, config: dict) -> Pointing:
    """Where to look, and how much, from attention maps, see `attention_maps`."""
    temperature, nowhere = config["attention_temperature"], config["attention_nowhere"]
    scores = attention_scores(maps, config["attention_weights"]) / np.float32(temperature)
    relevance = log_softmax(scores)
    mass, complexity = tile_relevance(np.exp(relevance), prompt), []
    for image in range(len(maps)):
        share = 0.0
        if nowhere is not None:
            logsumexp = float(scores[image, 0] - relevance[image, 0])
            share = (1 + np.tanh((nowhere / temperature - logsumexp) / 2)) / 2  # a sigmoid that cannot overflow
        own = mass[(prompt.tile_image == image) & ~prompt.is_global]
        tiles = tiles_to_cover(own, config["attention_coverage"], share)
        complexity.append((tiles - limits.min_tiles) / max(limits.max_tiles - limits.min_tiles, 1))
    return Pointing(relevance, np.clip(complexity, 0, 1).astype(np.float32), relevance[:, :0])


def tiles_to_cover(mass: np.ndarray, coverage: float, nowhere: float) -> int:
    """How many tiles, the most relevant ones first, cover a share of the relevance.

    Args:
        mass: `(n,)`, the relevance of each tile of an image.
        coverage: the share, 0 to 1; 1 takes all tiles.
        nowhere: the relevance of looking nowhere, which counts as covered.
    """
    if coverage == 1 or not len(mass):
        return len(mass)
    covered = np.cumsum(np.sort(mass)[::-1])
    wanted = (coverage - nowhere) / max(1 - nowhere, 1e-7) * covered[-1]
    return min(int((covered < wanted).sum()) + 1, len(mass)) if wanted > 0 else 0


def tile_relevance(relevance: np.ndarray, prompt: Prompt) -> np.ndarray:
    """Mass of the probabilities `relevance` `(I, C)` on every tile, `(T,)`; 0 for global views."""
    side = round(relevance.shape[1] ** 0.5)
    edges, overlaps = np.arange(side + 1, dtype=np.float32) / np.float32(side), []
    for axis, index in enumerate((prompt.tile_row, prompt.tile_column)):
        parts = prompt.parts[:, axis].astype(np.float32)
        low, high = ((each.astype(np.float32) / parts)[:, None] for each in (index, index + 1))
        overlaps.append(np.clip(np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1]), 0, None) * side)
    return np.einsum("tij,ti,tj->t", relevance.reshape(-1, side, side)[prompt.tile_image], *overlaps)


def token_centres(prompt: Prompt, axis: int) -> np.ndarray:
    """Centres of the token rows (`axis` 0) or columns (1) of every tile, in cells of the glance, `(T, side)`."""
    side, index = round(prompt.token_positions.shape[1] ** 0.5), (prompt.tile_row, prompt.tile_column)[axis]
    parts = np.where(prompt.is_global, 1, prompt.parts[:, axis])[:, None]
    return (np.maximum(index, 0)[:, None] * side + np.arange(side) + 0.5) / parts


def token_cells(prompt: Prompt) -> np.ndarray:
    """The cell of the glance at the centre of every visual token, `(T, P)` int64; a glance token's is its own."""
    side = round(prompt.token_positions.shape[1] ** 0.5)
    row, column = (np.minimum(token_centres(prompt, axis).astype(np.int64), side - 1) for axis in (0, 1))
    return (row[:, :, None] * side + column[:, None, :]).reshape(prompt.token_positions.shape)


def token_relevance(relevance: np.ndarray, prompt: Prompt) -> np.ndarray:
    """The relevance map at the centre of every visual token, `(T, P)`, interpolated between the centres of cells.

    Args:
        relevance: `(I, C)` float32, log-probabilities of the cells of the glance.
    """
    side, shape = round(relevance.shape[1] ** 0.5), prompt.token_positions.shape
    maps, ends = relevance.reshape(-1, side, side)[prompt.tile_image], []
    for axis in (0, 1):
        place = np.clip(token_centres(prompt, axis) - 0.5, 0, side - 1).astype(np.float32)
        low = place.astype(np.int64)
        ends.append((low, np.minimum(low + 1, side - 1), place - low.astype(np.float32)))
    tile, (top, bottom, down), (left, right, across) = np.arange(shape[0])[:, None, None], *ends
    upper, lower, down, across = top[:, :, None], bottom[:, :, None], down[:, :, None], across[:, None, :]
    left, right = left[:, None, :], right[:, None, :]
    above = maps[tile, upper, left] * (1 - across) + maps[tile, upper, right] * across
    below = maps[tile, lower, left] * (1 - across) + maps[tile, lower, right] * across
    return (above * (1 - down) + below * down).reshape(shape)


def top_k_per_image(scores: np.ndarray, candidates: np.ndarray, prompt: Prompt, k: np.ndarray) -> np.ndarray:
    """The best candidates of every image, bool; ties go to the first.

    Args:
        scores, candidates: `(T,)` by tile or `(T, P)` by token.
        k: `(I,)` int64; if it exceeds the number of candidates, all of them are kept.
    """
    keep = np.zeros(scores.shape, bool)
    for image, count in enumerate(k):
        own = prompt.tile_image == image
        order = np.argsort(-np.where(candidates[own], scores[own], -np.inf).ravel(), kind="stable")
        best = np.zeros(order.size, bool)
        best[order[:count]] = True
        keep[own] = best.reshape(scores[own].shape) & candidates[own]
    return keep
