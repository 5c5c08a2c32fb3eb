"""Vision towers that learn to name the contents of single tiles and thumbnails, and the pictures they learn from."""

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, normalize

from training.data.cards import CANVAS, COLOURS, FIGURES, SPLITS, TILE, make_scene, render
from training.learning.distillation import visual_tokens


NAME_LENGTH = 0.6  # norm of a row of the classifier of words, about that of a new linear layer
GRID = 4  # visual tokens along a side of a tile


def naming(logits, together, labels):
    """Loss and logits `(B, P, N)` of the names that visual tokens give to what they show.

    Args:
        logits: `(B, P, N)`, of colours and figures, and of rows and columns if `labels` have them.
        together: `(B,)` bool, whether the logits are averaged over the visual tokens of a tile.
        labels: `(B, P, N)`, target probabilities.
    """
    logits = torch.where(together[:, None, None], logits.mean(1, keepdim=True), logits)
    kinds = [len(COLOURS), len(FIGURES), GRID, GRID]
    kinds = kinds if labels.shape[-1] == sum(kinds) else kinds[:2]
    parts = zip(logits.flatten(0, 1).split(kinds, dim=1), labels.flatten(0, 1).split(kinds, dim=1))
    return {"loss": sum(cross_entropy(*part) for part in parts), "logits": logits}


class WordTower(torch.nn.Module):
    """Vision tower and connector with a classifier; the visual tokens of a tile are averaged, a thumbnail's are not.

    The classifier is frozen: it consists of the language model's embeddings of the words for colours and figures.
    """

    def __init__(self, model, words: list[int]):
        super().__init__()
        self.vision_model, self.connector = model.model.vision_model, model.model.connector
        embeddings = model.get_input_embeddings().weight[words].detach()
        self.length = float(embeddings.norm(dim=1).mean()) * 2**0.5  # norm of the sum of a colour and a figure
        self.register_buffer("names", NAME_LENGTH * normalize(embeddings))

    def tokens(self, pixel_values):
        """Visual tokens of tiles `(B, 3, H, W)`: `(B, P, D)`."""
        return visual_tokens(self.vision_model, self.connector, pixel_values)

    @torch.no_grad()
    def rescale(self, pixel_values):
        """Scale the connector so that the tokens of these tiles have the norm of the words that they stand for."""
        self.connector.modality_projection.proj.weight.mul_(
            self.length / self.tokens(pixel_values).norm(dim=-1).mean()
        )

    def forward(self, pixel_values, together, labels):
        """Loss and logits `(B, P, 16)` of tiles `(B, 3, H, W)`, see `naming`."""
        return naming(self.tokens(pixel_values) @ self.names.T, together, labels)


class FreeTower(torch.nn.Module):
    """Vision tower with a linear classifier of its own, on the patches that make up a visual token.

    It names colours, figures, and the row and column of a visual token within a thumbnail. The language model plays no
    part in it, and the connector is not trained.
    """

    def __init__(self, model):
        super().__init__()
        self.vision_model, self.scale = model.model.vision_model, model.config.scale_factor
        self.shuffle = model.model.connector.pixel_shuffle
        width = self.vision_model.config.hidden_size * self.scale**2
        self.classifier = torch.nn.Linear(width, len(COLOURS) + len(FIGURES) + 2 * GRID)

    def forward(self, pixel_values, together, labels):
        """Loss and logits `(B, P, 24)` of tiles `(B, 3, H, W)`, see `naming`."""
        tokens = visual_tokens(self.vision_model, lambda hidden: self.shuffle(hidden, self.scale), pixel_values)
        return naming(self.classifier(tokens), together, labels)


class Tiles(torch.utils.data.Dataset):
    """Single tiles with or without a card, and thumbnails of whole canvases.

    Each item has `pixel_values` `(3, 64, 64)` between -1 and 1; `labels` `(16, 16)`, the target probabilities of each
    visual token, uniform over colours or figures if there are none to name; and `together`, whether the logits of the
    tokens are averaged. In a thumbnail, each token names the colour at its own position, so that cards can be found
    and counted there.

    Args:
        split, seed: as for `Cards`.
        size: number of items.
        kinds: shares of tiles with a card, empty tiles and thumbnails.
        canvases: canvases of the thumbnails, as `(rows, columns)` in tiles.
        places: whether `labels` `(16, 24)` have the row and column of each token of a thumbnail too.
    """

    def __init__(self, split: str, size: int, seed: int, kinds=(0.75, 0.1, 0.15), canvases=(CANVAS,), places=False):
        self.split, self.size, self.seed, self.kinds = split, size, seed, kinds
        self.canvases, self.places = canvases, places

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        kind = ("card", "empty", "thumbnail")[rng.choice(3, p=self.kinds)]
        rows, columns = self.canvases[index % len(self.canvases)] if kind == "thumbnail" else (1, 1)
        cards = () if kind == "empty" else make_scene(rng, self.split, rows, columns)
        image = Image.fromarray(render(rng, cards, rows, columns)).resize((TILE, TILE), Image.Resampling.LANCZOS)
        on = {(card.row, card.column): card for card in cards}
        labels = torch.full((GRID, GRID, len(COLOURS) + len(FIGURES)), 1 / 8)
        places = torch.full((GRID, GRID, 2 * GRID), 1 / GRID)
        for row in range(GRID):
            for column in range(GRID):
                card = on.get(cell_tile(row, column, rows, columns))
                if card is not None:
                    labels[row, column, : len(COLOURS)] = torch.eye(len(COLOURS))[list(COLOURS).index(card.colour)]
                if kind == "card":
                    labels[row, column, len(COLOURS) :] = torch.eye(len(FIGURES))[FIGURES.index(card.figure)]
                if kind == "thumbnail":
                    places[row, column] = torch.cat([torch.eye(GRID)[row], torch.eye(GRID)[column]])
        labels = torch.cat([labels, places], dim=-1) if self.places else labels
        return {
            "pixel_values": torch.tensor(np.asarray(image)).permute(2, 0, 1) / 127.5 - 1,
            "labels": labels.flatten(0, 1),
            "together": kind != "thumbnail",
        }


def figures_named(prediction) -> float:
    """The share of figures that are named right, of a Trainer's prediction on `Tiles` with cards only."""
    figures = slice(len(COLOURS), len(COLOURS) + len(FIGURES))
    guessed, shown = (part[:, 0, figures].argmax(1) for part in (prediction.predictions, prediction.label_ids))
    return float((guessed == shown).mean())


def cell_tile(row: int, column: int, rows: int, columns: int) -> tuple[int, int]:
    """The tile of a canvas of `rows` x `columns` tiles that lies at the centre of a visual token of its thumbnail."""
    return (2 * row + 1) * rows // (2 * GRID), (2 * column + 1) * columns // (2 * GRID)
