"""Training the tiny dense SmolVLM on cards.

First the vision tower learns to tell what is on single tiles, from captions ("red star"), as the towers of real models
are trained before they meet a language model. Then the language model learns to answer, the tower held fixed, on a
curriculum of canvases: binding a colour to the figure beside it is not learnt from 17 tiles at once.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from training.data.cards import COLOURS, FIGURES, SPLITS, Cards, make_scene, place, render
from training.data.collator import QuestionCollator


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum: `samples` images of `rows` x `columns` tiles, the share `described` of them."""

    rows: int
    columns: int
    samples: int
    described: float

    @property
    def image_kwargs(self) -> dict:
        """Image processor options that keep the canvas at its size: a tile of it is a tile of the model."""
        return {"size": {"longest_edge": 64 * max(self.rows, self.columns)}}


def parse_curriculum(text: str, batch_size: int) -> list[Stage]:
    """Read stages from `"2x2:38400:0.5 4x4:48000:0.2"`: rows x columns : samples : share that is described.

    Samples are rounded down to whole batches. Raises ValueError where a stage cannot be read or holds less than one.
    """
    stages = []
    for part in text.split():
        try:
            canvas, samples, described = part.split(":")
            rows, columns = (int(side) for side in canvas.split("x"))
            stages.append(Stage(rows, columns, int(samples) // batch_size * batch_size, float(described)))
        except ValueError as error:
            raise ValueError(f"curriculum: cannot read the stage {part!r}, write it like 4x4:48000:0.2") from error
        if stages[-1].samples == 0:
            raise ValueError(f"curriculum: the stage {part!r} is smaller than one batch of {batch_size}")
    return stages


class Tower(torch.nn.Module):
    """The vision tower and connector under a mean-pooled classifier of what a tile's caption says."""

    def __init__(self, model):
        super().__init__()
        self.vision_model, self.connector = model.model.vision_model, model.model.connector
        self.classifier = torch.nn.Linear(model.config.text_config.hidden_size, len(COLOURS) + len(FIGURES))

    def forward(self, pixel_values, labels):
        """Loss and logits, `(B, 16)`, of single tiles `(B, 3, H, W)` with the colour and figure `(B, 2)` on them."""
        side = self.vision_model.config.image_size // self.vision_model.config.patch_size
        patches = torch.ones(len(pixel_values), side, side, dtype=torch.bool, device=pixel_values.device)
        hidden = self.vision_model(pixel_values=pixel_values, patch_attention_mask=patches).last_hidden_state
        logits = self.classifier(self.connector(hidden).mean(1))
        colour, figure = logits.split([len(COLOURS), len(FIGURES)], dim=1)
        loss = cross_entropy(colour, labels[:, 0]) + cross_entropy(figure, labels[:, 1])
        return {"loss": loss, "logits": logits}


class Tiles(torch.utils.data.Dataset):
    """Single tiles with one card each: `pixel_values` `(3, 64, 64)` in -1 .. 1 and `labels`, its colour and figure."""

    def __init__(self, split: str, size: int, seed: int):
        self.split, self.size, self.seed = split, size, seed

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        (card,) = cards = make_scene(rng, self.split, 1, 1)
        pixels = torch.from_numpy(render(rng, cards, 1, 1)).permute(2, 0, 1).float() / 127.5 - 1
        return {
            "pixel_values": pixels,
            "labels": torch.tensor([list(COLOURS).index(card.colour), FIGURES.index(card.figure)]),
        }


def train_tower(model, training_args, samples: int):
    """Train the vision tower and connector of `model` on captions of `samples` single tiles; resumable."""
    tower = Tower(model)
    args = replace(
        training_args,
        output_dir=f"{training_args.output_dir}/tower",
        learning_rate=1e-3,
        per_device_train_batch_size=64,
        eval_strategy="no",
    )
    trainer = Trainer(tower, args, train_dataset=Tiles("train", samples, args.seed))
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(args.output_dir) if Path(args.output_dir).exists() else None
    )
    held_out = trainer.predict(Tiles("validation", 1000, args.seed))
    figures = held_out.predictions[:, len(COLOURS) :].argmax(1) == held_out.label_ids[:, 1]
    print(f"vision tower: names the figure on {figures.mean():.1%} of 1000 held-out tiles")


class Conversations(Cards):
    """Cards for learning to answer: the images of a stage are described or asked about, up to four cards each.

    A description names all cards in any order, two facts a card ("red star, blue moon"). The second fact follows from
    the first by the shortest of lookups, which is what answering a question is made of. In reading order it would
    follow from counting instead, and nothing would be bound.
    """

    # Yes and no are learnt last, and are asked the most.
    shares = {
        "count": 0.05,
        "presence": 0.2,
        "refer": 0.15,
        "open": 0.1,
        "verify": 0.25,
        "choice": 0.05,
        "find": 0.1,
        "locate": 0.1,
    }
    DESCRIPTIONS = (
        ("what is on the cards?", lambda card: f"{card.colour} {card.figure}"),
        ("which colours are the shapes?", lambda card: f"{card.figure} {card.colour}"),
        ("where are the cards?", lambda card: f"{card.colour} {place(card)}"),
        ("where are the shapes?", lambda card: f"{card.figure} {place(card)}"),
    )

    def __init__(self, stage: Stage, seed: int):
        super().__init__("train", stage.samples, seed, stage.rows, stage.columns, questions=4)
        self.described = stage.described

    def _turns(self, rng, cards):
        if rng.random() < self.described:
            question, describe = self.DESCRIPTIONS[rng.integers(len(self.DESCRIPTIONS))]
            yield {"question": question, "answer": ", ".join(describe(card) for card in cards)}
        else:
            turns = {turn["question"]: turn for turn in super()._turns(rng, cards)}
            yield from turns.values()  # asked twice, a question would be answered by copying


class CurriculumCollator(QuestionCollator):
    """Collates a batch at the size of its own canvas; all samples of a batch come from one stage."""

    def __call__(self, samples):
        width, height = samples[0]["image"].size
        self.image_kwargs = Stage(height // 64, width // 64, 1, 0.0).image_kwargs
        return super().__call__(samples)


def exact_match_by_family(dataset: Cards):
    """`compute_metrics` for Trainer: the share of answers of which every token is the model's first choice.

    Given the answer's own tokens before it, that is the share greedy decoding would answer exactly.
    """

    def compute_metrics(prediction):
        guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        right = ((guesses == labels) | (labels == -100)).all(axis=1)
        families = np.array([dataset[index]["family"] for index in range(len(dataset))])
        scores = {family: float(right[families == family].mean()) for family in sorted(set(families))}
        return {"exact_match": float(right.mean()), **scores}

    return compute_metrics


def train_dense(model, processor, training_args, curriculum: str, tower_samples: int, validation_size: int):
    """Train `model` (a dense Idefics3 or SmolVLM) on cards and return it; resumes from `training_args`' checkpoint.

    Args:
        curriculum: see `parse_curriculum`.
        tower_samples: single tiles for the vision tower, before the curriculum.
        validation_size: number of validation questions for each evaluation.
    """
    batch = training_args.train_batch_size * training_args.gradient_accumulation_steps
    if not list(Path(training_args.output_dir).glob("checkpoint-*")):
        train_tower(model, training_args, tower_samples)
    model.model.vision_model.requires_grad_(False)
    stages = parse_curriculum(curriculum, batch)
    seeds = range(training_args.seed, training_args.seed + len(stages))  # no stage sees the images of another
    train = torch.utils.data.ConcatDataset([Conversations(stage, seed) for stage, seed in zip(stages, seeds)])
    validation = Cards("validation", validation_size, training_args.seed)
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=CurriculumCollator(processor),
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=exact_match_by_family(validation),
        preprocess_logits_for_metrics=lambda logits, labels: (
            logits[0] if isinstance(logits, tuple) else logits
        ).argmax(-1),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    return trainer.model
