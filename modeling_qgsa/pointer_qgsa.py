"""Pointers: the seam between the glance and the budget. Sizes as in `layout_qgsa`.

A pointer reads question and glance and predicts where to look (`point`); once tiles are encoded, it matches their
tokens with the question (`match`). Behind the seam stand the trained selector and the text model's own attention. The
rest of the model sees only scores: those of the pointer, or those given by a caller.
"""

import math
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import torch

from .attention_qgsa import attention_of_rows
from .configuration_qgsa import Budget, QGSAConfig
from .layout_qgsa import VisualLayout, covered_by, tile_relevance, to_images, token_cells, token_relevance
from .prompt_qgsa import Prompt, check_shape
from .selection_qgsa import positions_to_keep, splice
from .selector_qgsa import ComplexityEstimator, QuestionGuidedSelector


class Pointing(NamedTuple):
    """Output of a pointer, before any tile is encoded.

    Args:
        relevance: `(I, C)` float, log-probabilities of the cells of the glance.
        question_state: `(I, D)`, the vectors that `match` compares visual tokens with; `(I, 0)` if it needs none.
        complexity: `(I,)` float, 0 to 1: how much of the budget the question needs.
        complexity_logits: `(I, levels)` float, logits for each complexity being the lowest that suffices; `(I, 0)` if
            complexity is not estimated.
    """

    relevance: torch.Tensor
    question_state: torch.Tensor
    complexity: torch.Tensor
    complexity_logits: torch.Tensor


class Pointer(Protocol):
    """The interface of a pointer, which reads the question and the glance."""

    def point(self, question: torch.Tensor, question_mask: torch.Tensor, glance: torch.Tensor) -> Pointing:
        """Where to look, and how much.

        Args:
            question: `(I, L, D)` word embeddings of each image's prompt.
            question_mask: `(I, L)` bool, the words of the question.
            glance: `(I, C, D)`, features of the global views.
        """

    def match(self, question_state: torch.Tensor, features: torch.Tensor, is_global: torch.Tensor) -> torch.Tensor:
        """How well encoded visual tokens match the question, `(n, P)` float32.

        Args:
            question_state: `(n, D)`, that of each tile's image.
            features: `(n, P, D)`, the tokens as the text model gets them.
            is_global: `(n,)` bool, whether a tile is a global view.
        """


@dataclass(frozen=True)
class SelectorPointer:
    """The trained selector and the complexity estimator as a pointer (QGSA, section 3).

    Args:
        selector, estimator: the trained modules.
        quantile: `config.complexity_quantile`.
    """

    selector: QuestionGuidedSelector
    estimator: ComplexityEstimator
    quantile: float

    def point(self, question: torch.Tensor, question_mask: torch.Tensor, glance: torch.Tensor) -> Pointing:
        relevance, question_state = self.selector(question, question_mask, glance)
        levels = self.estimator(question, question_mask, glance)
        return Pointing(relevance, question_state, complexity_at(levels.detach(), self.quantile), levels)

    def match(self, question_state: torch.Tensor, features: torch.Tensor, is_global: torch.Tensor) -> torch.Tensor:
        return self.selector.match_tokens(question_state, features, is_global)


def complexity_at(logits: torch.Tensor, quantile: float) -> torch.Tensor:
    """The lowest complexity that suffices with the estimated probability `quantile`, `(I,)` float32 in 0 .. 1.

    Args:
        logits: `(I, levels)`, for each of several evenly spaced complexities being the lowest that suffices.
    """
    highest = logits.shape[1] - 1
    level = (logits.float().softmax(1).cumsum(1) < quantile).sum(1).clamp(max=highest)
    return level / highest


GLANCE_FIRST = 1e3  # more than any two log-probabilities differ by


