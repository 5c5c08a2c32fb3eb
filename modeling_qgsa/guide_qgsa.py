"""What a guide makes of a batch (its answer, how sure it is, where it looked), and the same for another model's tiles.

"A Stitch in Time Saves Nine" (SGL, Zhao et al., CVPR 2025). Sizes as in `layout_qgsa`.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .attention_qgsa import attention_of_rows
from .cache_qgsa import Past
from .calibration_qgsa import KEEP_ALL
from .configuration_qgsa import MAX_BUDGET
from .interaction_qgsa import check_prune_layer
from .layout_qgsa import VisualLayout, tile_relevance, to_samples, token_cells
from .outputs_qgsa import Prefill
from .pointer_qgsa import tiles_to_cover
from .prompt_qgsa import Prompt
from .request_qgsa import Request
from .selection_qgsa import positions_to_keep, splice, top_k_per_image
from .utility_qgsa import read_answers


VIEWS = ("dense", "selection", "glance")
SCORES = ("attention", "pointer")
CONSISTENCY = 0.05  # share of the visual tokens that an answer is read again with
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@dataclass(frozen=True)
class Guidance:
    """How guide and target share the work.

    Args:
        view: what the guide looks at: "dense", everything, as published; "selection", what its own pointer selects;
            "glance", the global views alone.
        scores: "attention", the attention of all text rows behind the image and of the answer, summed over layers and
            heads, as published; "pointer", the relevance that the guide's own pointer reads from the glance.
        prune_layer: None chooses the tiles that the target encodes; a number is that of the layers of its text model
            that see all visual tokens, as published (K), before only `retention` of them stay.
        retention: the share of the visual tokens of an image that stay behind those layers (R), in (0, 1].
        max_tiles: the number of tiles of an image that are encoded at most, with `prune_layer` None.
        coverage: they are as few as cover this share of the guide's map, in (0, 1].
        exit_threshold: the guide answers alone if the mean of its confidence and its consistency is at least this;
            None asks the target always.
        calibration: what `calibrate` measured.
    """

    view: str = "dense"
    scores: str = "attention"
    prune_layer: int | None = None
    retention: float = 0.35
    max_tiles: int = 4
    coverage: float = 1.0
    exit_threshold: float | None = None
    calibration: dict[str, Any] | None = None

    def check(self, layers: int):
        """Raise ValueError, naming the field, if it does not fit a target of so many layers."""
        check_prune_layer(self.prune_layer, layers)
        for name, known in (("view", VIEWS), ("scores", SCORES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} ({getattr(self, name)!r}): choose from {', '.join(known)}")
        for name in ("retention", "coverage"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be in (0, 1]")
        if not 0 <= self.max_tiles <= MAX_BUDGET:
            raise ValueError(f"max_tiles ({self.max_tiles}) must be in 0 .. {MAX_BUDGET}")


# The guide


class Answer(NamedTuple):
    """Greedy answers.

    Args:
        ids: `(B, n)` int64; anything behind their ends.
        shown: `(B, n)` bool, the tokens of the answers, with those that end them.
        confidence: `(B,)` float32, the geometric mean of the probabilities of these tokens; nan if nobody asked.
    """

    ids: torch.Tensor
    shown: torch.Tensor
    confidence: torch.Tensor


class GuideReading(NamedTuple):
    """What a guide made of a batch.

    Args:
        layout: the places of its tiles.
        scores: `(T, P)` float32, of all of its visual tokens; 0 for those without any.
        scored: `(T,)` bool, the tiles whose tokens have scores of their own; elsewhere the glance's hold.
        seen: `(T,)` bool, the tiles that it looked at.
        answer: its answers.
        consistency: `(B,)` float32, as the confidence of the same answers, with 5 % of the visual tokens.
    """

    layout: VisualLayout
    scores: torch.Tensor
    scored: torch.Tensor
    seen: torch.Tensor
    answer: Answer
    consistency: torch.Tensor

    @property
    def sureness(self) -> torch.Tensor:
        """What is compared with the threshold, `(B,)`: the mean of confidence and consistency."""
        return (self.answer.confidence + self.consistency) / 2


def look(model, inputs: dict[str, Any], guidance: Guidance) -> tuple[Request, Prefill]:
    """Prompt and prefill of a guide that looks at what `guidance.view` allows; the rest of `inputs` stays there."""
    config, options = model.config, {}
    layout = VisualLayout.of(config, inputs["input_ids"])
    everything = guidance.view == "dense" or (guidance.view == "selection" and config.selection == "dense")
    if everything:
        options = dict(KEEP_ALL)
    elif guidance.view == "glance":
        options = {"selection": "before_encoder", "min_tiles": 0, "max_tiles": 0}
        options |= dict.fromkeys(("min_visual_tokens", "max_visual_tokens"), config.tokens_per_tile)
    if everything and guidance.scores == "attention":  # no pointer is needed
        options["visual_token_scores"] = to_samples(
            torch.zeros_like(layout.token_positions, dtype=torch.float), layout
        )
        options["complexity"] = torch.ones(len(layout.grids), device=layout.tile_start.device)
    inputs |= options
    request = Request.take(config, inputs)
    return request, model.model.prefill(request)


def end_of_answers(answers: torch.Tensor, eos_token_id: int | list[int] | None) -> torch.Tensor:
    """The tokens of `answers` `(B, n)` up to the first that ends them, bool in the same shape."""
    ends = [] if eos_token_id is None else eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    ended = torch.isin(answers, answers.new_tensor(ends)).long().cumsum(1)
    return F.pad(ended[:, :-1], (1, 0)) == 0


def with_answers(request: Request, answers: torch.Tensor, is_answer: torch.Tensor) -> tuple[Prompt, VisualLayout]:
    """The prompts of `request` with their answers behind them, as labels, and their layout."""
    prompt, layout = request.prompt, request.layout
    assert prompt is not None and layout is not None
    unlabelled = torch.full_like(prompt.input_ids, -100)
    extended = Prompt(
        torch.cat([prompt.input_ids, answers], 1),
        torch.cat([prompt.attention_mask, is_answer.to(prompt.attention_mask)], 1),
        torch.cat([prompt.position_ids, prompt.position_ids[:, -1:] + is_answer.long().cumsum(1)], 1),
        torch.cat([unlabelled, answers.masked_fill(~is_answer, -100)], 1),
    )
    tile_of_position = F.pad(layout.tile_of_position, (0, answers.shape[1]), value=-1)
    return extended, replace(layout, tile_of_position=tile_of_position)


@torch.no_grad()
def summed_attention(
    model, prompt: Prompt, layout: VisualLayout, embeds: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Attention to every visual token, summed over rows, layers and heads: `(T, P)` float32, 0 for those not kept.

    The rows are those of all text behind the first image and of the answers; the last token of an answer predicts
    nothing and is left out (SGL, section 3.2). Memory is O(rows x positions).

    Args:
        prompt: the prompts with their answers as labels.
        embeds: `(B, L, D)`, with the features of the `kept` `(T, P)` visual tokens.
    """
    is_visual = layout.tile_of_position >= 0
    last = F.pad(prompt.labels[:, 1:], (0, 1), value=-100) == -100
    rows = ~is_visual & (is_visual.cumsum(1) > 0) & ~(last & (prompt.labels != -100))
    keep = positions_to_keep(prompt.attention_mask, layout, kept, model.config.keep_tile_markers)
    texts = (prompt.attention_mask, 0), (prompt.position_ids, 0), (rows, False)
    (embeds, mask, positions, rows), held = splice(keep, (embeds, 0.0), *texts)
    _, rows = splice(rows)
    total = embeds.new_zeros(embeds.shape[:2], dtype=torch.float32)
    for weights in attention_of_rows(model.model.text_model, embeds, mask, positions, rows.clamp(min=0)):
        total += (weights * (rows >= 0)[:, None, :, None]).sum((1, 2))
    places = total.new_zeros(keep.shape).scatter_add(1, held.clamp(min=0), total.masked_fill(held < 0, 0))
    return places[layout.tile_sample[:, None], layout.token_positions] * kept


