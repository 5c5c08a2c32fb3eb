"""Which layers of the text model can do without vision, measured without labels or training.

ShortV (2025) ranks layers by how much the next token changes if a layer's updates of visual tokens are left out; here
also by how much it changes if the layer sees no visual tokens at all. Sizes as in `layout_qgsa`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from .calibration_qgsa import KEEP_ALL, prepare
from .interaction_qgsa import Interaction, read_layers
from .request_qgsa import Request


def one_layer(kind: str, number: int, layers: int) -> tuple[str, ...]:
    """A schedule of `layers` full layers, but one, `number`, of another kind."""
    return tuple(kind if each == number else "full" for each in range(layers))


@torch.no_grad()
def divergences(model, inputs: dict[str, Any], schedules: Sequence[Sequence[str]]) -> torch.Tensor:
    """How much each schedule changes the first token of the answer: KL divergences from all layers full, `(n,)`.

    Args:
        inputs: output of the processor for one sample, on the device of the model.
        schedules: kinds of all layers.
    """
    config, text_model = model.config, model.model.text_model
    layers = config.text_config.num_hidden_layers
    options = KEEP_ALL if config.selection == "dense" else {}
    request = Request.take(config, {**inputs, **options, "vision_budget": ["full"] * layers})
    request.check_selects()
    prefill = model.model.prefill(request)
    visual = inputs["input_ids"].gather(1, prefill.held.clamp(min=0)) == config.image_token_id
    everything = torch.ones_like(visual)
    logits = []
    for kinds in (["full"] * layers, *schedules):
        interaction = Interaction(tuple(kinds), layers, everything, visual)
        hidden, _ = read_layers(text_model, prefill.text_inputs, None, interaction, {"use_cache": False})
        logits.append(model.lm_head(hidden[:, -1]).float().log_softmax(-1)[0])
    full, others = logits[0], torch.stack(logits[1:])
    return (full.exp() * (full - others)).sum(1)


def rank_vision_layers(model, samples: Sequence[dict], processor) -> dict[str, list[float]]:
    """Measure which layers need vision, and write two orders of them, least needed first, into the config.

    It takes images and questions, 40 at best, but no answers, and fills `config.vision_ranking`. Each sample costs two
    passes of the text model per layer, over the visual tokens that the configured selection keeps; "dense" keeps all.

    Args:
        samples: sequence of dicts with `image` (PIL, or a list of them) and `question`.

    Returns, per layer, the mean KL divergence of the answer's first token if its `updates` of visual tokens are left
    out, and if it sees `nothing` of them. Raises ValueError, before anything is changed, for no samples and if one
    cannot be read.
    """
    if not len(samples):
        raise ValueError("samples (0) must be at least 1")
    layers, training = model.config.text_config.num_hidden_layers, model.training
    schedules = [one_layer(kind, number, layers) for kind in ("cross", "text") for number in range(layers)]
    found = torch.zeros(len(schedules), dtype=torch.float64)
    try:
        model.eval()
        for inputs in tqdm(prepare(samples, processor), total=len(samples), desc="ranking of layers"):
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            found += divergences(model, inputs, schedules).double().cpu() / len(samples)
    finally:
        model.train(training)
    updates, nothing = found.split(layers)
    model.config.vision_ranking = [each.argsort(stable=True).tolist() for each in (updates, nothing)]
    return {"updates": updates.tolist(), "nothing": nothing.tolist()}
