"""The policy: how deep vision goes for each question (VISOR), chosen by its estimated complexity.

Sizes as in `layout_qgsa`.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch.nn.functional import cross_entropy, pad

from .calibration_qgsa import ANSWER_TOKENS, prepare
from .layout_qgsa import VisualLayout
from .pointer_qgsa import Glance, complexity_at
from .request_qgsa import Request
from .schedule_qgsa import trained_schedules, vision_share
from .vision_qgsa import VisualCache


TEXTS = ("attention_mask", "question_mask")
HELD_OUT = 5  # every fifth sample measures how far the estimator has learnt
PATIENCE = 50  # steps without progress there, after which the fit ends


def choose_schedules(model, request: Request, glance: Glance) -> list[tuple[str, ...]]:
    """The kinds of all layers for every sample: those of the request, or, if it leaves them open, of the config.

    In training one of `config.vision_schedules` is drawn for all samples, so that one checkpoint learns to serve every
    budget. In inference the policy chooses among them, the first for complexity 0 and the last for 1; without a policy
    all layers are full.

    Args:
        model: a [`QGSASmolVLMModel`].
    """
    config, samples = model.config, len(glance.layout.tile_of_position)
    if request.schedules:
        return list(request.schedules) * (samples // len(request.schedules))
    schedules = trained_schedules(config)
    if model.training:
        return [schedules[int(torch.randint(len(schedules), ()))]] * samples
    if not config.vision_policy:
        return [("full",) * config.text_config.num_hidden_layers] * samples
    complexity = request.complexity
    if complexity is None:
        complexity = complexity_at(complexity_logits(model, request, glance), config.complexity_quantile)
        complexity = complexity.where(glance.question_mask.any(1), 1.0)  # without a question nothing is known
    deepest = complexity.new_zeros(samples).scatter_reduce(0, glance.layout.image_sample, complexity, "amax")
    return [at(schedules, each) for each in deepest.tolist()]


def at(schedules: Sequence[tuple[str, ...]], complexity: float) -> tuple[str, ...]:
    """The schedule for a complexity, 0 to 1."""
    return schedules[round(complexity * (len(schedules) - 1))]


def complexity_logits(model, request: Request, glance: Glance) -> torch.Tensor:
    """Logits of the complexity levels, `(I, levels)`: those that pointing gave, or the estimator's own."""
    if glance.complexity_logits.shape[1]:
        return glance.complexity_logits
    assert request.prompt is not None
    question = model.get_input_embeddings()(request.prompt.input_ids)[glance.layout.image_sample]
    mask = glance.question_mask | ~glance.question_mask.any(1, keepdim=True)
    return model.complexity_estimator(question, mask, glance.features)


class Observed(NamedTuple):
    """What the estimator is to learn from one sample.

    Args:
        question, glance: `(I, 1, D)`, the mean of the question's words and of the glance, as the estimator takes them.
        level: index of the lowest complexity that suffices.
        shares: work on visual tokens of every level.
        enough: whether each level suffices.
    """

    question: torch.Tensor
    glance: torch.Tensor
    level: int
    shares: list[float]
    enough: list[bool]


@torch.no_grad()
def observe_depth(model, inputs: dict[str, Any], target: float) -> Observed:
    """How deep one sample has to be read for the answer that the last of the schedules gives (VISOR's labels).

    A level suffices if the probability of that answer is lower by at most 1 - `target` than at the highest one. For an
    answer that the model is sure of this is VISOR's rule, a share of its probability; a guess, whose probability
    depends on everything that is read, takes no more depth than it is worth. The selector's complexity also drives its
    budget of tiles and tokens.
    """
    config, schedules = model.config, trained_schedules(model.config)
    inputs = {**inputs, "visual_cache": VisualCache()}
    top = {}
    if config.pointer == "selector":
        top["complexity"] = torch.ones(len(VisualLayout.of(config, inputs["input_ids"]).grids), device=model.device)
    answer = model.generate(
        **inputs, **top, vision_budget=schedules[-1], do_sample=False, max_new_tokens=ANSWER_TOKENS
    )
    prompt, new = inputs["input_ids"].shape[1], answer.shape[1] - inputs["input_ids"].shape[1]
    texts = {
        name: pad(inputs[name], (0, new), value=int(name == "attention_mask")) for name in TEXTS if name in inputs
    }
    labels = answer.masked_fill(torch.arange(answer.shape[1], device=answer.device) < prompt, -100)
    probability, shares, known = [], [], {}
    for level in range(config.complexity_levels):
        complexity = level / (config.complexity_levels - 1)
        kinds = at(schedules, complexity)
        spent = {name: torch.full_like(value, complexity) for name, value in top.items()}
        key = (kinds, complexity if spent else None)
        if key not in known:
            given = {**inputs, **texts, **spent, "input_ids": answer, "labels": labels, "vision_budget": kinds}
            known[key] = float((-new * model(**given).loss).exp())
        probability.append(known[key])
        shares.append(vision_share(kinds, config))
    enough = [each >= probability[-1] - (1 - target) for each in probability]
    request = Request.take(config, {**inputs, "vision_budget": schedules[-1]})
    glance = model.model.glance_and_point(request)
    question = model.get_input_embeddings()(inputs["input_ids"])[glance.layout.image_sample]
    present = glance.question_mask[..., None].to(question.dtype)
    words = (question * present).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
    return Observed(words, glance.features.mean(1, keepdim=True), enough.index(True), shares, enough)