def answer_greedily(model, prefill: Prefill, input_ids: torch.Tensor, options: dict[str, Any]) -> Answer:
    """Answers after a `prefill`; `options` of `generate`, in so far as they limit the length."""
    output = model.generate_from(prefill, input_ids, Past.of(None, None), **{**options, **GREEDY})
    ids = output.sequences[:, input_ids.shape[1] :]
    configured = options.get("generation_config") or model.generation_config
    shown = end_of_answers(ids, options.get("eos_token_id") or configured.eos_token_id)
    steps = zip(output.logits, ids.unbind(1))
    chances = torch.stack([each.float().log_softmax(-1).gather(1, step[:, None])[:, 0] for each, step in steps], 1)
    return Answer(ids, shown, ((chances * shown).sum(1) / shown.sum(1)).exp())


@torch.no_grad()
def read_with_few(
    model, prompt: Prompt, layout: VisualLayout, embeds: torch.Tensor, kept: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    """Geometric mean of the probabilities of the answers' tokens, given 5 % of the `kept` visual tokens: `(B,)`.

    Args:
        prompt: the prompts with their answers as labels.
        scores: `(T, P)`, those of each image with the highest ones stay.
    """
    counts = torch.zeros(len(layout.grids), device=embeds.device).index_add(0, layout.tile_image, kept.sum(1).float())
    shown = top_k_per_image(scores, kept, layout, (counts * CONSISTENCY).ceil().long())
    keep = positions_to_keep(prompt.attention_mask, layout, shown, model.config.keep_tile_markers)
    samples = torch.arange(len(keep), device=embeds.device)
    return (read_answers(model, samples, keep, embeds, prompt).log_likelihood / (prompt.labels != -100).sum(1)).exp()


@torch.no_grad()
def ask_guide(model, inputs: dict[str, Any], guidance: Guidance) -> GuideReading:
    """Let the guide answer greedily, and read where it looked and how sure it is.

    Args:
        inputs: of one model, with images, and options that limit the length of an answer.
    """
    options = dict(inputs)
    request, prefill = look(model, options, guidance)
    prompt, layout, chosen = request.prompt, request.layout, prefill.selection
    assert prompt is not None and layout is not None
    assert chosen.kept_tokens is not None and chosen.kept_tiles is not None
    place = layout.tile_sample, layout.tile_ordinal
    kept, seen = chosen.kept_tokens.unflatten(1, (-1, layout.tokens_per_tile))[place], chosen.kept_tiles[place]
    nothing, sure = prompt.input_ids[:, :0], torch.full((len(prompt.input_ids),), float("nan"), device=kept.device)
    answer, scores, scored, consistency = Answer(nothing, nothing.bool(), sure), kept * 0.0, layout.is_global, sure
    if guidance.scores == "pointer":
        scores[scored] = prefill.glance.relevance.exp().float()
    if guidance.scores == "attention" or guidance.exit_threshold is not None:
        answer = answer_greedily(model, prefill, prompt.input_ids, options)
        prompt, longer = with_answers(request, answer.ids, answer.shown)
        embeds = model.model.embed(prompt.input_ids, longer, prefill.features, seen)
        if guidance.scores == "attention":
            scores, scored = summed_attention(model, prompt, longer, embeds, kept), seen
        if guidance.exit_threshold is not None:
            consistency = read_with_few(model, prompt, longer, embeds, kept, fill(scores, scored, layout))
    return GuideReading(layout, scores, scored, seen, answer, consistency)


# From the guide's map to the target's


def fill(scores: torch.Tensor, scored: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """Scores `(T, P)` with those of the glance, spread over what its cells cover, at tiles not `scored` `(T,)`."""
    glance = scores[layout.is_global][layout.tile_image].gather(1, token_cells(layout))
    tiles = layout.grids.prod(1).clamp(min=1)[layout.tile_image, None]
    return torch.where(scored[:, None], scores, glance / tiles)


def overlap(cells: int, sources: int, device=None) -> torch.Tensor:
    """The share of each of `sources` equal intervals of the unit interval in each of `cells`: `(cells, sources)`."""
    low, high = (torch.arange(end, end + cells, dtype=torch.float64, device=device)[:, None] / cells for end in (0, 1))
    edges = torch.arange(sources + 1, dtype=torch.float64, device=device) / sources
    return ((torch.minimum(high, edges[1:]) - torch.maximum(low, edges[:-1])).clamp(min=0) * sources).float()


def to_map(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Values of the tokens of `rows` x `columns` tiles, `(tiles, P)`, as one map of the image."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, columns * side)


def resample(scores: torch.Tensor, source: VisualLayout, target: VisualLayout) -> torch.Tensor:
    """Scores of visual tokens `(T, P)` for the tokens of other tiles of the same images, `(T', P')`.

    Tiles go to tiles and glances to glances, over image coordinates; where an image has no tiles, its glance stands in
    for them. The sum over an image stays the same. Equal grids give equal scores.
    """
    if torch.equal(source.grids, target.grids) and source.tokens_per_tile == target.tokens_per_tile:
        return scores
    resampled = scores.new_zeros(len(target.tile_image), target.tokens_per_tile)
    side = round(target.tokens_per_tile**0.5)
    for image, (have, want) in enumerate(zip(source.grids.tolist(), target.grids.tolist())):
        for is_global in (True, False):
            to = (target.tile_image == image) & (target.is_global == is_global)
            if not to.any():
                continue
            from_glance = is_global or not have[0]
            tiles = (source.tile_image == image) & (source.is_global == from_glance)
            values = to_map(scores[tiles], *((1, 1) if from_glance else have))
            rows, columns = (1, 1) if is_global else want
            heights = overlap(rows * side, values.shape[0], values.device)
            widths = overlap(columns * side, values.shape[1], values.device)
            values = (heights @ values @ widths.T).view(rows, side, columns, side).transpose(1, 2)
            resampled[to] = values.reshape(-1, side * side)
    return resampled


def tile_masses(scores: torch.Tensor, layout: VisualLayout) -> torch.Tensor:
    """What the scores `(T, P)` of an image's tokens and of its glance put on each of its tiles: `(T,)`."""
    own = scores.sum(1).masked_fill(layout.is_global, 0)
    return own + tile_relevance(scores[layout.is_global], layout)


def target_options(reading: GuideReading, layout: VisualLayout, guidance: Guidance) -> dict[str, Any]:
    """Options of the target's `generate` that make it look where the guide did.

    Args:
        layout: of the target's prompts.
    """
    tokens = layout.tokens_per_tile
    if guidance.prune_layer is not None:
        filled = fill(reading.scores, reading.scored, reading.layout)
        counts = (layout.grids.prod(1) + 1) * tokens
        kept, most = (counts * guidance.retention).ceil().long(), int(counts.max())
        return {
            "selection": "after_encoder",
            "visual_token_scores": to_samples(resample(filled, reading.layout, layout), layout),
            "prune_layer": guidance.prune_layer,
            "min_visual_tokens": 1,
            "max_visual_tokens": most,
            "complexity": (kept - 1) / max(most - 1, 1),
        }
    masses = tile_masses(resample(reading.scores, reading.layout, layout), layout)
    nowhere = masses.new_zeros(len(layout.grids))
    tiles = tiles_to_cover(masses, layout, guidance.coverage, nowhere).clamp(max=guidance.max_tiles)
    most = max(int(tiles.max()), 1)
    return {
        "selection": "before_encoder",
        "visual_token_scores": to_samples(masses[:, None].expand(-1, tokens), layout),
        "min_tiles": 0,
        "max_tiles": most,
        "min_visual_tokens": tokens,
        "max_visual_tokens": tokens * (1 + most),
        "complexity": tiles / most,
    }