@dataclass(frozen=True)
class AttentionPointer:
    """The attention that the text model itself pays to the glance as a pointer: nothing is trained.

    The text model reads prompt and glance alone, up to the last layer that counts. Of every layer, two maps over the
    cells of the glance are read: that of the question's words, at each cell the most that any word pays, and that of
    the position that predicts the answer. Which of the two speaks, and in which layers, differs by model (Zhang et
    al. 2025, "MLLMs Know Where to Look", read the answer's position, SparseVLM the question's words). By default
    layers are therefore averaged, which leaves what they agree on, and the stronger of the two counts at each cell;
    `calibrate` fits weights instead.

    Args:
        text_model: the text model.
        config: weights, temperature and coverage of the attention.
        prompt, layout: the prompts and their images.
        answer: `(I,)` int64, the position that predicts the first token of the answer.
        budget: the budget of this call.
    """

    text_model: torch.nn.Module
    config: QGSAConfig
    prompt: Prompt
    layout: VisualLayout
    answer: torch.Tensor
    budget: Budget

    def point(self, question: torch.Tensor, question_mask: torch.Tensor, glance: torch.Tensor) -> Pointing:
        config, weights = self.config, self.config.attention_weights
        layers = attention_layers(config.text_config.num_hidden_layers) if weights is None else len(weights)
        scores = attention_scores(self.read(question, question_mask, glance, layers), weights)
        relevance = (scores / config.attention_temperature).log_softmax(1)
        nowhere = nowhere_share(scores, config.attention_temperature, config.attention_nowhere)
        tiles = tiles_to_cover(
            tile_relevance(relevance.exp(), self.layout), self.layout, config.attention_coverage, nowhere
        )
        least, most = self.budget.min_tiles, self.budget.max_tiles
        complexity = ((tiles - least) / max(most - least, 1)).clamp(0, 1)
        return Pointing(relevance, relevance[:, :0], complexity, relevance[:, :0])

    def match(self, question_state: torch.Tensor, features: torch.Tensor, is_global: torch.Tensor) -> torch.Tensor:
        """0: tokens rank by the relevance of their places. The glance stays in view if the budget has more room.

        A text model that was not trained with a selection needs the overview, for yes/no questions above all.
        """
        first = is_global & (self.budget.max_visual_tokens > features.shape[1])
        return torch.where(first, GLANCE_FIRST, 0.0)[:, None].expand(features.shape[:2])

    @torch.no_grad()
    def read(
        self, question: torch.Tensor, question_mask: torch.Tensor, glance: torch.Tensor, layers: int
    ) -> torch.Tensor:
        """Attention maps over the cells of the glance, `(I, layers, 2, C)` float32, each with sum 1.

        The two rows are the question's words and the position that predicts the answer; heads are averaged. All
        images of a prompt are read in one pass, which ends with the last layer that is read.

        Args:
            question, question_mask, glance: as in `Pointer.point`.
            layers: the number of layers to read, from the first one on.
        """
        prompt, layout = self.prompt, self.layout
        samples, owner = layout.image_sample.unique_consecutive(return_inverse=True)
        first = torch.searchsorted(layout.image_sample, samples)  # the first image of each prompt
        places = layout.token_positions[layout.is_global]
        question_mask = question_mask & ~covered_by(prompt.input_ids, self.config.user_token_ids)[layout.image_sample]
        embeds = question[first].index_put((owner[:, None], places), glance.to(question.dtype))
        glances = layout.is_global[:, None].expand(-1, layout.tokens_per_tile)
        keep = positions_to_keep(prompt.attention_mask, layout, glances)[samples]
        texts = (prompt.attention_mask[samples], 0), (prompt.position_ids[samples], 0), (question_mask[first], False)
        (embeds, mask, positions, words), kept = splice(keep, (embeds, 0.0), *texts)
        _, rows = splice(words)
        is_word = (rows >= 0)[owner, :, None]
        rows = torch.cat([rows.clamp(min=0), torch.searchsorted(kept, self.answer[first, None])], dim=1)
        cells = torch.searchsorted(kept[owner], places)[:, None].expand(-1, rows.shape[1], -1)
        maps = []
        for weights in islice(attention_of_rows(self.text_model, embeds, mask, positions, rows), layers):
            weights = weights.mean(1)[owner].gather(2, cells)
            maps.append(torch.stack([(weights[:, :-1] * is_word).amax(1), weights[:, -1]], dim=1))
        return shares(torch.stack(maps, dim=1))


