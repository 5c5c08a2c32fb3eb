"""Training of the tiny dense SmolVLM on cards, in three steps similar to those of a real one.

1. The language model learns to answer from words: visual tokens are replaced by the words for what they show.
2. The vision tower learns to name the contents of single tiles and thumbnails: its visual tokens are pulled towards
   the language model's embeddings of those words.
3. Tower and language model are trained together on pictures, with the tower frozen.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from training.cli.groups import StandInArguments
from training.data.cards import COLOURS, FIGURES, SPLITS, TILE, Cards, make_scene, parse_canvas, render
from training.data.collator import QuestionCollator
from training.standins.lessons import Lesson, LessonCollator, Lessons, WordCollator


NOISE = 0.5  # on the words that replace visual tokens, in standard deviations of the embeddings
NAME_LENGTH = 0.6  # norm of a row of the tower's classifier, about that of a new linear layer


def parse_stages(text: str, batch_size: int) -> list[tuple[list[tuple[int, int]], int]]:
    """Parse `"2x2:9600 2x2,4x4:19200"`: per stage, its canvases in tiles and its number of lessons.

    Numbers are rounded down to whole batches. Raises ValueError if a stage cannot be parsed, or is below one batch.
    """
    stages = []
    for part in text.split():
        try:
            canvases, lessons = part.split(":")
            grids = [parse_canvas(canvas) for canvas in canvases.split(",")]
            stages.append((grids, int(lessons) // batch_size * batch_size))
        except ValueError as error:
            raise ValueError(f"stage ({part!r}): cannot be parsed. Write it like 2x2,4x4:9600") from error
        if stages[-1][1] == 0:
            raise ValueError(f"stage ({part!r}): must not be smaller than one batch ({batch_size})")
    return stages


def lessons_of(stages: str, args, seed: int, drawn: bool) -> torch.utils.data.ConcatDataset:
    """The lessons of all `stages` (see `parse_stages`); each stage has its own seed, so that no lesson is repeated."""
    batch = args.train_batch_size
    parts = parse_stages(stages, batch)
    return torch.utils.data.ConcatDataset(
        [Lessons("train", size, seed + n, grids, batch, drawn) for n, (grids, size) in enumerate(parts)]
    )


class WordTrainer(Trainer):
    """Trains the language model on word embeddings with noise instead of visual tokens."""

    def compute_loss(self, model, inputs, **kwargs):
        inputs = dict(inputs)
        words, input_ids = inputs.pop("words"), inputs.pop("input_ids")
        embedding = model.get_input_embeddings()
        shown = (embedding(words.clamp(min=0)) * (words >= 0)[..., None]).sum(1)
        shown = shown + NOISE * embedding.weight.detach().std() * torch.randn_like(shown)
        places = (input_ids == model.config.image_token_id)[..., None]
        inputs["inputs_embeds"] = embedding(input_ids).masked_scatter(places, shown)
        return super().compute_loss(model, inputs, **kwargs)


class Tower(torch.nn.Module):
    """Vision tower and connector with a classifier; the visual tokens of a tile are averaged, a thumbnail's are not.

    The classifier is frozen: it consists of the language model's embeddings of the words for colours and figures.
    """

    def __init__(self, model, words: list[int]):
        super().__init__()
        self.vision_model, self.connector = model.model.vision_model, model.model.connector
        embeddings = model.get_input_embeddings().weight[words].detach()
        self.length = float(embeddings.norm(dim=1).mean()) * 2**0.5  # norm of the sum of a colour and a figure
        self.register_buffer("names", NAME_LENGTH * torch.nn.functional.normalize(embeddings))

    def tokens(self, pixel_values):
        """Visual tokens of tiles `(B, 3, H, W)`: `(B, P, D)`."""
        side = self.vision_model.config.image_size // self.vision_model.config.patch_size
        patches = torch.ones(len(pixel_values), side, side, dtype=torch.bool, device=pixel_values.device)
        return self.connector(self.vision_model(pixel_values, patch_attention_mask=patches).last_hidden_state)

    @torch.no_grad()
    def rescale(self, pixel_values):
        """Scale the connector so that the tokens of these tiles have the norm of the words that they stand for."""
        self.connector.modality_projection.proj.weight.mul_(
            self.length / self.tokens(pixel_values).norm(dim=-1).mean()
        )

    def forward(self, pixel_values, together, labels):
        """Loss and logits `(B, P, 16)` of tiles `(B, 3, H, W)`.

        Args:
            together: `(B,)` bool, whether the logits are averaged over the visual tokens of a tile.
            labels: `(B, P, 16)`, target probabilities of colours and figures.
        """
        logits = self.tokens(pixel_values) @ self.names.T
        logits = torch.where(together[:, None, None], logits.mean(1, keepdim=True), logits)
        kinds = [len(COLOURS), len(FIGURES)]
        parts = zip(logits.flatten(0, 1).split(kinds, dim=1), labels.flatten(0, 1).split(kinds, dim=1))
        return {"loss": sum(cross_entropy(*part) for part in parts), "logits": logits}


class Tiles(torch.utils.data.Dataset):
    """Single tiles with or without a card, and thumbnails of 4 x 4 tiles.

    Each item has `pixel_values` `(3, 64, 64)` between -1 and 1; `labels` `(16, 16)`, the target probabilities of each
    visual token, uniform over colours or figures if there are none to name; and `together`, whether the logits of the
    tokens are averaged. In a thumbnail, each token names the colour at its own position, so that cards can be found
    and counted there.

    Args:
        split, seed: as for `Cards`.
        size: number of items.
        kinds: shares of tiles with a card, empty tiles and thumbnails.
    """

    def __init__(self, split: str, size: int, seed: int, kinds=(0.75, 0.1, 0.15)):
        self.split, self.size, self.seed, self.kinds = split, size, seed, kinds

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        kind = ("card", "empty", "thumbnail")[rng.choice(3, p=self.kinds)]
        side = 4 if kind == "thumbnail" else 1
        cards = () if kind == "empty" else make_scene(rng, self.split, side, side)
        image = Image.fromarray(render(rng, cards, side, side)).resize((TILE, TILE), Image.Resampling.LANCZOS)
        labels = torch.full((4, 4, len(COLOURS) + len(FIGURES)), 1 / 8)
        colours, figures = labels.split([len(COLOURS), len(FIGURES)], dim=-1)
        for card in cards:
            place = (card.row, card.column) if kind == "thumbnail" else ...
            colours[place] = torch.eye(len(COLOURS))[list(COLOURS).index(card.colour)]
            if kind == "card":
                figures[place] = torch.eye(len(FIGURES))[FIGURES.index(card.figure)]
        return {
            "pixel_values": torch.tensor(np.asarray(image)).permute(2, 0, 1) / 127.5 - 1,
            "labels": labels.flatten(0, 1),
            "together": kind != "thumbnail",
        }


def stage_arguments(args, name: str, **changes):
    """`args` for a step before the last: in a subfolder, without evaluation."""
    return replace(args, output_dir=f"{args.output_dir}/{name}", eval_strategy="no", **changes)


def train_resumable(trainer: Trainer):
    """Train, continuing from the last checkpoint in the trainer's folder, if there is one."""
    folder = trainer.args.output_dir
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if Path(folder).exists() else None)


