"""The text side of a batch, checked: prompts, their turns, and the question about each image.

Sizes as in `layout_qgsa`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional as F
from transformers import ProcessorMixin
from transformers.utils import logging

from .layout_qgsa import VisualLayout, covered_by


logger = logging.get_logger(__name__)
NO_QUESTION = (
    'a prompt has no question about its image, so that every visual token is kept, as with selection="dense" (with '
    "positions_per_image: as many as that allows, by the whole prompt). To select, ask something, mark the question "
    "with question_mask, or set the labels of the question to -100"
)
QUESTION, ANSWER = "QUESTION", "ANSWER"  # what stands around them in a rendered template is the template's own


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


class TurnMarkers(Protocol):
    """Token ids by which turns are told apart: a [`QGSAConfig`] or a [`ChatFormat`]."""

    @property
    def end_of_utterance_token_id(self) -> int: ...
    @property
    def assistant_token_ids(self) -> list[int]: ...


class ChatFormat(NamedTuple):
    """How a chat template writes turns.

    Args:
        end_of_utterance_token_id: the token that closes a turn.
        assistant_token_ids: the tokens that open an answer, without white space before them.
        user_header: the words before a question, such as "User:".
        answer_header: all tokens between a closed question and its answer.
        user_token_ids: the tokens that open a question, `user_header` with its special tokens.
    """

    end_of_utterance_token_id: int
    assistant_token_ids: list[int]
    user_header: str
    answer_header: list[int]
    user_token_ids: list[int]


TILE_MARKERS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def read_tile_markers(source) -> list[int | list[int]]:
    """The ids of the marker of the global view, then of the 36 tiles, in a tokenizer or that of a processor.

    One that the tokenizer has no token for stands in a prompt as ordinary text, between special tokens, and has a
    list of ids.
    """
    tokenizer, found = tokenizer_of(source), []
    for marker in ("<global-img>", *TILE_MARKERS):
        known = tokenizer.convert_tokens_to_ids(marker)
        if known is None or known == tokenizer.unk_token_id:
            text = f"<fake_token_around_image>{marker}<image>"
            _, *known, _ = tokenizer(text, add_special_tokens=False)["input_ids"]
        found.append(known)
    return found


def tokenizer_of(source):
    """The tokenizer of a processor; a tokenizer itself."""
    return source.tokenizer if isinstance(source, ProcessorMixin) else source


def read_chat_format(source) -> ChatFormat:
    """Read the chat format of a tokenizer or processor from its chat template.

    It is SmolVLM's format ("User: ...<end_of_utterance>\\nAssistant: ...") if there is no chat template, or if no
    special token closes a user's turn.
    """
    tokenizer = tokenizer_of(source)
    renderer = source if source.chat_template else tokenizer
    for content in (lambda text: [{"type": "text", "text": text}], str):
        try:
            return _render_and_read(renderer, tokenizer, content)
        except Exception:  # a template may raise anything for a form of content that it does not know
            continue
    end, *header = tokenizer("<end_of_utterance>\nAssistant:", add_special_tokens=False)["input_ids"]
    user = tokenizer("User:", add_special_tokens=False)["input_ids"]
    return ChatFormat(end, _without_space(tokenizer, header), "User:", header, user)


def _without_space(tokenizer, ids: list[int]) -> list[int]:
    """Ids from the first one on that is more than white space."""
    return ids[next((place for place, each in enumerate(ids) if tokenizer.decode([each]).strip()), len(ids)) :]


def _render_and_read(renderer, tokenizer, content) -> ChatFormat:
    """Render a question, and a question with its answer. Raises ValueError if no special token closes the question."""
    user = {"role": "user", "content": content(QUESTION)}
    assistant = {"role": "assistant", "content": content(ANSWER)}
    asked = renderer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    answered = renderer.apply_chat_template([user, assistant], tokenize=False)
    before, _, after = asked.rpartition(QUESTION)
    follows = [after, answered.rpartition(QUESTION)[2]]
    # White space at the end of a header can merge with the first word of an answer into one token.
    between = os.path.commonprefix(follows).rstrip()
    _, *answer_header = os.path.commonprefix(tokenizer(follows, add_special_tokens=False)["input_ids"])
    end, *header = tokenizer(between, add_special_tokens=False)["input_ids"]
    header = _without_space(tokenizer, header)
    if end not in tokenizer.get_added_vocab().values() or not header:
        raise ValueError(f"chat_template: no special token closes a user's turn, which is followed by {between!r}")
    opening = before.rpartition(tokenizer.decode([end]))[2]
    user_header = tokenizer(opening.rstrip(), add_special_tokens=False)["input_ids"]
    words = tokenizer.decode(user_header, skip_special_tokens=True).strip()
    user_header = [each for each in user_header if each != tokenizer.bos_token_id]
    return ChatFormat(end, header, words, answer_header, _without_space(tokenizer, user_header))


@dataclass(frozen=True)
class Turns:
    """The turns of a batch of chats, every field `(B, L)`.

    Args:
        text (bool): shown text, without images and without the tokens that close turns.
        words (bool): `text` without the tokens of the chat format.
        opened (int64): position of the token that closes the turn before; -1 in the first turn.
        closed (int64): position of the token that closes this turn; L in an open turn.
        is_answer (bool): the turn is the assistant's. The first one never is.
        is_answered (bool): the next turn is the assistant's.
        answered_at (int64): then, the position that predicts its first token, which may lie beyond the prompt.
    """

    text: torch.Tensor
    words: torch.Tensor
    opened: torch.Tensor
    closed: torch.Tensor
    is_answer: torch.Tensor
    is_answered: torch.Tensor
    answered_at: torch.Tensor

    @classmethod
    def of(
        cls, markers: TurnMarkers, input_ids: torch.Tensor, readable: torch.Tensor, bos_token_id: int | None = None
    ) -> "Turns":
        """Find the turns.

        Args:
            input_ids: `(B, L)` int64.
            readable: `(B, L)` bool, False for padding and image blocks.
            bos_token_id: counts as a token of the chat format.
        """
        length = input_ids.shape[1]
        place = torch.arange(length, device=input_ids.device).expand(input_ids.shape)
        ends = readable & (input_ids == markers.end_of_utterance_token_id)
        opened = F.pad(place.where(ends, -1).cummax(1).values, (1, -1), value=-1)
        closed = place.where(ends, length).flip(1).cummin(1).values.flip(1)
        header = input_ids.new_tensor(markers.assistant_token_ids)
        windows = F.pad(input_ids, (0, len(header) + 1), value=-1).unfold(1, len(header), 1)
        found = (windows == header).all(-1)
        begins = (
            found[:, :-1] | found[:, 1:]
        )  # (B, L + 1): an answer begins here, perhaps after a token of white space
        after = (closed + 1).clamp(max=length)
        template = [markers.end_of_utterance_token_id, *markers.assistant_token_ids]
        template += [] if bos_token_id is None else [bos_token_id]
        return cls(
            text=readable & ~ends,
            words=readable & ~torch.isin(input_ids, input_ids.new_tensor(template)),
            opened=opened,
            closed=closed,
            is_answer=(opened >= 0) & begins.gather(1, opened + 1),
            is_answered=begins.gather(1, after),
            answered_at=closed + len(header) + (~found[:, :-1]).long().gather(1, after),
        )

    def visible(self, unlabelled: torch.Tensor) -> torch.Tensor:
        """Positions that no label hides, `(B, L)` bool: what the assistant answers is a question, labelled or not."""
        return unlabelled | (self.is_answered & ~self.is_answer)

    def last(self, where: torch.Tensor) -> torch.Tensor:
        """All positions of the last turn that has one in `where`, `(B, L)` bool; none if there is no such turn."""
        return self.opened == self.opened.masked_fill(~where, -2).amax(1, keepdim=True)


def find_question(turns: Turns, unlabelled: torch.Tensor) -> torch.Tensor:
    """The question of each sample, `(B, L)` bool: the last closed turn that is not the assistant's.

    Labels hide answers where turns do not tell them: the question is the last turn with unlabelled words, or all
    unlabelled text if no turn is closed. If all words are labelled, it is the last turn that the assistant answers.

    Args:
        unlabelled: `(B, L)` bool, False for positions with a label.
    """
    free = turns.words & unlabelled & ~turns.is_answer
    # The token that closes a turn is labelled if it belongs to an answer.
    closed = free & (turns.is_answered | F.pad(unlabelled, (0, 1)).gather(1, turns.closed))
    asked = turns.last(closed) & turns.text & turns.visible(unlabelled)
    rest = turns.text & unlabelled & ~turns.is_answer
    answered = turns.last(turns.words & ~turns.is_answer & turns.is_answered) & turns.text
    asked = torch.where(closed.any(1, keepdim=True), asked, rest)
    return torch.where(free.any(1, keepdim=True), asked, answered)


def find_answer(question: torch.Tensor, turns: Turns, prompt: Prompt) -> torch.Tensor:
    """The position that predicts the first token of the answer to each sample's question, `(B,)` int64.

    It is the last one of the header that opens the answer. Without a header it is the position before the first label
    behind the question, and without labels the last position of the prompt.

    Args:
        question: `(B, L)` bool; a sample without a question gets the last position.
    """
    place = torch.arange(question.shape[1], device=question.device).expand(question.shape)
    shown = prompt.attention_mask.bool()
    end = place.masked_fill(~shown, -1).amax(1)
    asked = place.masked_fill(~question, -1).amax(1, keepdim=True)
    learnt = (prompt.labels != -100) & (place > asked)
    labelled = torch.where(learnt.any(1), learnt.int().argmax(1) - 1, end)
    header = turns.is_answered.gather(1, asked.clamp(min=0))[:, 0] & (asked[:, 0] >= 0)
    return torch.where(header, turns.answered_at.gather(1, asked.clamp(min=0))[:, 0], labelled).minimum(end)


def read_question(
    config, prompt: Prompt, layout: VisualLayout, question_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The question about each image, without answers and images, and where its answer begins.

    Args:
        config: [`QGSAConfig`].
        question_mask: `(B, any)`, the question as marked by the caller, see `fit_question_mask`; found by
            `find_question` by default. Labels hide what they cover of it, except in a turn that the assistant answers,
            and unless they cover all of it.

    Returns `(question, answer)`: the tokens that the pointer reads, `(I, L)` bool, none if there is no question, with
    a warning; and the position that predicts the answer, `(I,)` int64, see `find_answer`.

    Raises ValueError if the attention mask hides part of an image, if a mask marks no text, or if it is unclear where
    a mask of another length belongs.
    """
    shown, visual = prompt.attention_mask.bool(), layout.tile_of_position >= 0
    for sample in (visual & ~shown).any(1).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"sample {sample}: attention_mask hides {int((visual & ~shown)[sample].sum())} of the "
            f"{int(visual[sample].sum())} image positions"
        )
    readable, unlabelled = shown & ~visual, prompt.labels == -100
    turns = Turns.of(config, prompt.input_ids, readable, config.text_config.bos_token_id)
    question = find_question(turns, unlabelled)
    if question_mask is None:
        _warn_of_unknown_speakers(config, turns, unlabelled)
        asked = question & turns.words & ~covered_by(prompt.input_ids, config.user_token_ids)
        question = question & asked.any(1, keepdim=True)
    else:
        given = fit_question_mask(question_mask, question, turns, prompt, layout)
        marked = readable & given
        for sample in (given.any(1) & ~marked.any(1)).nonzero()[:1, 0].tolist():
            raise ValueError(
                f"sample {sample}: question_mask marks {int(given[sample].sum())} positions, and 0 of them are text"
            )
        seen, words = marked & turns.visible(unlabelled), marked & turns.words
        hidden = words.any(1) & ~(words & seen).any(1)
        question = torch.where(hidden[:, None], marked & ~turns.is_answer, seen)
    answer = find_answer(question, turns, prompt)[layout.image_sample]
    question = question[layout.image_sample]
    if not question.any(1).all():
        logger.warning_once(NO_QUESTION)
    return question, answer


