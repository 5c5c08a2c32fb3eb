"""Training the tiny dense SmolVLM on cards, in three steps, as the real ones are made.

1. The language model learns to answer from words: in the place of pictures it reads what they show.
2. The vision tower learns to name what is on single tiles and thumbnails, in the words of that language
   model: its visual tokens are drawn to the embeddings of what they show.
3. Tower and language model are joined on pictures, the tower held fixed.
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
from training.data.cards import COLOURS, FIGURES, SPLITS, TILE, Cards, make_scene, render
from training.data.collator import QuestionCollator
from training.standins.lessons import Lesson, LessonCollator, Lessons, WordCollator


NOISE = 0.5  # of what stands in for visual tokens, in standard deviations of the embeddings
NAME_LENGTH = 0.6  # of a row of the tower's classifier: about that of a fresh linear layer


def parse_stages(text: str, batch_size: int) -> list[tuple[list[tuple[int, int]], int]]:
    """Read `"2x2:9600 2x2,4x4:19200"`: the canvases of a stage, in tiles, and its number of lessons.

    Numbers are rounded down to whole batches. Raises ValueError where a stage cannot be read or holds less than one.
    """
    stages = []
    for part in text.split():
        try:
            canvases, lessons = part.split(":")
            grids = [tuple(int(side) for side in canvas.split("x")) for canvas in canvases.split(",")]
            stages.append((grids, int(lessons) // batch_size * batch_size))
            if any(len(grid) != 2 for grid in grids):
                raise ValueError(part)
        except ValueError as error:
            raise ValueError(f"cannot read the stage {part!r}, write it like 2x2,4x4:9600") from error
        if stages[-1][1] == 0:
            raise ValueError(f"the stage {part!r} is smaller than one batch of {batch_size}")
    return stages


def lessons_of(stages: str, args, seed: int, drawn: bool) -> torch.utils.data.ConcatDataset:
    """The lessons of all `stages` (see `parse_stages`), from `seed` on a seed each, so that none come twice."""
    batch = args.train_batch_size
    parts = parse_stages(stages, batch)
    return torch.utils.data.ConcatDataset(
        [Lessons("train", size, seed + n, grids, batch, drawn) for n, (grids, size) in enumerate(parts)]
    )


class WordTrainer(Trainer):
    """Trains the language model with the embeddings of words, and noise, in the place of visual tokens."""

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
    """The vision tower and connector, naming what is in view: a tile by all its visual tokens, a thumbnail by each.

    The classifier is fixed: the language model's own embeddings of the words for colours and figures.
    """

    def __init__(self, model, words: list[int]):
        super().__init__()
        self.vision_model, self.connector = model.model.vision_model, model.model.connector
        embeddings = model.get_input_embeddings().weight[words].detach()
        self.length = float(embeddings.norm(dim=1).mean()) * 2**0.5  # of the sum of a colour and a figure
        self.register_buffer("names", NAME_LENGTH * torch.nn.functional.normalize(embeddings))

    def tokens(self, pixel_values):
        """Visual tokens of tiles `(B, 3, H, W)`: `(B, P, D)`."""
        side = self.vision_model.config.image_size // self.vision_model.config.patch_size
        patches = torch.ones(len(pixel_values), side, side, dtype=torch.bool, device=pixel_values.device)
        return self.connector(self.vision_model(pixel_values, patch_attention_mask=patches).last_hidden_state)

    @torch.no_grad()
    def rescale(self, pixel_values):
        """Scale the connector so that the tokens of these tiles are as long as the words that they stand for."""
        self.connector.modality_projection.proj.weight.mul_(
            self.length / self.tokens(pixel_values).norm(dim=-1).mean()
        )

    def forward(self, pixel_values, together, labels):
        """Loss and logits `(B, P, 16)` of tiles `(B, 3, H, W)`.

        Args:
            together: `(B,)` bool, whether the visual tokens of a tile name it by the mean of their logits.
            labels: `(B, P, 16)`, the shares of colours and figures.
        """
        logits = self.tokens(pixel_values) @ self.names.T
        logits = torch.where(together[:, None, None], logits.mean(1, keepdim=True), logits)
        kinds = [len(COLOURS), len(FIGURES)]
        parts = zip(logits.flatten(0, 1).split(kinds, dim=1), labels.flatten(0, 1).split(kinds, dim=1))
        return {"loss": sum(cross_entropy(*part) for part in parts), "logits": logits}


class Tiles(torch.utils.data.Dataset):
    """Single tiles with a card or none, and thumbnails of 4 x 4 tiles.

    Each item has `pixel_values` `(3, 64, 64)` in -1 .. 1; `labels` `(16, 16)`, what each visual token is to name,
    equal shares of all colours or all figures where there is none to tell; and `together`, whether the tokens name it
    by the mean of what they say. In a thumbnail each names the colour of its own place, so that cards can be found and
    counted there.

    Args:
        kinds: shares of tiles with a card, of empty tiles and of thumbnails.
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
    """`args` for a step that comes before the last: in a folder of its own, without evaluation."""
    return replace(args, output_dir=f"{args.output_dir}/{name}", eval_strategy="no", **changes)


def train_resumable(trainer: Trainer):
    """Train from the last checkpoint of the trainer's folder, if there is one."""
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


def train_dense(model, processor, args: TrainingArguments, stand_in: StandInArguments):
    """Train `model` (a dense Idefics3 or SmolVLM) on cards and return it; continues an interrupted training.

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
        return questions(samples) | {"use_cache": False}  # Trainer gathers all outputs, and no cache can be gathered

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
    """Train all of `model` on the questions of a data set of real images, and return it; resumes where it stopped."""
    trainer = Trainer(model, args, QuestionCollator(processor), train)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer.model
