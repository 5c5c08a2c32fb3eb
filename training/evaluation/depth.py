"""Systems in which vision takes part in few layers of the text model, and what to compare them with."""

import copy
from collections.abc import Sequence
from functools import partial
from math import ceil

from modeling_qgsa.configuration_qgsa import MAX_BUDGET
from modeling_qgsa.schedule_qgsa import letters_of, parse_schedule, trained_schedules, vision_share, within
from training.costs.formula import schedule_flops
from training.evaluation.systems import DENSE, System
from training.methods import METHODS
from training.methods.schedules import at_random, evenly, full_where, shortest


QUANTILES = (0.8, 0.6)  # chances that the schedule of the policy suffices
EVERYTHING = {
    "selection": "after_encoder",
    "pointer": "attention",
    "min_visual_tokens": MAX_BUDGET,
    "max_visual_tokens": MAX_BUDGET,
}


def untrained_systems(dense, ranking: dict, shares: Sequence[float]) -> list[System]:
    """Schedules of the dense model, nothing trained, at some shares of the work, and their rivals at no less work.

    Args:
        dense: the dense checkpoint as a QGSA model.
        ranking: what `rank_vision_layers` returned for it.
    """
    config, systems = dense.config, []
    layers = config.text_config.num_hidden_layers
    ranked = [parse_schedule("ranking", each, layers) for each in ranking["schedules"]]
    for share in shares:
        kinds = within(ranked, share, config)
        assert kinds is not None
        found = {f"ranked, {share:.1%}": letters_of(kinds)}
        for name, make in (
            ("evenly spaced", partial(evenly, layers=layers)),
            ("shortv", partial(shortest, updates=ranking["updates"])),
            ("random layers", partial(at_random, layers=layers)),
        ):
            schedules = [parse_schedule("", make(count), layers) for count in range(layers + 1)]
            enough = [each for each in schedules if vision_share(each, config) >= vision_share(kinds, config)]
            found[f"{name}, {share:.1%}"] = letters_of(min(enough, key=lambda each: vision_share(each, config)))
        systems += [System(name, dense, EVERYTHING | {"vision_budget": letters}) for name, letters in found.items()]
    return systems


def cheaper_schedules(config) -> list[tuple[str, ...]]:
    """The trained schedules of a config that do less work than the stock model."""
    return [kinds for kinds in trained_schedules(config) if set(kinds) != {"full"}]


def by_schedule(model, name: str) -> list[System]:
    """The cheaper schedules of a universal checkpoint, named by their share of the work on visual tokens."""
    return [
        System(
            f"{name}, {vision_share(kinds, model.config):.1%}",
            model,
            EVERYTHING | {"vision_budget": letters_of(kinds)},
        )
        for kinds in cheaper_schedules(model.config)
    ]


def trained_systems(visor) -> list[System]:
    """The cheaper schedules of a universal checkpoint, and its policy, as configured and at lower quantiles."""
    systems = by_schedule(visor, "visor")
    systems.append(System("visor", visor, EVERYTHING))
    for quantile in QUANTILES:
        cheaper = copy.deepcopy(visor)
        cheaper.config.complexity_quantile = quantile
        systems.append(System(f"visor, quantile {quantile}", cheaper, EVERYTHING))
    return systems


def by_depth(model, name: str) -> list[System]:
    """No, one, two, a third and all of the first layers full, the others cross layers."""
    layers = model.config.text_config.num_hidden_layers
    counts = sorted({0, 1, 2, ceil(layers / 3), layers})
    return [
        System(f"{name}, {count} full", model, EVERYTHING | {"vision_budget": full_where(range(count), layers)})
        for count in counts
    ]


def pruning_systems(dense, flops: float, visual: int, words: int, new_tokens: int) -> list[System]:
    """VisionZip and FastV with as many visual tokens as `flops` of the text model allow on them.

    Args:
        flops: of the text model on visual tokens, for one question with `new_tokens`.
        visual, words: numbers of visual tokens and of other tokens in a prompt.
    """
    config, systems = dense.config, []
    full = ("full",) * config.text_config.num_hidden_layers

    def cost(kept, layer):
        pruned = (layer, kept) if layer else None
        return schedule_flops(config, full, visual if layer else kept, words, new_tokens, pruned)["visual"]

    for name, layer in (("visionzip", 0), ("fastv", METHODS["fastv"].prune_layer)):
        affordable = [kept for kept in range(1, visual + 1) if cost(kept, layer) <= flops]
        kept = max(affordable, default=1)
        budget = {"selection": "after_encoder", "min_visual_tokens": kept, "max_visual_tokens": kept}
        systems.append(System(f"{name}, k = {kept}", dense, budget, METHODS[name]))
    return systems


def visual_flops(system: System, tokens: float, share: float, words: int, new_tokens: int) -> float:
    """FLOPs of the text model on `tokens` visual tokens of one question, by formula.

    Args:
        share: the work of the schedule that was chosen, see `vision_share`; 1 for all layers full.
    """
    config = system.model.config
    layers = config.text_config.num_hidden_layers
    known = [parse_schedule("", each, layers) for each in config.vision_schedules or ()]
    given = system.options.get("vision_budget", config.vision_layers)
    known += [("full",) * layers] + ([] if given is None else [parse_schedule("", given, layers)])
    kinds = min(known, key=lambda each: abs(vision_share(each, config) - share))
    method = system.method
    pruned = None if method is None or not method.prune_layer else (method.prune_layer, round(tokens))
    seen = 17 * config.tokens_per_tile if pruned else round(tokens)
    return schedule_flops(config, kinds, seen, words, new_tokens, pruned)["visual"]


def controls(dense, visor) -> list[System]:
    """The stock model, and what it makes of the thumbnail and of nothing."""
    return [
        System("dense", dense, DENSE),
        System("dense-global-only", dense, DENSE, image_kwargs={"do_image_splitting": False}),
        System("blank-image", visor, EVERYTHING, blank=True),
    ]
