"""Training of the tiny dense SmolVLM on cards, in three steps similar to those of a real one.

1. The language model learns to answer from words: visual tokens are replaced by the words for what they show.
2. The vision tower learns to name the contents of single tiles and thumbnails: its visual tokens are pulled towards
   the language model's embeddings of those words.
3. Tower and language model are trained together on pictures, with the tower frozen.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from training.cli.groups import StandInArguments
from training.data.cards import COLOURS, FIGURES, Cards, parse_canvas
from training.data.collator import QuestionCollator
from training.learning.stages import stage_arguments, train_resumable
from training.standins.lessons import Lesson, LessonCollator, Lessons, WordCollator
from training.standins.tower import Tiles, WordTower, figures_named


NOISE = 0.5  # on the words that replace visual tokens, in standard deviations of the embeddings


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


def lessons_of(stages: str, args, seed: int, **options) -> torch.utils.data.ConcatDataset:
    """The lessons of all `stages` (see `parse_stages`) with the `options` of [`Lessons`].

    Each stage has its own seed, so that no lesson is repeated.
    """
    batch = args.train_batch_size
    parts = parse_stages(stages, batch)
    return torch.utils.data.ConcatDataset(
        [Lessons("train", size, seed + n, grids, batch, **options) for n, (grids, size) in enumerate(parts)]
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


def word_ids(tokenizer) -> list[int]:
    """Token ids of the words for colours and figures."""
    return [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in (*COLOURS, *FIGURES)]


def train_word_tower(model, processor, args, samples: int):
    """Step 2: train the vision tower and connector of `model` on `samples` tiles and thumbnails."""
    args = stage_arguments(args, "tower", learning_rate=1e-3, per_device_train_batch_size=64)
    tower = WordTower(model, word_ids(processor.tokenizer))
    trainer = Trainer(tower, args, train_dataset=Tiles("train", samples, args.seed))
    train_resumable(trainer)
    tiles = Tiles("validation", 1000, args.seed, kinds=(1, 0, 0))
    tower.rescale(torch.stack([tiles[index]["pixel_values"] for index in range(64)]).to(args.device))
    print(f"vision tower: names the figure on {figures_named(trainer.predict(tiles)):.1%} of 1000 held-out tiles")


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
    picture_lessons = lessons_of(stand_in.pictures, args, args.seed + 100)
    if not list(Path(args.output_dir).glob("checkpoint-*")):
        reader = stage_arguments(args, "words")
        word_lessons = lessons_of(stand_in.words, args, args.seed, drawn=False)
        train_resumable(WordTrainer(model, reader, WordCollator(processor), word_lessons))
        train_word_tower(model, processor, args, stand_in.tower_samples)
    validation = Cards("validation", stand_in.validation_size, args.seed)
    return train_on_pictures(model, processor, args, picture_lessons, validation)


def train_on_pictures(model, processor, args, lessons, validation: Cards, kind=Trainer, collator=None):
    """The last step: train `model` on `lessons` with its tower frozen, evaluated on `validation`.

    Args:
        kind, collator: the trainer, and the collator of its lessons; by default the stock one on whole pictures.
    """
    model.model.vision_model.requires_grad_(False)
    collator, questions = collator or LessonCollator(processor), QuestionCollator(processor)

    def collate(samples):
        if isinstance(samples[0], Lesson):
            return collator(samples)
        return questions(samples) | {"use_cache": False}  # Trainer gathers all outputs, and cannot gather a cache

    trainer = kind(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=lessons,
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
