"""Model inputs from samples, made by the processor that users call."""

from dataclasses import dataclass

import torch

from modeling_qgsa.prompt_qgsa import read_chat_format


def conversation(sample: dict, with_answer: bool) -> list[dict]:
    """Chat messages of a sample: image, questions and answers, without the last answer unless `with_answer`.

    A sample has one turn (`question`, `answer`) or several in `turns`.
    """
    turns = sample.get("turns", [sample])
    messages = []
    for number, turn in enumerate(turns):
        content = [{"type": "text", "text": turn["question"]}]
        messages.append({"role": "user", "content": [{"type": "image"}, *content] if number == 0 else content})
        if with_answer or number < len(turns) - 1:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn["answer"]}]})
    return messages


def answer_labels(input_ids: torch.Tensor, header: list[int], end_id: int) -> torch.Tensor:
    """Labels for the assistant's turns: their tokens including the final `end_id`; -100 everywhere else.

    Args:
        input_ids: `(batch, length)` int64.
        header: token ids that begin an assistant's turn, such as those of `"\\nAssistant:"`.
        end_id: id of the token that closes a turn, such as `<end_of_utterance>`.

    Returns labels, `(batch, length)` int64.
    """
    labels = torch.full_like(input_ids, -100)
    for row, ids in enumerate(input_ids.tolist()):
        start = 0
        for position, token in enumerate(ids):
            if token == end_id:
                if ids[start : start + len(header)] == header:
                    span = slice(start + len(header), position + 1)
                    labels[row, span] = input_ids[row, span]
                start = position + 1
    return labels


@dataclass
class QuestionCollator:
    """Collate samples with `image`, `question` and `answer` (or `turns`) into processed tensors with `labels`.

    Args:
        processor: an Idefics3, SmolVLM or QGSA processor.
        with_answer: whether to include the answer and `labels`, padded on the right; False ends in the generation
            prompt, padded on the left, for `generate`.
        image_kwargs: options passed to the image processor with every call.
        alignment: a `PatchWordAlignment` that adds `patch_words`, `(batch, cells)` float32, the similarity between
            cells and words.

    Raises ValueError if the answer of a sample is not found by the chat template.
    """

    processor: object
    with_answer: bool = True
    image_kwargs: dict | None = None
    alignment: object = None

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        texts = [
            self.processor.apply_chat_template(
                conversation(sample, self.with_answer), add_generation_prompt=not self.with_answer
            )
            for sample in samples
        ]
        inputs = self.processor(
            text=texts,
            images=[[sample["image"]] for sample in samples],
            padding=True,
            padding_side="right" if self.with_answer else "left",
            return_tensors="pt",
            **(self.image_kwargs or {}),
        )
        if self.with_answer:
            inputs["labels"] = self.labels(inputs["input_ids"])
        if self.alignment is not None:
            inputs["patch_words"] = self.alignment.similarity(samples)
        return dict(inputs)

    def labels(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Labels of `input_ids`, see `answer_labels`, by the processor's chat template."""
        chat = read_chat_format(self.processor)
        labels = answer_labels(input_ids, chat.answer_header, chat.end_of_utterance_token_id)
        for sample in (labels == -100).all(1).nonzero()[:1, 0].tolist():
            opening = self.processor.tokenizer.decode([chat.end_of_utterance_token_id, *chat.answer_header])
            raise ValueError(
                f"sample {sample}: 0 of {input_ids.shape[1]} positions are labelled, since no answer follows "
                f"{opening!r}. Use a chat template in which a special token closes every turn, and answers that do "
                "not begin with a blank line"
            )
        return labels