def fit_question_mask(
    question_mask: torch.Tensor, found: torch.Tensor, turns: Turns, prompt: Prompt, layout: VisualLayout
) -> torch.Tensor:
    """A question mask at the positions of the prompt, `(B, L)` bool.

    Some collators append answers to prompts and forget the mask; some then move each sample to one side. A mask that
    marks what no user says follows its sample if the question that is found has the same pattern elsewhere. A mask of
    another length is otherwise cut, or continued with zeros, on the right, if it then marks the question that is found
    or padding shows that nothing was moved.

    Args:
        question_mask: `(B, any)`.
        found: `(B, L)` bool, the result of `find_question`.

    Raises ValueError, naming both shapes, if neither is the case.
    """
    samples, length = found.shape
    check_shape("question_mask", question_mask, (samples, None))
    marked, excess = question_mask.bool(), question_mask.shape[1] - length
    fitted = F.pad(marked, (0, -excess))
    lost = marked[:, length:].any(1)
    strays = lost | (fitted & (~turns.text | turns.is_answer)).any(1)
    moved = strays & _same_pattern(marked, found) & (found & turns.is_answered).any(1)
    fitted = torch.where(moved[:, None], found, fitted)
    settled = moved | (~lost & ((fitted == found).all(1) | _in_place(prompt.attention_mask)))
    unclear = (~settled)[layout.image_sample]
    if excess and unclear.any():
        raise ValueError(
            f"question_mask has shape {tuple(question_mask.shape)}: expected {samples} x {length}, and it is unclear "
            f"where the question of sample {int(layout.image_sample[unclear][0])} stands. Give a mask of the whole "
            "prompt, or leave question_mask out: the question is then found by its turn"
        )
    return fitted


