"""Answers of several systems to the same questions, through `generate`, as a user would ask."""

import time
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from modeling_qgsa.guidance_qgsa import GuidedOutput
from modeling_qgsa.layout_qgsa import VisualLayout
from modeling_qgsa.processing_qgsa import kept_maps
from training.data.collator import QuestionCollator
from training.data.dataset import without_image
from training.evaluation.systems import System
from training.methods.method import encode_all


@dataclass
class Answers:
    """The answers of one system; every field is a list with one entry per question.

    Args:
        predictions: the answers as text.
        visual_tokens, tiles: numbers of visual tokens kept and of tiles encoded, k and m.
        relevance: maps, `(rows, columns)` as lists, if the selector scored; [] otherwise.
        kept: regions of the image that were kept, boxes `[x0, y0, x1, y1]` as fractions of its width and height.
        seconds: time spent in the model.
        words: numbers of other tokens in the prompts, with the markers of all tiles.
        vision_shares: share of the text model's work on visual tokens that its layers do, 0 to 1.
        sureness: how sure the guide of a pair was, 0 to 1; nan for other systems, or if it was not asked.
        by_guide: whether the guide of a pair answered alone.
    """

    predictions: list[str] = field(default_factory=list)
    visual_tokens: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    relevance: list[list] = field(default_factory=list)
    kept: list[list] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    vision_shares: list[float] = field(default_factory=list)
    sureness: list[float] = field(default_factory=list)
    by_guide: list[bool] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: list["Answers"]) -> "Answers":
        """The answers of all parts, one after the other."""
        return cls(*([value for part in parts for value in getattr(part, each.name)] for each in fields(cls)))


def answer(
    systems: list[System],
    dataset,
    processor,
    batch_size: int,
    max_new_tokens: int,
    seed: int = 0,
    share_features: bool = False,
) -> tuple[list[Answers], list[dict]]:
    """Ask every system every question of `dataset` through `generate`, greedily.

    The systems take turns, batch by batch, so that a slow spell of the machine affects them all alike. Several
    processes share the batches, and each gets all answers. Seconds are those of the model, per batch, divided by the
    batch size. With `share_features` the first system's model encodes every tile once for all systems that encode
    whole tiles: their answers stay the same if their encoders are the same, but their seconds do not.

    Returns the answers of each system, and the samples that were asked, see `without_image`.
    """
    state, chunks = PartialState(), []
    starts = range(0, len(dataset), batch_size)[state.process_index :: state.num_processes]
    with tqdm(total=len(starts) * len(systems), desc="asking", disable=not state.is_main_process) as progress:
        for start in starts:
            samples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            shown, parts = {}, [Answers() for _ in systems]
            for system, answers in zip(systems, parts):
                view = (system.blank, str(system.image_kwargs))
                if view not in shown:
                    shown[view] = show(system, samples, processor)
                    if share_features and not system.blank:
                        shown[view]["image_hidden_states"] = encode_all(systems[0].model, shown[view])
                # Seeded per batch, so that the scores do not depend on which process has the batch.
                generator = torch.Generator().manual_seed(seed + start)
                ask(system, samples, shown[view], processor, max_new_tokens, generator, answers)
                progress.update()
            chunks.append((start, parts, [without_image(sample) for sample in samples]))
    chunks = sorted(gather_object(chunks), key=lambda chunk: chunk[0])
    everything = [Answers.joined([parts[number] for _, parts, _ in chunks]) for number in range(len(systems))]
    return everything, [sample for _, _, asked in chunks for sample in asked]


def show(system: System, samples: list[dict], processor) -> dict[str, torch.Tensor]:
    """The inputs of `generate` for `samples` as `system` sees them."""
    if system.blank:
        samples = [{**sample, "image": Image.new("RGB", sample["image"].size, (128,) * 3)} for sample in samples]
    return QuestionCollator(processor, with_answer=False, image_kwargs=system.image_kwargs)(samples)


def selection_options(system: System, inputs: dict, layout, generator: torch.Generator) -> dict:
    """Options of `generate` that make the model select as `system` does; they take precedence over `inputs`."""
    if system.method is None:
        return system.options
    return system.options | system.method.options(system.model, inputs, layout, system.budget, generator)


@torch.no_grad()
def ask(
    system: System, samples: list[dict], inputs: dict, processor, max_new_tokens: int, generator, answers: Answers
):
    """Append the answers of `system` for `samples`, shown as `inputs`, to `answers`."""
    model = system.model.eval()
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    if system.budget.selection in ("dense", "blocks"):
        inputs.pop("image_hidden_states", None)
    layout = VisualLayout.of(model.config, inputs["input_ids"])
    began = time.perf_counter()
    inputs |= selection_options(system, inputs, layout, generator)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, return_dict_in_generate=True)
    seconds = (time.perf_counter() - began) / len(samples)

    texts = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers.predictions += [text.strip() for text in texts]
    answers.seconds += [seconds] * len(samples)
    pair = isinstance(output, GuidedOutput)
    answers.by_guide += output.answered_by_guide.tolist() if pair else [False] * len(samples)
    visual = inputs["input_ids"] == model.config.image_token_id
    answers.words += (inputs["attention_mask"].sum(1) - visual.sum(1)).tolist()
    shares = output.selection.vision_share if "selection" in output and not pair else torch.ones(len(samples))
    answers.vision_shares += shares.tolist()
    sureness = (output.confidence + output.consistency) / 2 if pair else torch.full((len(samples),), float("nan"))
    answers.sureness += sureness.tolist()
    if pair:
        answers.visual_tokens += output.visual_tokens.tolist()
        answers.tiles += output.tiles.tolist()
        answers.relevance += [[]] * len(samples)
        answers.kept += [[[0.0, 0.0, 1.0, 1.0]]] * len(samples)
    elif "selection" in output:
        answers.visual_tokens += output.selection.visual_tokens.tolist()
        answers.tiles += output.selection.tiles.tolist()
        answers.relevance += [[]] * len(samples) if system.method else output.selection.relevance.tolist()
        answers.kept += [kept_regions(output.selection, row, layout.tokens_per_tile) for row in range(len(samples))]
    else:
        counts = torch.bincount(layout.tile_sample, minlength=len(samples))
        answers.visual_tokens += (counts * layout.tokens_per_tile).tolist()
        answers.tiles += (counts - 1).tolist()
        answers.relevance += [[]] * len(samples)
        answers.kept += [[[0.0, 0.0, 1.0, 1.0]]] * len(samples)


def kept_regions(selection, index: int, tokens_per_tile: int) -> list[list[float]]:
    """Cells of an image's kept high-resolution tokens, boxes as fractions of its width and height.

    For an image of a single tile, those of the glance.
    """
    tiles, glance, _ = kept_maps(selection, index, tokens_per_tile)
    cells = tiles if tiles.any() or selection.grids[index].any() else glance
    rows, columns = cells.shape
    return [
        [column / columns, row / rows, (column + 1) / columns, (row + 1) / rows]
        for row, column in np.argwhere(cells).tolist()
    ]
