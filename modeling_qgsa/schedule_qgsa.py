"""Schedules: how vision takes part in each layer of the text model, and how much work that is.

A layer is `full`, `cross` or `text`, see `interaction_qgsa`. A schedule is the kinds of all layers; in configurations
and calls it may be written with a letter per layer, such as "FFCT".
"""

from collections.abc import Sequence

from transformers.utils import logging


logger = logging.get_logger(__name__)

LAYER_KINDS = ("full", "cross", "text")
LETTERS = {kind[0].upper(): kind for kind in LAYER_KINDS}
VISION_CROSSES = ("own", "block")
BLOCK_KERNEL = 7  # visual tokens, of the convolution in a block, as in VISOR


def check_kinds(name: str, kinds: Sequence[str], layers: int):
    """Raise ValueError, naming the field, unless `kinds` has a known kind for each of `layers` layers."""
    if len(kinds) != layers:
        raise ValueError(f"{name} ({len(kinds)} layers) must have one kind for each of the {layers} layers")
    unknown = sorted(set(kinds) - set(LAYER_KINDS))
    if unknown:
        raise ValueError(f"{name} ({', '.join(map(repr, unknown))}): choose from {', '.join(LAYER_KINDS)}")


def parse_schedule(name: str, given: str | Sequence[str], layers: int) -> tuple[str, ...]:
    """The kinds of all layers, given in words or, as one string, in letters.

    Raises ValueError, naming the field, for another number of layers and for unknown kinds.
    """
    kinds = tuple(LETTERS.get(letter, letter) for letter in given) if isinstance(given, str) else tuple(given)
    check_kinds(name, kinds, layers)
    return kinds


def letters_of(kinds: Sequence[str]) -> str:
    """A schedule in letters, the inverse of `parse_schedule`."""
    return "".join(kind[0].upper() for kind in kinds)


def block_size(text_config) -> tuple[int, int]:
    """Number and width of the heads of a block, see `crossing_qgsa`: a quarter of those of a layer, as wide."""
    width = text_config.head_dim or text_config.hidden_size // text_config.num_attention_heads
    return max(1, round(text_config.num_attention_heads / 4)), width


def cross_share(config) -> float:
    """The work of a cross layer on a visual token, its keys and values, as a share of that of a full layer.

    Args:
        config: a [`QGSAConfig`], whose `vision_cross` says what makes the keys and values.
    """
    text = config.text_config
    head = text.head_dim or text.hidden_size // text.num_attention_heads
    keys, queries = 2 * text.num_key_value_heads * head, 2 * text.num_attention_heads * head
    full, made = keys + queries + 3 * text.intermediate_size, float(keys)
    if config.vision_cross == "block":
        heads, width = block_size(text)
        made = 2 * heads * width * (1 + BLOCK_KERNEL / text.hidden_size)
    return made / full


def vision_share(kinds: Sequence[str], config) -> float:
    """The work of a schedule on a visual token as a share of that of the stock model, 0 to 1, without attention."""
    work = {"full": 1.0, "cross": cross_share(config), "text": 0.0}
    return sum(work[kind] for kind in kinds) / len(kinds)


def within(schedules: Sequence[Sequence[str]], share: float, config) -> tuple[str, ...] | None:
    """The schedule with the most work of at most `share`; None if all of them do more."""
    fitting = [tuple(each) for each in schedules if vision_share(each, config) <= share + 1e-9]
    return max(fitting, key=lambda kinds: vision_share(kinds, config), default=None)


def trained_schedules(config) -> list[tuple[str, ...]]:
    """`config.vision_schedules` of a [`QGSAConfig`], parsed; empty if it is None."""
    layers = config.text_config.num_hidden_layers
    return [parse_schedule("vision_schedules", each, layers) for each in config.vision_schedules or ()]


def ranked_schedules(config) -> list[tuple[str, ...]]:
    """`config.vision_ranking` of a [`QGSAConfig`], parsed; empty if it is None."""
    layers = config.text_config.num_hidden_layers
    return [parse_schedule("vision_ranking", each, layers) for each in config.vision_ranking or ()]


def schedule_of(config, vision_budget: float | str | Sequence[str] | None = None) -> tuple[str, ...] | None:
    """The kinds of all layers in one call, names in `LAYER_KINDS`; None if they are to be chosen for each call.

    Args:
        config: a [`QGSAConfig`]: its `vision_layers` by default; without them all layers are full, unless there are
            `vision_schedules`, of which training draws one and the policy chooses one.
        vision_budget: the kinds of one call, in words or letters ("FFCT"); or the share of the layers' work on visual
            tokens that may be done, 0 to 1: the schedule of `config.vision_schedules`, or else of
            `config.vision_ranking`, that comes closest from below.

    Raises ValueError for another number of layers, unknown kinds, a share out of range, and a share on a checkpoint
    without schedules, or below all of them.
    """
    layers = config.text_config.num_hidden_layers
    if vision_budget is None:
        if config.vision_layers is None and config.vision_schedules:
            return None
        return ("full",) * layers if config.vision_layers is None else tuple(config.vision_layers)
    if not isinstance(vision_budget, (int, float)):
        kinds, trained = parse_schedule("vision_budget", vision_budget, layers), trained_schedules(config)
        if trained and kinds not in trained:
            logger.warning_once(f"vision_budget ({letters_of(kinds)}): this checkpoint was not trained for it")
        return kinds
    if not 0 <= vision_budget <= 1:
        raise ValueError(f"vision_budget ({vision_budget}) must be in 0 .. 1")
    trained, ranked = trained_schedules(config), ranked_schedules(config)
    if not trained and not ranked:
        raise ValueError(
            f"vision_budget ({vision_budget}): the layers of this checkpoint were not ranked. Call "
            'rank_vision_layers, or give a schedule, such as "FFCC" for four layers'
        )
    found = within(trained, vision_budget, config) or within(ranked, vision_budget, config)
    if found is None:
        least = min(vision_share(each, config) for each in trained + ranked)
        raise ValueError(f"vision_budget ({vision_budget}) must be at least {least:.3f}, the least of the schedules")
    return found


def shortlist(config, shares: Sequence[float]) -> list[str]:
    """Schedules of `config.vision_ranking` at some shares of the work, in letters, for `config.vision_schedules`.

    Args:
        shares: 0 to 1, in any order; each gives the schedule that comes closest from below. Duplicates are dropped.

    Raises ValueError as `schedule_of` does.
    """
    ranked = ranked_schedules(config)
    found = [within(ranked, share, config) for share in sorted(shares)]
    if None in found:
        raise ValueError(f"shares ({min(shares)}): below all {len(ranked)} schedules of vision_ranking")
    return list(dict.fromkeys(letters_of(kinds) for kinds in found if kinds is not None))
