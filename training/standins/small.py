"""Training of the small dense SmolVLM on cards, whose visual tokens live in a space of their own.

1. The vision tower learns to name the contents of single tiles and thumbnails with a free classifier, which is thrown
   away: the language model's words play no part in it. The tower is frozen from here on.
2. The language model learns to answer from glimpses of pictures, one visual token per tile, the mean of its own, so
   that sequences are short. The connector stays random: the tokens that it makes are not words.
3. Connector and language model learn to answer from all visual tokens.

In 2 and 3, the language model also learns to name what each visual token shows, and where, in its first layers.
"""

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, layer_norm
from transformers import Trainer, TrainingArguments

from training.cli.groups import StandInArguments
from training.data.cards import COLOURS, FIGURES, Cards
from training.learning.distillation import visual_tokens
from training.learning.stages import stage_arguments, train_resumable
from training.standins.dense import lessons_of, train_on_pictures
from training.standins.lessons import ALL_DESCRIPTIONS, ALL_SHARES, Lesson, LessonCollator
from training.standins.muon import make_optimizer
from training.standins.tower import GRID, FreeTower, Tiles, cell_tile, figures_named


READING_LAYERS = 4  # layers of the language model after which visual tokens are named
NAMES = (len(COLOURS), len(FIGURES), GRID, GRID)  # of colours, figures, rows and columns
NAME_LENGTH = 0.6  # norm of a row of the classifier of visual tokens, about that of a new linear layer
CANVASES = ((4, 4), (4, 4), (3, 4), (4, 3), (2, 4), (4, 2))  # of thumbnails and of validation questions
KINDS = (0.7, 0.08, 0.22)  # shares of tiles with a card, empty tiles and thumbnails
COLOUR_NAMES = list(COLOURS)
LESSONS = {"questions": 9, "shares": ALL_SHARES, "descriptions": 3, "kinds": ALL_DESCRIPTIONS}
GLIMPSE_RATE = 2e-3  # learning rate of step 2


class GlimpseCollator(LessonCollator):
    """Lessons whose prompts hold one visual token per tile, or all of them; position ids are those of whole prompts.

    Adds `shown` `(B, V, 4)` int64, what each visual token of a prompt shows: indices of the colour (`COLOURS`), the
    figure (`FIGURES`), and the row and column of its tile; -100 for nothing.

    Args:
        whole: whether to keep all visual tokens of a tile.
    """

    def __init__(self, processor, whole: bool = False):
        super().__init__(processor)
        self.whole = whole

    def __call__(self, lessons: list[Lesson]) -> dict[str, torch.Tensor]:
        inputs = super().__call__(lessons)
        first, count = lessons[0], self.processor.image_seq_len
        visual = (inputs["input_ids"][0] == self.processor.image_token_id).nonzero().flatten().view(-1, count)
        tiles = [(row, column) for row in range(first.rows) for column in range(first.columns)] if first.split else []
        inputs["shown"] = torch.tensor([self._shown(lesson, tiles, count) for lesson in lessons])
        if not self.whole:
            dropped = torch.ones(len(tiles), count, dtype=torch.bool)
            dropped[torch.arange(len(tiles)), torch.randint(count, (len(tiles),))] = False
            kept = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
            kept[visual[: len(tiles)][dropped]] = False
            for name in ("input_ids", "position_ids", "labels"):
                inputs[name] = inputs[name][:, kept]
            inputs["attention_mask"] = inputs["attention_mask"][..., kept, :][..., kept]
        return inputs

    def _shown(self, lesson, tiles, count):
        on = {(card.row, card.column): card for card in lesson.cards}
        shown = []
        for tile in tiles:
            card = on.get(tile)
            names = (COLOUR_NAMES.index(card.colour), FIGURES.index(card.figure)) if card else (-100, -100)
            shown += [(*names, *tile)] * (count if self.whole else 1)
        for row in range(GRID):
            for column in range(GRID):
                tile = cell_tile(row, column, lesson.rows, lesson.columns)
                shown.append((COLOUR_NAMES.index(on[tile].colour) if tile in on else -100, -100, *tile))
        return shown