def _same_pattern(marked: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Whether two masks of any length mark the same pattern, wherever it stands, `(B,)` bool."""
    width = max(marked.shape[1], found.shape[1])
    marked, found = (F.pad(mask, (0, width - mask.shape[1])) for mask in (marked, found))
    offset = marked.int().argmax(1) - found.int().argmax(1)
    source = torch.arange(width, device=found.device) - offset[:, None]
    moved = found.gather(1, source.clamp(0, width - 1)) & (source >= 0) & (source < width)
    return (moved == marked).all(1) & (marked.sum(1) == found.sum(1))


def _in_place(attention_mask: torch.Tensor) -> torch.Tensor:
    """Whether the padding shows that no sample was moved to one side of the batch, a bool.

    Nothing moves in a single sample without padding. Moving leaves padding on one side only, and padding all prompts
    further leaves none at the margin.
    """
    shown = attention_mask.bool()
    gaps = shown[:, 1:] & ~shown[:, :-1] & (shown.cumsum(1)[:, :-1] > 0)
    both_sides = shown[:, 0].any() & ~shown[:, 0].all() & ~shown[:, -1].all()
    return gaps.any() | both_sides | (shown.all() if len(shown) == 1 else both_sides)


def _warn_of_unknown_speakers(config, turns: Turns, unlabelled: torch.Tensor):
    """Warn once of several closed turns among which the assistant's cannot be told, as in an old checkpoint."""
    several = ((turns.opened >= 0) & (turns.closed < turns.text.shape[1]) & turns.text).any(1)
    if (several & ~turns.is_answer.any(1) & unlabelled.all(1)).any():
        logger.warning_once(
            f"No turn opens with assistant_token_ids ({config.assistant_token_ids}): the last closed turn is taken as "
            "the question, whoever speaks. If the assistant does, set assistant_token_ids in the config of the "
            "checkpoint (see QGSAConfig), or mark the question with question_mask, as QGSAProcessor does"
        )


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
