"""Pointers: the seam between the glance and the budget. Sizes as in `layout_qgsa`.

A pointer reads question and glance and predicts where to look (`point`); once tiles are encoded, it matches their
tokens with the question (`match`). The trained selector stands behind the seam. The rest of the model sees only
scores: those of the pointer, or those given by a caller.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .configuration_qgsa import QGSAConfig
from .layout_qgsa import VisualLayout, tile_relevance, token_cells, token_relevance
from .prompt_qgsa import check_shape
from .selector_qgsa import ComplexityEstimator, QuestionGuidedSelector


class Pointing(NamedTuple):
    """Output of a pointer, before any tile is encoded.

    Args:
        relevance: `(I, C)` float, log-probabilities of the cells of the glance.
        question_state: `(I, D)`, the vectors that `match` compares visual tokens with.
        complexity: `(I,)` float, 0 to 1: how much of the budget the question needs.
        complexity_logits: `(I, levels)` float, logits for each complexity being the lowest that suffices.
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


def complexity_at(logits: torch.Tensor, quantile: float) -> torch.Tensor:
    """The lowest complexity that suffices with the estimated probability `quantile`, `(I,)` float32 in 0 .. 1.

    Args:
        logits: `(I, levels)`, for each of several evenly spaced complexities being the lowest that suffices.
    """
    highest = logits.shape[1] - 1
    level = (logits.float().softmax(1).cumsum(1) < quantile).sum(1).clamp(max=highest)
    return level / highest


@dataclass(frozen=True)
class Glance:
    """A batch before any tile is encoded: the layout, the global views, and the [`Pointing`]."""

    layout: VisualLayout
    features: torch.Tensor  # (I, P, D), features of the global views
    question_mask: torch.Tensor  # (I, L) bool, the words that the pointer read
    relevance: torch.Tensor
    question_state: torch.Tensor
    complexity: torch.Tensor
    complexity_logits: torch.Tensor


@dataclass(frozen=True)
class PointedScores:
    """Scores that follow from a pointer's relevance and match."""

    pointer: Pointer
    glance: Glance

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
        return places + self.pointer.match(glance.question_state[image], features, layout.is_global[tiles])


@dataclass(frozen=True)
class GivenScores:
    """Scores from elsewhere, such as a guide or a baseline, `(T, P)`. A tile's score is that of its best token."""

    scores: torch.Tensor

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