def train_tower(model, processor, args, samples: int):
    """Step 2: train the vision tower and connector of `model` on `samples` tiles and thumbnails."""
    words = [processor.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in (*COLOURS, *FIGURES)]
    args = stage_arguments(args, "tower", learning_rate=1e-3, per_device_train_batch_size=64)
    tower = Tower(model, words)
    trainer = Trainer(tower, args, train_dataset=Tiles("train", samples, args.seed))
    train_resumable(trainer)
    tiles = Tiles("validation", 1000, args.seed, kinds=(1, 0, 0))
    tower.rescale(torch.stack([tiles[index]["pixel_values"] for index in range(64)]).to(args.device))
    held_out = trainer.predict(tiles)
    guessed, shown = (part[:, 0, len(COLOURS) :].argmax(1) for part in (held_out.predictions, held_out.label_ids))
    print(f"vision tower: names the figure on {(guessed == shown).mean():.1%} of 1000 held-out tiles")


def exact_match_by_family(dataset: Cards):
    """`compute_metrics` for Trainer: the share of answers whose every token is the model's first choice.

    This equals the exact match of greedy decoding.
    """

    def compute_metrics(prediction):
        guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        right = ((guesses == labels) | (labels == -100)).all(axis=1)
        families = np.array([dataset[index]["family"] for index in range(len(dataset))])
        scores = {family: float(right[families == family].mean()) for family in sorted(set(families))}
        return {"exact_match": float(right.mean()), **scores}

    return compute_metrics


def train_dense(model, processor, args: TrainingArguments, stand_in: StandInArguments):
    """Train `model` (a dense Idefics3 or SmolVLM) on cards and return it; resumes an interrupted run.

    Raises ValueError if the stages of `stand_in` cannot be parsed, see `parse_stages`.
    """
    picture_lessons = lessons_of(stand_in.pictures, args, args.seed + 100, drawn=True)
    if not list(Path(args.output_dir).glob("checkpoint-*")):
        reader = stage_arguments(args, "words")
        word_lessons = lessons_of(stand_in.words, args, args.seed, drawn=False)
        train_resumable(WordTrainer(model, reader, WordCollator(processor), word_lessons))
        train_tower(model, processor, args, stand_in.tower_samples)
    model.model.vision_model.requires_grad_(False)
    validation = Cards("validation", stand_in.validation_size, args.seed)
    lessons, questions = LessonCollator(processor), QuestionCollator(processor)

    def collate(samples):
        if isinstance(samples[0], Lesson):
            return lessons(samples)
        return questions(samples) | {"use_cache": False}  # Trainer gathers all outputs, and cannot gather a cache

    trainer = Trainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=picture_lessons,
        eval_dataset=validation,
        compute_metrics=exact_match_by_family(validation),
        preprocess_logits_for_metrics=lambda logits, labels: (
            logits[0] if isinstance(logits, tuple) else logits
        ).argmax(-1),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer.model


def train_on_questions(model, processor, args, train):
    """Train all of `model` on questions about real images and return it; resumes an interrupted run."""
    trainer = Trainer(model, args, QuestionCollator(processor), train)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer.model
