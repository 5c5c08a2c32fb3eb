"""SGL: a small model tells a large one where to look, and answers alone if it is sure ("A Stitch in Time Saves Nine",
Zhao et al., CVPR 2025).

    ask       the guide answers; the attention of its text rows to its visual tokens is summed up
    exit      if it is sure of its answer, and would give it with 5 % of its visual tokens, too, that is the answer
    resample  its map, over image coordinates, becomes scores of the target's tiles or visual tokens
    answer    the target looks at the best of them

Sizes as in `layout_qgsa`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ModelOutput, logging

from .cache_qgsa import VISUAL_NAMES
from .calibration_qgsa import bootstrap_interval, prepare
from .guide_qgsa import Guidance, GuideReading, ask_guide, target_options
from .layout_qgsa import VisualLayout
from .modeling_qgsa import QGSASmolVLMForConditionalGeneration
from .processing_qgsa import QGSAProcessor
from .prompt_qgsa import tokenizer_of
from .request_qgsa import VisualInputs
from .selection_qgsa import QGSASelection
from .vision_qgsa import VisualCache, recorded_states, remember_tiles, shares_encoder


logger = logging.get_logger(__name__)
INPUTS = (  # of one model; everything else are options of `generate`
    "input_ids",
    "attention_mask",
    "position_ids",
    "question_mask",
    "pixel_values",
    "pixel_attention_mask",
    "lazy_tiles",
)
LENGTHS = ("max_new_tokens", "min_new_tokens", "max_length", "eos_token_id", "generation_config", "visual_cache")
NEVER = 1.01  # a threshold that no sureness reaches
PARTS = ("guide", "target")  # folders of a saved pair


@dataclass
class GuidedOutput(ModelOutput):
    """Answers of a pair.

    Args:
        sequences (`(B, L + n)` int64): prompts of the target and new ids, as from stock `generate`.
        answered_by_guide (`(B,)` bool): whether the guide answered alone.
        confidence, consistency (`(B,)` float): how sure the guide was, 0 to 1; nan if it was not asked that.
        visual_tokens, tiles (`(B,)` int64): visual tokens that the target kept, and high-resolution tiles that it
            encoded; 0 where the guide answered.
        guide_tiles (`(B,)` int64): high-resolution tiles that the guide encoded.
        selection ([`QGSASelection`]): the target's, of the samples that it answered, in their order; None if there are
            none.
    """

    sequences: torch.Tensor | None = None
    answered_by_guide: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    consistency: torch.Tensor | None = None
    visual_tokens: torch.Tensor | None = None
    tiles: torch.Tensor | None = None
    guide_tiles: torch.Tensor | None = None
    selection: QGSASelection | None = None


def take_samples(inputs: dict[str, Any], rows: torch.Tensor, layout: VisualLayout) -> dict[str, Any]:
    """The inputs of some samples, `rows` `(n,)` int64, of a batch with this `layout`; other options stay."""
    taken, samples = {}, len(layout.tile_of_position)
    for name, value in inputs.items():
        if name == "image_hidden_states":
            value = value[torch.isin(layout.tile_sample, rows)]
        elif name == "lazy_tiles":
            value = value.of_samples(rows.tolist())
        elif torch.is_tensor(value) and value.dim() and len(value) == samples:
            value = value[rows.to(value.device)]
        taken[name] = value
    return taken


class GuidedVLM:
    """A small model that guides a large one, see [`Guidance`]. Neither is changed.

    ```python
    pair = GuidedVLM(guide, target, processor)
    output = pair.generate(**pair.prepare(text=[prompt], images=[[image]]), max_new_tokens=20)
    ```

    Args:
        guide, target: [`QGSASmolVLMForConditionalGeneration`]s with the same tokenizer.
        processor: the processor of both, or a pair of them if they cut images differently.
        guidance: fields of [`Guidance`].

    Raises ValueError if tokenizers differ, naming the first difference, or a field is out of range. Warns of a guide
    that is larger than its target.
    """

    def __init__(self, guide, target, processor, **guidance):
        self.guide, self.target = guide.eval(), target.eval()
        self.processors = tuple(processor) if isinstance(processor, (tuple, list)) else (processor, processor)
        self.guidance = Guidance(**guidance)
        self.guidance.check(target.config.text_config.num_hidden_layers)
        check_tokenizers(*self.processors)
        self.shares_encoder = self.shares_grid and shares_encoder(guide.model, target.model)
        small, large = (sum(weight.numel() for weight in model.parameters()) for model in (guide, target))
        if small > large:
            logger.warning(f"guide ({small:,} parameters) is larger than its target ({large:,}): it costs more")

    @property
    def config(self):
        """Configuration of the target, by whose inputs the pair is asked."""
        return self.target.config

    @property
    def device(self) -> torch.device:
        """Device of the target."""
        return self.target.device

    def eval(self) -> "GuidedVLM":
        """Itself: neither model is trained here."""
        return self

    @property
    def shares_grid(self) -> bool:
        """Whether both models read the same inputs."""
        names = ("tokens_per_tile", "image_token_id", "global_image_token_id", "tile_token_ids")
        one, other = self.guide.config, self.target.config
        sizes = one.vision_config.image_size == other.vision_config.image_size
        return sizes and all(getattr(one, name) == getattr(other, name) for name in names)

    def prepare(self, **inputs) -> dict[str, Any]:
        """Inputs of `generate` from texts and images, as a processor takes them, on the devices of the models."""
        options = {"padding": True, "return_tensors": "pt", **inputs}
        made = dict(self.processors[1](**options).to(self.target.device))
        if not self.shares_grid or self.processors[0] is not self.processors[1]:
            made["guide_inputs"] = dict(self.processors[0](**options).to(self.guide.device))
        return made

    @torch.no_grad()
    def generate(self, guide_inputs: dict[str, Any] | None = None, **inputs) -> GuidedOutput:
        """Answer with both models; the target's options decide how it decodes, the guide decodes greedily.

        Args:
            guide_inputs: inputs of the guide, if they differ; see `prepare`.
            inputs: inputs of the target, and options of `generate`, such as `max_new_tokens`.

        Raises ValueError if only one of the two gets images, or other images, or for `num_return_sequences`.
        """
        inputs.pop("return_dict_in_generate", None)
        if inputs.get("num_return_sequences") not in (None, 1):
            raise ValueError(
                f"num_return_sequences ({inputs['num_return_sequences']}) must be 1: exits are per sample"
            )
        reading = self._ask_guide(guide_inputs, inputs)
        samples, device = len(inputs["input_ids"]), inputs["input_ids"].device
        if reading is None:
            output = self.target.generate(**inputs, return_dict_in_generate=True)
            nothing = torch.zeros(samples, dtype=torch.long, device=device)
            unknown = torch.full_like(nothing, float("nan"), dtype=torch.float)
            return GuidedOutput(output.sequences, nothing.bool(), unknown, unknown, nothing, nothing, nothing)
        threshold, sure = self.guidance.exit_threshold, reading.sureness
        has_image = torch.isin(torch.arange(samples, device=device), reading.layout.image_sample)
        exits = has_image & (sure >= threshold) if threshold is not None else has_image & False
        found = [each[shown] for each, shown in zip(reading.answer.ids, reading.answer.shown)]
        kept = torch.zeros(2, samples, dtype=torch.long, device=device)
        rest, selection = (~exits).nonzero()[:, 0], None
        if len(rest):
            output = self._ask_target(reading, inputs, rest)
            length = inputs["input_ids"].shape[1]
            for row, sequence in zip(rest.tolist(), output.sequences):
                found[row] = sequence[length:]
            selection = output.get("selection")
            if selection is not None:
                kept[:, rest] = torch.stack([selection.visual_tokens, selection.tiles])
        elif inputs.get("streamer") is not None:
            for part in (inputs["input_ids"], found[0]):
                inputs["streamer"].put(part.cpu())
            inputs["streamer"].end()
        pad = self.target.generation_config.pad_token_id or 0
        answers = pad_sequence(found, batch_first=True, padding_value=pad)
        tiles = (reading.seen & ~reading.layout.is_global).long()
        tiles = torch.zeros_like(kept[0]).index_add(0, reading.layout.tile_sample, tiles)
        sequences = torch.cat([inputs["input_ids"], answers], 1)
        sure, consistent = reading.answer.confidence, reading.consistency
        return GuidedOutput(sequences, exits, sure, consistent, kept[0], kept[1], tiles, selection)

    def _ask_guide(self, guide_inputs: dict[str, Any] | None, inputs: dict[str, Any]) -> GuideReading | None:
        """What the guide makes of its inputs; None if there are no images.

        If both models have the same encoder, what it encoded goes into `inputs["visual_cache"]`, for the target.
        """
        if guide_inputs is None:
            if not self.shares_grid:
                raise ValueError(
                    f"guide_inputs is missing: the guide reads {self.guide.config.tokens_per_tile} visual tokens per "
                    f"tile, the target {self.target.config.tokens_per_tile}; see GuidedVLM.prepare"
                )
            guide_inputs = {name: value for name, value in inputs.items() if name in INPUTS}
        images = [
            (each["input_ids"] == model.config.image_token_id).any()
            for each, model in ((guide_inputs, self.guide), (inputs, self.target))
        ]
        if not any(images):
            return None
        if not all(images):
            raise ValueError(f"images are given to the {'guide' if images[0] else 'target'} only: give them to both")
        options = {name: value for name, value in inputs.items() if name in LENGTHS}
        with recorded_states(self.guide.model) as states:
            reading = ask_guide(self.guide, {**options, **guide_inputs}, self.guidance)
        layout = VisualLayout.of(self.target.config, inputs["input_ids"])
        if not torch.equal(reading.layout.image_sample, layout.image_sample):
            raise ValueError(
                f"guide_inputs holds {len(reading.layout.grids)} images, the target has {len(layout.grids)}, "
                "or they belong to other samples"
            )
        if self.shares_encoder and inputs.get("image_hidden_states") is None:
            if inputs.get("visual_cache") is None:
                inputs["visual_cache"] = VisualCache()
            names = ("pixel_values", "pixel_attention_mask", "lazy_tiles")
            visual = VisualInputs(**{name: inputs.get(name) for name in names}, cache=inputs["visual_cache"])
            remember_tiles(self.target.model, visual, layout, reading.seen, states)
        return reading

    def _ask_target(self, reading: GuideReading, inputs: dict[str, Any], rows: torch.Tensor):
        """The target's output for some samples, `rows` `(n,)` int64."""
        layout = VisualLayout.of(self.target.config, inputs["input_ids"])
        if not torch.isin(layout.image_sample, rows).any():
            texts = {name: value for name, value in inputs.items() if name not in VISUAL_NAMES}
            return self.target.generate(**take_samples(texts, rows, layout), return_dict_in_generate=True)
        options = target_options(reading, layout, self.guidance)
        options["complexity"] = options["complexity"][torch.isin(layout.image_sample, rows)]
        if len(rows) == len(inputs["input_ids"]):
            return self.target.generate(**inputs | options, return_dict_in_generate=True)
        inputs = take_samples(inputs, rows, layout) | options
        most = int(layout.tiles_per_sample[rows].max()) * layout.tokens_per_tile
        inputs["visual_token_scores"] = options["visual_token_scores"][rows, :most]
        return self.target.generate(**inputs, return_dict_in_generate=True)

    def calibrate(
        self, samples: Sequence[dict], target_loyalty: float = 0.99, max_new_tokens: int = 20
    ) -> dict[str, Any]:
        """Set `exit_threshold`, without labels: the guide answers as often as it may if the pair is to stay loyal.

        Loyal is an answer that the target would have given if it had been asked. What is reported was measured on each
        half of the samples with the threshold of the other one.

        Args:
            samples: sequence of dicts with `image` (PIL, or a list of them) and `question`.
            target_loyalty: share of the answers that should be those of the target, in (0, 1].

        Returns what was measured, also `guidance.calibration`. Raises ValueError, before anything is changed, for a
        loyalty out of range, fewer than 20 samples, and samples that cannot be read.
        """
        if not 0 < target_loyalty <= 1:
            raise ValueError(f"target_loyalty ({target_loyalty}) must be in (0, 1]")
        if len(samples) < 20:
            raise ValueError(f"samples ({len(samples)}) must be at least 20")
        guidance, found = self.guidance, []
        try:
            self.guidance = replace(guidance, exit_threshold=NEVER)
            prepared = zip(*(prepare(samples, processor) for processor in self.processors))
            for guide_inputs, inputs in tqdm(prepared, total=len(samples), desc="calibration of the exit"):
                found.append(self._compare(guide_inputs, inputs, max_new_tokens))
        finally:
            self.guidance = guidance
        sureness, agrees = map(torch.tensor, zip(*found))
        halves, kept = (slice(0, None, 2), slice(1, None, 2)), []
        for half, other in (halves, halves[::-1]):
            exits = sureness[other] >= choose_threshold(sureness[half], agrees[half], target_loyalty)
            kept.append((agrees[other] | ~exits, exits))
        loyal, exits = (torch.cat(each) for each in zip(*kept))
        threshold = choose_threshold(sureness, agrees, target_loyalty)
        record = {
            "target_loyalty": target_loyalty,
            "samples": len(samples),
            "loyalty": float(loyal.double().mean()),
            "loyalty_ci95": bootstrap_interval(loyal, torch.ones(len(loyal), dtype=torch.float64)),
            "exits": float(exits.double().mean()),
            "exit_threshold": threshold,
        }
        self.guidance = replace(guidance, exit_threshold=threshold, calibration=record)
        return record

    def _compare(self, guide_inputs: dict, inputs: dict, max_new_tokens: int) -> tuple[float, bool]:
        """How sure the guide is about one sample, and whether the target would answer the same."""
        options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        inputs = {name: value.to(self.target.device) for name, value in inputs.items()} | options
        guide_inputs = {name: value.to(self.guide.device) for name, value in guide_inputs.items()}
        reading = self._ask_guide(guide_inputs, inputs)
        assert reading is not None
        output = self._ask_target(reading, inputs, torch.zeros(1, dtype=torch.long, device=self.target.device))
        pairs = zip_longest(
            reading.answer.ids[0][reading.answer.shown[0]].tolist(),
            output.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
        )
        return float(reading.sureness[0]), all(one == other for one, other in pairs)

    def save_pretrained(self, folder: str | Path):
        """Save both models with their processors, and the guidance, in one folder."""
        folder = Path(folder)
        for name, model, processor in zip(PARTS, (self.guide, self.target), self.processors):
            model.save_pretrained(folder / name)
            processor.save_pretrained(folder / name)
        path = folder / "guidance.json"
        path.with_suffix(".part").write_text(json.dumps(asdict(self.guidance), indent=2) + "\n")
        path.with_suffix(".part").replace(path)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options) -> "GuidedVLM":
        """Load a pair that `save_pretrained` wrote; `options` go to both models.

        Raises FileNotFoundError if the folder holds no pair.
        """
        folder = Path(folder)
        guidance = json.loads((folder / "guidance.json").read_text())
        guide, target = (
            QGSASmolVLMForConditionalGeneration.from_pretrained(folder / name, **options) for name in PARTS
        )
        processors = tuple(QGSAProcessor.from_pretrained(folder / name) for name in PARTS)
        return cls(guide, target, processors, **guidance)


