"""The text side of a batch, checked, and the question in it. Sizes as in `layout_qgsa`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .layout_qgsa import VisualLayout


def check_shape(name: str, tensor: Any, shape: Sequence[int | None], floating: bool | None = None):
    """Raise TypeError if it is not a tensor, ValueError if its shape (None matches any size) or dtype does not match.

    Args:
        floating: whether it must hold floats (True) or integers (False); None accepts both.
    """
    if not torch.is_tensor(tensor):
        raise TypeError(f"{name} ({type(tensor).__name__}) must be a tensor")
    if tensor.dim() != len(shape) or any(want not in (None, have) for have, want in zip(tensor.shape, shape)):
        expected = " x ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {expected}")
    if tensor.is_complex() or floating not in (None, tensor.is_floating_point()):
        raise ValueError(f"{name} has dtype {tensor.dtype}: expected {'floats' if floating else 'integers'}")


@dataclass(frozen=True)
class Prompt:
    """The text side of a batch, every field `(B, L)`; `Prompt.of` checks it and fills in defaults."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, input_ids, attention_mask=None, position_ids=None, labels=None) -> "Prompt":
        """Raises TypeError if an argument is not a tensor, ValueError if shapes or values do not fit together."""
        check_shape("input_ids", input_ids, (None, None), floating=False)
        if not input_ids.numel():
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: the prompt is empty")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        check_shape("attention_mask", attention_mask, input_ids.shape)
        if ((attention_mask != 0) & (attention_mask != 1)).any():
            raise ValueError("attention_mask must hold only 0 and 1")
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        if torch.is_tensor(position_ids) and position_ids.dim() == 1:
            position_ids = position_ids[None]
        check_shape("position_ids", position_ids, (None, input_ids.shape[1]), floating=False)
        if len(position_ids) not in (1, len(input_ids)):
            raise ValueError(
                f"position_ids has {len(position_ids)} rows: expected 1 or {len(input_ids)}, as in input_ids"
            )
        if labels is None:
            labels = torch.full_like(input_ids, -100)
        check_shape("labels", labels, input_ids.shape, floating=False)
        return cls(input_ids, attention_mask, position_ids.expand_as(input_ids), labels)

    def check(self, vocab_size: int):
        """Raise ValueError, naming both numbers, if an id or label is outside a vocabulary of `vocab_size`."""
        for name, ids in (("input_ids", self.input_ids), ("labels", self.labels.masked_fill(self.labels == -100, 0))):
            low, high = torch.stack(ids.aminmax()).tolist()
            if low < 0 or high >= vocab_size:
                raise ValueError(f"{name} ranges from {low} to {high}: the vocabulary is 0 .. {vocab_size - 1}")


def find_question(input_ids: torch.Tensor, readable: torch.Tensor, end_of_utterance_token_id: int) -> torch.Tensor:
    """The question: the readable tokens of the last turn that `<end_of_utterance>` closes, `(B, L)` bool.

    Args:
        input_ids: `(B, L)` int64.
        readable: `(B, L)` bool, False for padding, image blocks and labelled positions.
        end_of_utterance_token_id: if no readable token has this id, all readable tokens are the question.
    """
    ends = (input_ids == end_of_utterance_token_id) & readable
    turn = ends.cumsum(1) - ends.long()
    last = (ends.sum(1, keepdim=True) - 1).clamp(min=0)
    return readable & ~ends & (turn == last)


def read_question(
    prompt: Prompt, layout: VisualLayout, end_of_utterance_token_id: int, question_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Tokens that the selector reads for each image, `(I, L)` bool: its sample's question, without answers and images.

    Args:
        question_mask: `(B, L)`, the question as marked by the caller; found by `find_question` by default.

    Raises ValueError if an image has no question, or if the attention mask hides part of an image.
    """
    shown, visual = prompt.attention_mask.bool(), layout.tile_of_position >= 0
    for sample in (visual & ~shown).any(1).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"sample {sample}: attention_mask hides {int((visual & ~shown)[sample].sum())} of the "
            f"{int(visual[sample].sum())} image positions"
        )
    readable = shown & ~visual & (prompt.labels == -100)
    if question_mask is None:
        question_mask = find_question(prompt.input_ids, readable, end_of_utterance_token_id)
    check_shape("question_mask", question_mask, prompt.input_ids.shape)
    question_mask = (question_mask.bool() & readable)[layout.image_sample]
    for image in (~question_mask.any(1)).nonzero()[:1, 0].tolist():
        sample = layout.image_sample[image]
        raise ValueError(
            f"sample {sample} has no question to select by: of its {prompt.input_ids.shape[1]} positions, "
            f"{int((prompt.labels[sample] != -100).sum())} are labelled and 0 belong to a question"
        )
    return question_mask


def check_decoding(options: Mapping[str, Any], generation_config):
    """Raise ValueError for decoding methods that read the whole prompt again: a selection keeps only part of it."""
    for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        if options.get(name) is not None or generation_config.to_dict().get(name) is not None:
            raise ValueError(
                f'{name} reads the whole prompt, but a selection keeps only part of it: use selection="dense"'
            )


def check_no_placeholders(input_ids: torch.Tensor | None, image_token_id: int):
    """Raise ValueError if the prompt has image placeholders although there are no images."""
    count = 0 if input_ids is None else int((input_ids == image_token_id).sum())
    if count:
        raise ValueError(f"input_ids holds {count} image placeholders, but pixel_values is missing")