class GlimpseTrainer(Trainer):
    """Trains connector and language model on batches of `GlimpseCollator`, the tower frozen.

    Beside the answers, the language model learns to read visual tokens, see `reading_loss`. From answers alone, little
    gradient asks a visual token to look at the marker of its tile.
    """

    def create_optimizer(self, *args):
        """Muon, see `make_optimizer`."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.args)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "shown" not in inputs:  # questions of the evaluation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        pixels, shown, ids = inputs.pop("pixel_values"), inputs.pop("shown"), inputs.pop("input_ids")
        inputs.pop("pixel_attention_mask")
        dense = self.model  # `model` may be wrapped for several processes
        vision, connector = dense.model.vision_model, dense.model.connector
        tokens = visual_tokens(vision, connector, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        if shown.shape[1] < tokens.shape[1] * tokens.shape[2]:
            tiles, thumbnail = tokens[:, :-1].mean(2), tokens[:, -1]
            tokens = torch.cat([tiles, thumbnail], dim=1)
        visual = ids == dense.config.image_token_id
        inputs["inputs_embeds"] = dense.get_input_embeddings()(ids).masked_scatter(visual[..., None], tokens)
        loss, outputs = super().compute_loss(
            model, inputs | {"output_hidden_states": True, "use_cache": False}, True, num_items_in_batch
        )
        read = outputs.hidden_states[READING_LAYERS][visual].unflatten(0, shown.shape[:2])
        loss = loss + reading_loss(read, shown)
        return (loss, outputs) if return_outputs else loss


def reading_loss(hidden: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Cross entropy of what visual tokens show, by a classifier that is random and frozen.

    Words play no part in it: what a hidden state has to say lies along arbitrary directions.

    Args:
        hidden: `(B, V, D)`, after the layers that read.
        shown: `(B, V, 4)`, as `GlimpseCollator` adds it; -100 counts as nothing.
    """
    width = hidden.shape[-1]
    generator = torch.Generator().manual_seed(0)
    names = torch.randn(sum(NAMES), width, generator=generator) * NAME_LENGTH / width**0.5
    logits = (layer_norm(hidden, (width,)) @ names.to(hidden).T).flatten(0, 1).split(NAMES, dim=1)
    losses = [
        cross_entropy(part, each, ignore_index=-100, reduction="sum") / (each >= 0).sum().clamp(min=1)
        for part, each in zip(logits, shown.flatten(0, 1).unbind(1))
    ]
    return torch.stack(losses).sum()


def train_tower(model, args, samples: int):
    """Step 1: train the vision tower of `model` on `samples` tiles and thumbnails with a free classifier."""
    args = stage_arguments(args, "tower", learning_rate=1e-3, per_device_train_batch_size=64)
    tower = FreeTower(model)
    options = {"canvases": CANVASES, "places": True}
    trainer = Trainer(tower, args, train_dataset=Tiles("train", samples, args.seed, KINDS, **options))
    train_resumable(trainer)
    held_out = trainer.predict(Tiles("validation", 1000, args.seed, kinds=(1, 0, 0), **options))
    print(f"vision tower: names the figure on {figures_named(held_out):.1%} of 1000 held-out tiles")


@torch.no_grad()
def rescale(model, args):
    """Scale the connector so that the visual tokens of pictures are about as long as words."""
    model.to(args.device)
    tiles = Tiles("validation", 64, args.seed, KINDS, canvases=CANVASES)
    pixels = torch.stack([tiles[index]["pixel_values"] for index in range(64)]).to(args.device)
    tokens = visual_tokens(model.model.vision_model, model.model.connector, pixels)
    words = model.get_input_embeddings().weight.norm(dim=-1).mean()
    model.model.connector.modality_projection.proj.weight.mul_(2**0.5 * words / tokens.norm(dim=-1).mean())


def train_small(model, processor, args: TrainingArguments, stand_in: StandInArguments):
    """Train `model` (a dense Idefics3 or SmolVLM) on cards with relations and return it; resumes an interrupted run.

    Raises ValueError if the stages of `stand_in` cannot be parsed, see `parse_stages`.
    """
    glimpse_lessons = lessons_of(stand_in.glimpses, args, args.seed, **LESSONS)
    picture_lessons = lessons_of(stand_in.pictures, args, args.seed + 100, **LESSONS)
    if not list(Path(args.output_dir).glob("checkpoint-*")):
        train_tower(model, args, stand_in.tower_samples)
        rescale(model, args)
        model.model.vision_model.requires_grad_(False)
        model.model.connector.requires_grad_(False)
        glimpses = stage_arguments(args, "glimpses", learning_rate=GLIMPSE_RATE)
        train_resumable(GlimpseTrainer(model, glimpses, GlimpseCollator(processor), glimpse_lessons))
    model.model.connector.requires_grad_(True)
    validation = Cards("validation", stand_in.validation_size, args.seed, CANVASES, tuple(ALL_SHARES))
    whole = GlimpseCollator(processor, whole=True)
    return train_on_pictures(model, processor, args, picture_lessons, validation, GlimpseTrainer, whole)