def check_tokenizers(*processors):
    """Raise ValueError, naming the first difference, unless the tokenizers of two processors are the same."""
    vocabularies = [
        sorted((number, token) for token, number in tokenizer_of(each).get_vocab().items()) for each in processors
    ]
    for one, other in zip_longest(*vocabularies):
        if one != other:
            raise ValueError(f"processor: guide and target need the same tokenizer, but {one} is not {other}")


def choose_threshold(sureness: torch.Tensor, agrees: torch.Tensor, target_loyalty: float) -> float:
    """The lowest threshold at which few enough samples that the guide answers alone would be answered differently.

    As in `calibration_qgsa`, lost answers count by the mean of their posterior under Jeffreys' prior; losing none is
    enough.

    Args:
        sureness: `(n,)`.
        agrees: `(n,)` bool, whether the guide answers as the target does.
    """
    allowed = max(0.0, (1 - target_loyalty) * (len(sureness) + 1) - 0.5)
    ranked, order = sureness.sort(descending=True)
    lost = (~agrees[order]).cumsum(0)
    last = torch.cat([ranked[1:] < ranked[:-1], ranked.new_ones(1).bool()])  # of equally sure ones
    fits = ranked[last & (lost <= allowed)]
    return float(fits[-1]) if len(fits) else NEVER
