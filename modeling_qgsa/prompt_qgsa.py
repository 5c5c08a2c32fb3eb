"""The text side of a batch, checked, and the question in it. Sizes as in `selection_qgsa`."""

from dataclasses import dataclass

import torch


def check_shape(name: str, tensor, shape, floating: bool | None = None):
    """Raise TypeError for what is no tensor, ValueError for one of another `shape` (None is any) or kind of numbers.

    Args:
        floating: whether it is to hold floats (True) or integers (False); None takes both.
    """
    if not torch.is_tensor(tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: it has to be a tensor")
    if tensor.dim() != len(shape) or any(want not in (None, have) for have, want in zip(tensor.shape, shape)):
        expected = " x ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {expected}")
    if tensor.is_complex() or floating not in (None, tensor.is_floating_point()):
        raise ValueError(f"{name} is of {tensor.dtype}: expected {'floats' if floating else 'integers'}")


@dataclass(frozen=True)
class Prompt:
    """The text side of a batch, every field `(B, L)`; `Prompt.of` checks it and fills in what a caller left out."""

    input_ids: torch.LongTensor
    attention_mask: torch.Tensor
    position_ids: torch.LongTensor
    labels: torch.LongTensor

    @classmethod
    def of(cls, input_ids, attention_mask=None, position_ids=None, labels=None) -> "Prompt":
        """Raises TypeError and ValueError for what is no tensor of the shape of `input_ids`, or not of its kind."""
        check_shape("input_ids", input_ids, (None, None), floating=False)
        if not input_ids.numel():
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: there is no prompt")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        check_shape("attention_mask", attention_mask, input_ids.shape)
        if ((attention_mask != 0) & (attention_mask != 1)).any():
            raise ValueError("attention_mask holds other values than 0 and 1")
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        if torch.is_tensor(position_ids) and position_ids.dim() == 1:
            position_ids = position_ids[None]
        check_shape("position_ids", position_ids, (None, input_ids.shape[1]), floating=False)
        if len(position_ids) not in (1, len(input_ids)):
            raise ValueError(f"position_ids is of {len(position_ids)} samples: there are {len(input_ids)} prompts")
        if labels is None:
            labels = torch.full_like(input_ids, -100)
        check_shape("labels", labels, input_ids.shape, floating=False)
        return cls(input_ids, attention_mask, position_ids.expand_as(input_ids), labels)

    def check(self, vocabulary: int):
        """Raise ValueError for what a text model of so many words cannot read, naming both numbers."""
        of_labels = self.labels.masked_fill(self.labels == -100, 0)
        for name, ids in (("input_ids", self.input_ids), ("labels", of_labels)):
            low, high = torch.stack(ids.aminmax()).tolist()
            if low < 0 or high >= vocabulary:
                raise ValueError(f"{name} goes from {low} to {high}: the text model knows 0 to {vocabulary - 1}")


def find_question(
    input_ids: torch.LongTensor, readable: torch.BoolTensor, end_of_utterance_token_id: int
) -> torch.BoolTensor:
    """The question: the readable tokens of the last turn that is closed by `<end_of_utterance>`, `(B, L)` bool.

    Args:
        input_ids: `(B, L)` int64.
        readable: `(B, L)` bool, False for padding, image blocks and labelled positions.
        end_of_utterance_token_id: without this token among them, all readable tokens are the question.
    """
    ends = (input_ids == end_of_utterance_token_id) & readable
    turn = ends.cumsum(1) - ends.long()
    last = (ends.sum(1, keepdim=True) - 1).clamp(min=0)
    return readable & ~ends & (turn == last)


def read_question(prompt: Prompt, layout, end_of_utterance_token_id: int, question_mask=None) -> torch.BoolTensor:
    """What the selector reads for each image, `(I, L)` bool: the question of its sample, without answers and images.

    Args:
        layout: [`VisualLayout`] of the prompt.
        question_mask: `(B, L)`, the question as a caller has it; found by `find_question` without it.

    Raises ValueError for an image without a question, and for an attention mask that hides parts of an image.
    """
    shown, visual = prompt.attention_mask.bool(), layout.tile_of_position >= 0
    for sample in (visual & ~shown).any(1).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"sample {sample}: attention_mask hides {int((visual & ~shown)[sample].sum())} of the "
            f"{int(visual[sample].sum())} positions of its images"
        )
    readable = shown & ~visual & (prompt.labels == -100)
    if question_mask is None:
        question_mask = find_question(prompt.input_ids, readable, end_of_utterance_token_id)
    check_shape("question_mask", question_mask, prompt.input_ids.shape)
    question_mask = (question_mask.bool() & readable)[layout.image_sample]
    for image in (~question_mask.any(1)).nonzero()[:1, 0].tolist():
        sample = layout.image_sample[image]
        raise ValueError(
            f"sample {sample} has no question to select by: of its {prompt.input_ids.shape[1]} positions "
            f"{int((prompt.labels[sample] != -100).sum())} are labelled, and 0 are text of the question"
        )
    return question_mask


def refuse_decoding(options: dict, generation_config):
    """Raise ValueError for ways to decode that read the prompt anew, of which only a part is left."""
    for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        if options.get(name) is not None or (generation_config.to_dict().get(name) is not None):
            raise ValueError(
                f'{name} reads the whole prompt, of which a selection leaves a part: use selection="dense"'
            )


def refuse_placeholders(input_ids: torch.LongTensor | None, image_token_id: int):
    """Raise ValueError for placeholders of images where there are no images."""
    count = 0 if input_ids is None else int((input_ids == image_token_id).sum())
    if count:
        raise ValueError(f"input_ids holds {count} image placeholders, and there are no pixel_values")
