"""Lessons: a picture of cards and a dozen questions about it in one sequence, for fast training.

The attention mask hides the questions from each other, and the position ids of each question start at the end of the
picture. A lesson of twelve questions is therefore worth twelve samples, while the picture, which is most of the cost,
is processed once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from training.data.cards import (
    COLOURS,
    FIGURES,
    SPLITS,
    TILES_NEEDED,
    Card,
    leave_one_out,
    make_question,
    make_scene,
    place,
    render,
)
from training.data.collator import conversation


# Families that are learnt last have larger shares than in the benchmark.
SHARES = {
    "count": 0.05,
    "presence": 0.12,
    "refer": 0.08,
    "open": 0.16,
    "verify": 0.28,
    "choice": 0.08,
    "find": 0.15,
    "locate": 0.08,
}
# With relations. Descriptions teach the lookups of refer, open, find and locate too.
ALL_SHARES = {
    "count": 0.04,
    "presence": 0.06,
    "refer": 0.11,
    "open": 0.05,
    "verify": 0.18,
    "choice": 0.05,
    "find": 0.07,
    "locate": 0.11,
    "left": 0.11,
    "above": 0.11,
    "share": 0.05,
    "odd": 0.06,
}
ODD_SHARE = 0.25  # of the scenes, if the odd one out is asked for
DESCRIPTIONS = (
    ("what is on the cards?", lambda card: (card.colour, card.figure)),
    ("which colours are the shapes?", lambda card: (card.figure, card.colour)),
    ("where are the cards?", lambda card: (card.colour, place(card))),
    ("where are the shapes?", lambda card: (card.figure, place(card))),
)
ALL_DESCRIPTIONS = (
    *DESCRIPTIONS,
    ("which colours are where?", lambda card: (place(card), card.colour)),
    ("which shapes are where?", lambda card: (place(card), card.figure)),
)
WITHOUT_FIGURES = ("where are the cards?", "which colours are where?")  # what a thumbnail can answer
UNSPLIT_SHARE = 0.2


@dataclass(frozen=True)
class Question:
    """A question and its answer in pieces, each with whether it is learnt; pieces that cannot be inferred are not."""

    text: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Lesson:
    """A scene of `rows` x `columns` tiles, shown in tiles or (`split` False) as a thumbnail only."""

    rows: int
    columns: int
    split: bool
    cards: tuple[Card, ...]
    image: Image.Image | None
    questions: tuple[Question, ...]


def describe(rng: np.random.Generator, cards: tuple[Card, ...], split: bool, kinds=DESCRIPTIONS) -> Question:
    """Ask for all cards in random order, two facts per card ("red star, blue moon"), in one of the `kinds`.

    The first fact is arbitrary and is not learnt. The second follows from it by a single lookup, the elementary step
    of answering a question; it is not learnt if two cards share the first fact. In reading order, it would follow from
    counting instead.
    """
    kinds = [kind for kind in kinds if split or kind[0] in WITHOUT_FIGURES]
    text, facts = kinds[rng.integers(len(kinds))]
    pairs = [facts(cards[number]) for number in rng.permutation(len(cards))]
    named, pieces = [first for first, _ in pairs], []
    for number, (first, second) in enumerate(pairs):
        pieces += [(f", {first}" if number else f" {first}", False), (f" {second}", named.count(first) == 1)]
    return Question(text, tuple(pieces))


class Lessons(torch.utils.data.Dataset):
    """Lessons on canvases of `grids`, a list of (rows, columns); every lesson is generated from its index.

    Args:
        split, seed: as for `Cards`.
        size: number of lessons.
        batch_size: number of consecutive lessons that share their canvas, and whether they are shown in tiles.
        drawn: whether to draw the picture.
        questions: number of questions per lesson.
        shares: shares of the families among the questions.
        descriptions: number of descriptions of all cards per lesson.
        kinds: kinds of descriptions.
    """

    def __init__(
        self,
        split,
        size,
        seed,
        grids,
        batch_size,
        drawn=True,
        questions=12,
        shares=SHARES,
        descriptions=1,
        kinds=DESCRIPTIONS,
    ):
        self.split, self.size, self.seed, self.grids = split, size, seed, grids
        self.batch_size, self.drawn, self.questions, self.shares = batch_size, drawn, questions, shares
        self.descriptions, self.kinds = descriptions, kinds

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        stream = (self.seed, SPLITS.index(self.split))
        common = np.random.default_rng((*stream, index // self.batch_size))
        rows, columns = self.grids[common.integers(len(self.grids))]
        split = bool(common.random() >= UNSPLIT_SHARE)
        rng = np.random.default_rng((*stream, index // self.batch_size, index % self.batch_size))
        cards = make_scene(rng, self.split, rows, columns)
        if "odd" in self.shares and rng.random() < ODD_SHARE:
            cards = leave_one_out(rng, cards, cards[0])
        questions = [self._ask(rng, cards, split) for _ in range(self.questions)]
        questions += [describe(rng, cards, split, self.kinds) for _ in range(self.descriptions)]
        image = Image.fromarray(render(rng, cards, rows, columns)) if self.drawn else None
        return Lesson(rows, columns, split, cards, image, tuple(questions))

    def _ask(self, rng, cards, split):
        families = [family for family in self.shares if split or TILES_NEEDED[family] == "none"]
        shares = np.array([self.shares[family] for family in families])
        turn = None
        while turn is None:
            family = families[rng.choice(len(families), p=shares / shares.sum())]
            turn = make_question(rng, family, cards, cards[rng.integers(len(cards))])
        return Question(turn["question"], ((f" {turn['answer']}", True),))


class LessonCollator:
    """Packs lessons into `input_ids`, `position_ids`, `labels` `(B, L)` and a bool `attention_mask` `(B, 1, L, L)`.

    With pictures, the processor's `pixel_values` and `pixel_attention_mask` are added. All lessons of a batch must
    share their canvas.
    """

    def __init__(self, processor):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.known = {}  # token ids of texts seen so far: questions and pieces of answers recur
        sample = {"question": "{}", "answer": ""}
        text = processor.apply_chat_template(conversation(sample, with_answer=False), add_generation_prompt=True)
        self.opening, self.asking = text.split("<image>")
        self.end_id = self.tokenizer.convert_tokens_to_ids("<end_of_utterance>")

    def __call__(self, lessons: list[Lesson]) -> dict[str, torch.Tensor]:
        prefixes, visual = self.show(lessons)
        return self.pack(prefixes, [lesson.questions for lesson in lessons]) | visual

    def show(self, lessons):
        """Token ids of everything before the questions, one list per lesson, and the visual inputs."""
        first = lessons[0]
        inputs = self.processor(
            text=[f"{self.opening}<image>?"] * len(lessons),  # QGSAProcessor requires a question
            images=[[lesson.image] for lesson in lessons],
            size={"longest_edge": max(first.image.size)},  # keeps the canvas at its size
            do_image_splitting=first.split,
            return_tensors="pt",
        )
        visual = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")}
        return [ids[:-1] for ids in inputs["input_ids"].tolist()], visual

    def pack(self, prefixes: list[list[int]], questions: list[tuple[Question, ...]]) -> dict[str, torch.Tensor]:
        """Append the questions of each lesson to its prefix, and mask them from each other."""
        rows = [self._row(prefix, asked) for prefix, asked in zip(prefixes, questions)]
        longest = max(len(ids) for ids, *_ in rows)
        fill = (self.tokenizer.pad_token_id, 0, -100, -1)  # branch -1: padding attends to padding only
        ids, positions, labels, branch = (
            torch.tensor([row[part] + [fill[part]] * (longest - len(row[part])) for row in rows]) for part in range(4)
        )
        seen = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        mask = seen & torch.ones(longest, longest, dtype=torch.bool).tril()
        return {"input_ids": ids, "position_ids": positions, "labels": labels, "attention_mask": mask[:, None]}

    def _row(self, prefix, questions):
        """Token ids, positions, labels and branches (0 for the prefix, then one per question) of one lesson."""
        ids, labels = list(prefix), [-100] * len(prefix)
        positions, branch = list(range(len(prefix))), [0] * len(prefix)
        for number, question in enumerate(questions, start=1):
            tokens = self._encode(self.asking.format(question.text))
            learnt = [-100] * len(tokens)
            for piece, is_learnt in question.pieces:
                piece = self._encode(piece)
                tokens, learnt = tokens + piece, learnt + (piece if is_learnt else [-100] * len(piece))
            tokens, learnt = tokens + [self.end_id], learnt + [self.end_id]
            positions += range(len(prefix), len(prefix) + len(tokens))
            ids, labels, branch = ids + tokens, labels + learnt, branch + [number] * len(tokens)
        return ids, positions, labels, branch

    def _encode(self, text):
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]


class WordCollator(LessonCollator):
    """Lessons without pictures: `words` `(V, 2)` has the contents of each visual token as token ids, -1 for nothing.

    A tile is one visual token with the colour and figure of its card; the thumbnail is 4 x 4 tokens with colours.
    """

    def __init__(self, processor):
        super().__init__(processor)
        self.ids = {word: self._encode(f" {word}")[0] for word in (*COLOURS, *FIGURES)}

    def show(self, lessons):
        shown = [self._show(lesson) for lesson in lessons]
        words = torch.tensor([word for _, words in shown for word in words])
        return [self._encode(self.opening + text) for text, _ in shown], {"words": words}

    def _show(self, lesson):
        """The image part of a prompt, as the processor writes it, and the words for its visual tokens."""
        on = {(card.row, card.column): (self.ids[card.colour], self.ids[card.figure]) for card in lesson.cards}
        nothing = (-1, -1)
        text, words = "", []
        if lesson.split:
            for row in range(lesson.rows):
                for column in range(lesson.columns):
                    text += f"<fake_token_around_image><row_{row + 1}_col_{column + 1}><image>"
                    words.append(on.get((row, column), nothing))
                text += "\n"
            text += "\n"
        text += f"<fake_token_around_image><global-img>{'<image>' * 16}<fake_token_around_image>"
        cells = [(row * lesson.rows // 4, column * lesson.columns // 4) for row in range(4) for column in range(4)]
        return text, words + [(on.get(cell, nothing)[0], -1) for cell in cells]
