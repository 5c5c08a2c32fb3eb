"""The systems of a pair of models: SGL as published and before the encoder, its parts alone, and what to compare."""

from dataclasses import replace
from functools import partial
from math import ceil

import numpy as np

from modeling_qgsa import GuidedVLM
from training.evaluation.answers import Answers
from training.evaluation.systems import DENSE, System, whole_tiles
from training.methods import METHODS
from training.methods.fastv import fastv


RETENTIONS = (0.64, 0.35, 0.09)  # of the visual tokens, averaged over the layers: the rows of SGL's paper
DEPTHS = {0.64: 0.4, 0.35: 0.2, 0.09: 0.0}  # the share of the layers that see all of them there
TILES = (1, 3)


def retention_behind(average: float, layer: int, layers: int) -> float:
    """What to retain behind `layer` of `layers` layers, so that the layers see the share `average` of the tokens.

    Raises ValueError if the first layers alone see more.
    """
    behind = (average - layer / layers) / (1 - layer / layers)
    if behind <= 0:
        raise ValueError(f"average ({average}): {layer} of {layers} layers see more already")
    return behind


def pruning_systems(guide, target, processor) -> list[System]:
    """SGL and its rivals behind a layer of the target's text model, at equal average retention, which is in the name.

    FastV prunes behind its second layer, and at 9 % behind the first, whose attention it then reads.
    """
    layers, systems = target.config.text_config.num_hidden_layers, []
    tokens = target.config.tokens_per_tile * 17  # of the largest image of cards
    for average in RETENTIONS:
        share, layer = f"{average:.0%}", round(DEPTHS[average] * layers)
        fast = 2 if 2 / layers < average else 1
        for name, first in dict.fromkeys([(f"sgl, {share}", layer), (f"sgl, {share}, K = {fast}", fast)]):
            if name == f"sgl, {share}" or layer < fast:
                kept = retention_behind(average, first, layers)
                systems.append(System(name, GuidedVLM(guide, target, processor, prune_layer=first, retention=kept)))
        kept = ceil(tokens * retention_behind(average, fast, layers))
        method = replace(METHODS["fastv"], score=partial(fastv, layer=fast), prune_layer=fast)
        budget = {"selection": "after_encoder", "min_visual_tokens": kept, "max_visual_tokens": kept}
        systems.append(System(f"fastv, {share}", target, budget, method))
        kept = ceil(tokens * average)
        budget = {"selection": "after_encoder", "min_visual_tokens": kept, "max_visual_tokens": kept}
        for name in ("divprune", "random"):
            systems.append(System(f"{name}, {share}", target, budget, METHODS[name]))
    return systems


def tile_systems(guide, target, processor, coverage: float, pointing_guide=None) -> list[System]:
    """SGL before the target's encoder, by what the guide looks at, and the target's own pointer at equal tiles.

    A guide that looks at its own selection is the calibrated one, if there is one.
    """
    make, systems = partial(GuidedVLM, guide, target, processor), []
    for tiles in TILES:
        fixed = {"selection": "before_encoder"} | whole_tiles(target.config, tiles)
        systems.append(System(f"sgl-before-encoder, m = {tiles}", make(max_tiles=tiles)))
        systems.append(System(f"qgsa-attention, m = {tiles}", target, {"pointer": "attention"} | fixed))
        systems.append(System(f"random, m = {tiles}", target, fixed, METHODS["random-tiles"]))
    most = max(TILES)
    for view, thrifty in (("selection", pointing_guide or guide), ("glance", guide)):
        pair = GuidedVLM(thrifty, target, processor, max_tiles=most, view=view)
        systems.append(System(f"sgl-before-encoder, {view}, m = {most}", pair))
    systems.append(System("sgl-before-encoder, coverage", make(max_tiles=16, coverage=coverage)))
    return systems


def pointer_systems(guide, target, processor) -> list[System]:
    """The guide's calibrated pointer, which reads its glance alone, at a number of tiles and with its own coverage."""
    most, systems = max(TILES), []
    for name, tiles, coverage in ((f"m = {most}", most, 1.0), ("coverage", 16, guide.config.attention_coverage)):
        fields = {"view": "glance", "scores": "pointer", "max_tiles": tiles, "coverage": coverage}
        systems.append(System(f"sgl-before-encoder, pointer, {name}", GuidedVLM(guide, target, processor, **fields)))
    return systems


def guides_alone(guide, target, processor) -> list[System]:
    """The guide alone, by what it looks at."""
    glance = GuidedVLM(guide, target, processor, view="glance", exit_threshold=0.0)
    return [System("guide", guide, DENSE), System("guide, glance", glance)]


def exit_pairs(guide, target, processor, coverage: float) -> dict[str, GuidedVLM]:
    """Pairs whose guide may answer alone, once they are calibrated; the thriftiest comes last."""
    make, layers = partial(GuidedVLM, guide, target, processor), target.config.text_config.num_hidden_layers
    return {
        "sgl-exit": make(prune_layer=layers),  # else the target sees everything
        "sgl-exit, coverage": make(max_tiles=16, coverage=coverage),
        "sgl-exit, glance": make(prune_layer=layers, view="glance"),
        "sgl-exit, glance, coverage": make(max_tiles=16, coverage=coverage, view="glance"),
    }


def guided_systems(guide, target, processor, coverage: float, pointing_guide=None, calibrated=None) -> list[System]:
    """All systems of the table; the first is the target alone, which all others are paired with.

    Args:
        coverage: share of the guide's map that the tiles cover in the rows called so.
        pointing_guide: the guide, calibrated.
        calibrated: the target, calibrated.
    """
    systems = [
        System("dense", target, DENSE),
        *guides_alone(guide, target, processor),
        System("dense-global-only", target, DENSE, image_kwargs={"do_image_splitting": False}),
        System("blank-image", target, DENSE, blank=True),
    ]
    systems += pruning_systems(guide, target, processor)
    systems += tile_systems(guide, target, processor, coverage, pointing_guide)
    if pointing_guide is not None:
        systems += pointer_systems(pointing_guide, target, processor)
    if calibrated is not None:
        systems.append(System("qgsa-calibrated", calibrated))
    return systems


def exit_curve(answers: Answers, guide: np.ndarray, target: np.ndarray, points: int = 21) -> list[dict]:
    """Accuracy by the share of questions that the guide answers alone, the surest ones first.

    Args:
        answers: of a pair that asks how sure the guide is of every question.
        guide, target: `(n,)` grades of the two alone; the guide looks at what it looks at in the pair.
    """
    order, curve = np.argsort(-np.array(answers.sureness), kind="stable"), []
    for share in np.linspace(0, 1, points):
        alone = order[: round(share * len(order))]
        grades = target.copy()
        grades[alone] = guide[alone]
        threshold = float(answers.sureness[alone[-1]]) if len(alone) else None
        curve.append({"exits": float(share), "accuracy": float(grades.mean()), "threshold": threshold})
    return curve