def make_pointer(model, kind: str = "selector", request=None) -> Pointer:
    """A pointer of a [`QGSASmolVLMModel`]: its trained selector, or ("attention") its text model's own attention.

    Args:
        request: the call that the attention is read for, with its prompt, layout, answer position and budget.
    """
    config = model.config
    if kind == "selector":
        return SelectorPointer(model.selector, model.complexity_estimator, config.complexity_quantile)
    budget = request.budget if request.count is None else request.count.limits(request.budget)
    read = (request.prompt, request.layout, request.answer_position, budget)
    return AttentionPointer(model.text_model, config, *read)


def point_nowhere(glance: torch.Tensor) -> Pointing:
    """In place of a pointer that is not needed: all cells of `glance` `(I, C, D)` are alike, and complexity is 1."""
    images, cells, _ = glance.shape
    relevance = glance.new_full((images, cells), -math.log(cells))
    return Pointing(relevance, relevance[:, :0], relevance.new_ones(images), relevance[:, :0])


def shares(weights: torch.Tensor) -> torch.Tensor:
    """Divide by the sum over the last dimension; 0 stays 0."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def attention_layers(layers: int) -> int:
    """How many of the text model's `layers` are read without calibration, from the first one on: three quarters.

    Where models were looked into, the layers that localize lie before, and the pass is shorter.
    """
    return math.ceil(0.75 * layers)


def attention_scores(maps: torch.Tensor, weights: list[list[float]] | None) -> torch.Tensor:
    """Scores of the cells, `(I, C)` float32, from attention maps `(I, layers, 2, C)`.

    Args:
        weights: `layers x 2`; None standardizes the maps over the cells, averages them over the layers, and takes the
            greater of the two rows at each cell.
    """
    if weights is not None:
        return torch.einsum("ilrc,lr->ic", maps, maps.new_tensor(weights))
    spread = maps.std(-1, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    return ((maps - maps.mean(-1, keepdim=True)) / spread).mean(1).amax(1)


def nowhere_share(scores: torch.Tensor, temperature: float, nowhere: float | None) -> torch.Tensor:
    """The relevance of looking nowhere, `(I,)`, if it had a score among those of the cells, `(I, C)`; 0 without one.

    It tells a question about nothing that is visible from one about everything: the cells are alike in both.
    """
    if nowhere is None:
        return torch.zeros_like(scores[:, 0])
    return (nowhere / temperature - (scores / temperature).logsumexp(1)).sigmoid()


def tiles_to_cover(mass: torch.Tensor, layout: VisualLayout, coverage: float, nowhere: torch.Tensor) -> torch.Tensor:
    """How many tiles of each image, the most relevant ones first, cover a share of its relevance, `(I,)` int64.

    Args:
        mass: `(T,)`, the relevance of every tile.
        coverage: the share, 0 to 1; 1 takes all tiles.
        nowhere: `(I,)`, the relevance of looking nowhere, which counts as covered; see `nowhere_share`.
    """
    if coverage == 1:
        return layout.grids.prod(1)
    covered = to_images(mass, layout, 0.0).sort(1, descending=True).values.cumsum(1)
    wanted = (coverage - nowhere) / (1 - nowhere).clamp(min=torch.finfo(mass.dtype).eps) * covered[:, -1]
    return ((covered < wanted[:, None]).sum(1) + 1).where(wanted > 0, 0).minimum(layout.grids.prod(1))


def pointer_zero(pointer: Pointer, hidden: torch.Tensor, config: QGSAConfig) -> torch.Tensor:
    """0, through which every weight of `pointer` gets a gradient: 0.

    An answer teaches the estimator nothing, and without images not even the selector, but DDP waits for a gradient of
    every trained weight. Added to the hidden states, it reaches every loss that is computed from them. The pointer is
    called as usual, on a blank glance and question, so that adapters and sharded weights take part. No value of its
    result is read: this is 0 even if a weight is not finite.

    Args:
        hidden: `(..., D)`, gives dtype and device.

    Returns a scalar of the dtype of `hidden`.
    """
    glance = hidden.new_zeros(1, config.tokens_per_tile, hidden.shape[-1])
    word = torch.ones_like(glance[:, :1, 0], dtype=torch.bool)
    pointing = pointer.point(glance[:, :1], word, glance)
    match = pointer.match(pointing.question_state, glance, is_global=word[0])
    outputs = (pointing.relevance, pointing.question_state, pointing.complexity_logits, match)
    return torch.stack([output.flatten()[:0].sum().to(hidden) for output in outputs]).sum()


@dataclass(frozen=True)
class Glance:
    """A batch before any tile is encoded: the pointer, the layout, the global views, and the [`Pointing`]."""

    pointer: Pointer | None  # None if it is not needed
    layout: VisualLayout
    features: torch.Tensor  # (I, P, D), features of the global views
    question_mask: torch.Tensor  # (I, L) bool, the words that the pointer read
    relevance: torch.Tensor
    question_state: torch.Tensor
    complexity: torch.Tensor
    complexity_logits: torch.Tensor


@dataclass(frozen=True)
class PointedScores:
    """Scores that follow from the relevance and the match of the pointer."""

    glance: Glance

    @property
    def asked(self) -> torch.Tensor:
        """Whether anything is asked about each image, `(I,)` bool: without a question there is nothing to rank by."""
        return self.glance.question_mask.any(1)

    def of_tiles(self) -> torch.Tensor:
        """Scores of all tiles before they are encoded, `(T,)`: their share of the relevance."""
        return tile_relevance(self.glance.relevance.exp(), self.glance.layout)

    def of_places(self) -> torch.Tensor:
        """Scores of all visual tokens before they are encoded, `(T, P)`: the relevance of their places."""
        return token_relevance(self.glance.relevance, self.glance.layout)

    def of_tokens(self, features: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        """Scores of the tokens of the encoded `tiles` `(T,)` bool from their `features` `(n, P, D)`: `(n, P)`."""
        glance, layout = self.glance, self.glance.layout
        image = layout.tile_image[tiles]
        places = glance.relevance[image].gather(1, token_cells(layout)[tiles])
        if glance.pointer is None:  # everything is kept
            return places
        return places + glance.pointer.match(glance.question_state[image], features, layout.is_global[tiles])


@dataclass(frozen=True)
class GivenScores:
    """Scores from elsewhere, such as a guide or a baseline, `(T, P)`. A tile's score is that of its best token."""

    scores: torch.Tensor
    asked = None  # they hold with and without a question

    @classmethod
    def of(cls, scores: torch.Tensor, layout: VisualLayout) -> "GivenScores":
        """From scores of all visual tokens in prompt order, `(B, N)`. Raises ValueError if their size is wrong."""
        check_shape("visual_token_scores", scores, (None, None))
        samples, per_tile = len(layout.tile_of_position), layout.tokens_per_tile
        most = int(layout.tiles_per_sample.max()) * per_tile
        if tuple(scores.shape) != (samples, most):
            raise ValueError(
                f"visual_token_scores has shape {tuple(scores.shape)}: the prompts hold {samples} samples of at most "
                f"{most} visual tokens"
            )
        if not scores.isfinite().all():
            raise ValueError("visual_token_scores holds NaN or infinite values")
        return cls(scores.view(samples, -1, per_tile)[layout.tile_sample, layout.tile_ordinal].float())

    def of_tiles(self) -> torch.Tensor:
        return self.scores.amax(1)

    def of_places(self) -> torch.Tensor:
        return self.scores

    def of_tokens(self, features: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        return self.scores[tiles]