def fit_estimator(estimator, observed: Sequence[Observed], steps: int = 500) -> torch.Tensor:
    """Fit a complexity estimator, in place, by full batches; the best step on the held-out samples counts.

    Returns its logits of all samples, `(n, levels)` float32, the highest of those of its images.
    """
    question = torch.cat([each.question for each in observed]).float()
    glance = torch.cat([each.glance for each in observed]).float()
    counts = [len(each.question) for each in observed]
    level = torch.tensor([each.level for each in observed], device=question.device)
    level = level.repeat_interleave(torch.tensor(counts, device=question.device))
    sample = torch.arange(len(observed)).repeat_interleave(torch.tensor(counts))
    held_out = (sample % HELD_OUT == 0).to(question.device)
    present = torch.ones_like(question[..., 0], dtype=torch.bool)
    optimizer = torch.optim.AdamW(estimator.parameters(), lr=3e-3, weight_decay=0.05)
    best, kept, since = float("inf"), copy.deepcopy(estimator.state_dict()), 0
    for _ in range(steps):
        logits = estimator(question, present, glance)
        with torch.no_grad():
            loss = float(cross_entropy(logits[held_out], level[held_out]))
        since += 1
        if loss < best:
            best, kept, since = loss, copy.deepcopy(estimator.state_dict()), 0
        if since == PATIENCE:
            break
        optimizer.zero_grad()
        cross_entropy(logits[~held_out], level[~held_out]).backward()
        optimizer.step()
    estimator.load_state_dict(kept)
    with torch.no_grad():
        return estimator(question, present, glance)


def fit_policy(model, samples: Sequence[dict], processor, target: float = 0.99) -> dict[str, Any]:
    """Fit the estimator of complexity to how deep each question has to be read, and let it choose from now on.

    Choices are those of `config.vision_schedules`. It takes images and questions, several hundred at best, but no
    answers: that of the last schedule is the target. Each sample costs one reading per schedule.

    Args:
        samples: sequence of dicts with `image` (PIL, or a list of them) and `question`.
        target: 0 to 1; the probability of an answer may fall by 1 - `target`.

    Returns what was measured on the fifth of the samples that was held out: `vision_share`, the mean share of the work
    on visual tokens, and `sufficient`, how often the choice suffices. Raises ValueError, before anything is changed,
    without `vision_schedules`, for "dense", for too few samples, and if one cannot be read.
    """
    config, schedules = model.config, trained_schedules(model.config)
    if not schedules:
        raise ValueError("vision_schedules (None): there is nothing to choose from; set them, and train with them")
    if config.selection == "dense":
        raise ValueError('selection ("dense"): the stock model sees everything in every layer; choose another one')
    if config.vision_layers is not None:
        raise ValueError(f"vision_layers ({', '.join(config.vision_layers)}): a fixed schedule; set it to None")
    if not 0 < target <= 1:
        raise ValueError(f"target ({target}) must be in (0, 1]")
    if len(samples) < 2 * HELD_OUT:
        raise ValueError(f"samples ({len(samples)}) must be at least {2 * HELD_OUT}")
    training = model.training
    try:
        model.eval()
        observed = []
        for inputs in tqdm(prepare(samples, processor), total=len(samples), desc="policy"):
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            observed.append(observe_depth(model, inputs, target))
    finally:
        model.train(training)
    estimator = copy.deepcopy(model.model.complexity_estimator).float().requires_grad_(True)
    logits = fit_estimator(estimator, observed)
    model.model.complexity_estimator.load_state_dict(estimator.state_dict())
    config.vision_policy = True
    first = torch.tensor([len(each.question) for each in observed]).cumsum(0).tolist()
    complexity = complexity_at(logits, config.complexity_quantile)
    chosen = [float(complexity[end - len(each.question) : end].max()) for each, end in zip(observed, first)]
    held_out = list(zip(observed, chosen))[::HELD_OUT]
    levels = [(each, round(value * (config.complexity_levels - 1))) for each, value in held_out]
    return {
        "samples": len(samples),
        "held_out": len(levels),
        "vision_share": sum(each.shares[level] for each, level in levels) / len(levels),
        "sufficient": sum(each.enough[level] for each, level in levels) / len(levels),
    }
