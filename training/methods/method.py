"""The signature that all selection methods share: `score(given)` returns one score per visual token.

A method is a function and a line that names it, in a file of its own; `training/methods/__init__.py` lists them all.
Sizes in the docstrings: B samples, I images, T tiles (global views included), P visual tokens per tile, D the width of
the text model, n the visual tokens of one image. Tiles, images and tokens are in prompt order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.layout_qgsa import VisualLayout, to_samples
from modeling_qgsa.request_qgsa import Request, VisualInputs
from modeling_qgsa.vision_qgsa import encode_tiles


@torch.no_grad()
def encode_all(model, inputs: dict) -> torch.Tensor:
    """Features of every tile, `(T, P, D)`: `image_hidden_states` of the inputs if given, else encoded from pixels."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    layout = VisualLayout.of(model.config, inputs["input_ids"])
    visual = VisualInputs(*map(inputs.get, ("pixel_values", "pixel_attention_mask", "image_hidden_states")))
    return encode_tiles(model.model, visual, layout, torch.ones_like(layout.is_global))


def budget_per_image(model, inputs: dict, layout: VisualLayout, budget: Budget, features: torch.Tensor) -> list[int]:
    """The number of visual tokens that `budget` allows each image, given the complexity of its question.

    The glance is read from `features` `(T, P, D)`, so that nothing is encoded for it.
    """
    if budget.min_visual_tokens == budget.max_visual_tokens:
        return [budget.max_visual_tokens] * len(layout.grids)
    text = {name: inputs.get(name) for name in ("input_ids", "attention_mask", "question_mask")}
    given = {**text, "image_hidden_states": features, "selection": "after_encoder"}
    glance = model.model.glance_and_point(Request.take(model.config, given))
    return budget.resolve(glance.complexity)[1].tolist()


@dataclass
class MethodInputs:
    """Inputs that a method may use for its scores, computed on first access.

    Args:
        model: a [`QGSASmolVLMForConditionalGeneration`] in eval mode.
        inputs: inputs of `generate`, on the model's device.
        layout: [`VisualLayout`] of `inputs["input_ids"]`.
        budget: visual tokens to keep per image, or a [`Budget`] that depends on each question's complexity.
        generator: CPU source of random numbers; torch's global one if None.
    """

    model: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    layout: VisualLayout
    budget: int | Budget
    generator: torch.Generator | None = None

    @cached_property
    def features(self) -> torch.Tensor:
        """Features of every tile, `(T, P, D)`; each is encoded once."""
        return encode_all(self.model, self.inputs)

    @cached_property
    def k(self) -> list[int]:
        """Visual tokens to keep, one number per image; it may exceed the image's n."""
        if isinstance(self.budget, int):
            return [self.budget] * len(self.layout.grids)
        return budget_per_image(self.model, self.inputs, self.layout, self.budget, self.features)

    @property
    def shape(self) -> tuple[int, int]:
        """B, and the largest number of tiles in a sample."""
        samples = len(self.layout.tile_of_position)
        return samples, int(torch.bincount(self.layout.tile_sample, minlength=samples).max())

    def by_image(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Values of all tokens, `(T, P, ...)`, as one tensor `(n, ...)` per image."""
        tiles = torch.bincount(self.layout.tile_image, minlength=len(self.layout.grids))
        return values.flatten(0, 1).split((tiles * self.layout.tokens_per_tile).tolist())

    def order_scores(self, orders: list[torch.LongTensor]) -> torch.Tensor:
        """Scores `(T, P)` that fall along the order in which tokens were picked; -1 for those that were not.

        Args:
            orders: per image, the picked ones of its n tokens, best first.
        """
        scores = torch.full(self.layout.token_positions.shape, -1.0, device=self.layout.tile_start.device)
        for picked, row in zip(orders, self.by_image(scores)):  # the rows are views of `scores`
            row[picked] = torch.arange(len(picked), 0, -1, dtype=torch.float32, device=row.device)
        return scores


@dataclass(frozen=True)
class Method:
    """A way to choose visual tokens: the k with the highest scores of each image are kept.

    Args:
        name: as in `results.json` and `--systems`.
        score: takes [`MethodInputs`] and returns scores, `(T, P)` float; or features `(T, P, D)` and scores, if it
            changes the features. It never sees an answer.
        selection: "after_encoder" for a method that needs every tile encoded; "before_encoder" for a control, whose
            scores need no features and choose the tiles too (a tile's score is the highest of its tokens).
        paper: where the method is published.
        prune_layer: the number of layers of the text model that see every token; None for 0.
    """

    name: str
    score: Callable[[MethodInputs], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
    selection: str = "after_encoder"
    paper: str = ""
    prune_layer: int | None = None

    @torch.no_grad()
    def options(
        self, model, inputs: dict, layout: VisualLayout, k: int | Budget, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        """Options of `generate` that make it keep this method's tokens; arguments as in [`MethodInputs`].

        They take precedence over `inputs` of the same name.

        Returns `visual_token_scores` `(B, N)` float32, where N is the largest number of visual tokens in a sample and
        0 pads shorter rows; for "after_encoder" also `image_hidden_states` `(T, P, D)`; `prune_layer` if it has one.
        """
        given = MethodInputs(model, inputs, layout, k, generator)
        scores, options = self.score(given), {}
        if self.selection == "after_encoder":
            features, scores = scores if isinstance(scores, tuple) else (given.features, scores)
            options["image_hidden_states"] = features
        if self.prune_layer is not None:
            options["prune_layer"] = self.prune_layer
        return options | {"visual_token_scores": to_samples(scores.float(), layout)}
