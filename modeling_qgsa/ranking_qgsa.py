"""Which layers of the text model can do without vision, measured without labels or training.

ShortV (2025) ranks layers by how much the next token changes if one layer's updates of visual tokens are left out.
Here layers are left out one after the other, each in view of those before, and also keys and values. Sizes as in
`layout_qgsa`.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm

from .calibration_qgsa import KEEP_ALL, prepare
from .interaction_qgsa import Interaction, read_layers
from .request_qgsa import Request
from .schedule_qgsa import cross_share, letters_of


class Reading(NamedTuple):
    """A prompt whose first answer token is predicted under several schedules; `(1, ...)` each."""

    text_inputs: dict[str, torch.Tensor]
    visual: torch.Tensor  # (1, L') bool
    full: torch.Tensor  # (V,) log-probabilities with all layers full


def log_probabilities(model, text_inputs: dict[str, torch.Tensor], visual: torch.Tensor, kinds: Sequence[str]):
    """Log-probabilities of the answer's first token, `(V,)` float32, for one prompt and the kinds of all layers."""
    interaction = Interaction((tuple(kinds),), len(kinds), torch.ones_like(visual), visual)
    base, options = model.model, {"use_cache": False}
    hidden, _ = read_layers(base.text_model, text_inputs, None, interaction, options, base.vision_blocks)
    return model.lm_head(hidden[:, -1]).float().log_softmax(-1)[0]


@torch.no_grad()
def read_prompt(model, inputs: dict[str, Any]) -> Reading:
    """The prompt of one sample over the visual tokens that the configured selection keeps; "dense" keeps all.

    Args:
        inputs: output of the processor for one sample, on the device of the model.
    """
    config = model.config
    layers = ("full",) * config.text_config.num_hidden_layers
    options = KEEP_ALL if config.selection == "dense" else {}
    request = Request.take(config, {**inputs, **options, "vision_budget": layers})
    request.check_selects()
    prefill = model.model.prefill(request)
    visual = inputs["input_ids"].gather(1, prefill.held.clamp(min=0)) == config.image_token_id
    full = log_probabilities(model, prefill.text_inputs, visual, layers)
    return Reading(prefill.text_inputs, visual, full)


@torch.no_grad()
def divergence(model, readings: Sequence[Reading], kinds: Sequence[str]) -> float:
    """How much a schedule changes the first token of the answers: mean KL divergence from all layers full, in nats."""
    found = []
    for each in readings:
        other = log_probabilities(model, each.text_inputs, each.visual, kinds)
        found.append(float((each.full.exp() * (each.full - other)).sum()))
    return sum(found) / len(found)


def changed(kinds: Sequence[str], number: int, kind: str) -> tuple[str, ...]:
    """A schedule with another kind in one layer."""
    return (*kinds[:number], kind, *kinds[number + 1 :])


def leave_out(
    harm: Callable[[Sequence[str]], float], saved: dict[str, float], layers: int
) -> Iterator[tuple[tuple[str, ...], float]]:
    """Schedules from all layers full to all text, each with its harm.

    Each step takes the updates of one layer, or then its keys and values, where that does least harm per work saved.
    A step that was measured earlier is measured again only when it comes first (lazy greedy, Minoux 1978): harm grows
    with what is left out already, so that an old measurement is a lower bound.

    Args:
        harm: of a schedule, 0 for all layers full.
        saved: the work that a step to each kind, "cross" or "text", saves.
    """
    kinds, now, step = ("full",) * layers, 0.0, 0
    waiting = [(float("-inf"), number, "cross", -1) for number in range(layers)]
    while waiting:
        bound, number, kind, measured = heapq.heappop(waiting)
        if measured < step:
            bound = (harm(changed(kinds, number, kind)) - now) / saved[kind]
            heapq.heappush(waiting, (bound, number, kind, step))
            continue
        kinds, now, step = changed(kinds, number, kind), now + bound * saved[kind], step + 1
        if kind == "cross":
            heapq.heappush(waiting, (float("-inf"), number, "text", -1))
        yield kinds, now


def rank_vision_layers(model, samples: Sequence[dict], processor) -> dict[str, list]:
    """Find a schedule for every amount of work on visual tokens, and write them into `config.vision_ranking`.

    It takes images and questions, 40 at best, but no answers. The samples are read over the visual tokens that the
    configured selection keeps, by three to five passes of the text model per layer and sample.

    Args:
        samples: sequence of dicts with `image` (PIL, or a list of them) and `question`.

    Returns `schedules`, from all layers full to all text, the `divergence` of each, the mean KL of the answer's first
    token from that of all layers full, and `updates`, per layer, that of leaving its updates out alone (ShortV's
    ranking). Raises ValueError, before anything is changed, for no samples, if one cannot be read, and for blocks that
    were never trained: rank before there are blocks, with `vision_cross="own"`.
    """
    if not len(samples):
        raise ValueError("samples (0) must be at least 1")
    blocks, training = model.model.vision_blocks, model.training
    if blocks is not None and not any(block.is_trained for block in blocks):
        raise ValueError(
            'vision_cross ("block"): the blocks of this model were never trained, and cross layers see nothing. Rank '
            'the layers with vision_cross="own", or train first'
        )
    layers = model.config.text_config.num_hidden_layers
    full, share = ("full",) * layers, cross_share(model.config)
    saved = {"cross": 1 - share, "text": share}
    try:
        model.eval()
        readings = []
        for inputs in tqdm(prepare(samples, processor), total=len(samples), desc="reading of samples"):
            readings.append(read_prompt(model, {name: value.to(model.device) for name, value in inputs.items()}))
        with tqdm(total=2 * layers, desc="ranking of layers") as progress:
            alone = [divergence(model, readings, changed(full, number, "cross")) for number in range(layers)]
            schedules, found = [full], [0.0]
            for kinds, harm in leave_out(lambda each: divergence(model, readings, each), saved, layers):
                schedules.append(kinds)
                found.append(harm)
                progress.update()
    finally:
        model.train(training)
    model.config.vision_ranking = [letters_of(kinds) for kinds in schedules]
    return {"schedules": model.config.vision_ranking, "divergence": found, "updates": alone}
