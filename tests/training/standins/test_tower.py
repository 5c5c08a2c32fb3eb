"""The vision towers of the stand-ins, and the tiles and thumbnails that they learn from."""

import numpy as np
import pytest
import torch

from training.data.cards import COLOURS, FIGURES, make_scene
from training.standins.tower import FreeTower, Tiles, WordTower, cell_tile


def test_tiles_say_what_is_on_them():
    tiles = Tiles("train", 50, seed=0, kinds=(1, 0, 0))
    for index in range(50):
        tile = tiles[index]
        assert tile["pixel_values"].shape == (3, 64, 64)
        assert tile["pixel_values"].dtype == tile["labels"].dtype == torch.float32
        assert tile["pixel_values"].min() >= -1 and tile["pixel_values"].max() <= 1
        rng = np.random.default_rng((0, 0, index))
        rng.choice(3, p=(1, 0, 0))
        (card,) = make_scene(rng, "train", 1, 1)
        expected = [name in (card.colour, card.figure) for name in (*COLOURS, *FIGURES)]
        assert tile["labels"].tolist() == [expected] * 16
        assert tile["together"]
    assert torch.equal(tiles[3]["pixel_values"], Tiles("train", 50, 0, (1, 0, 0))[3]["pixel_values"])
    assert not torch.equal(tiles[3]["pixel_values"], Tiles("validation", 50, 0, (1, 0, 0))[3]["pixel_values"])


def test_empty_tiles_have_nothing_to_name():
    empty = Tiles("train", 5, seed=0, kinds=(0, 1, 0))[0]
    assert torch.equal(empty["labels"], torch.full((16, 16), 1 / 8))
    assert empty["together"]


def test_thumbnails_name_the_colour_of_each_place_and_no_figure():
    nothing = [1 / 8] * 8
    for index in range(20):
        thumbnail = Tiles("train", 20, seed=0, kinds=(0, 0, 1))[index]
        assert not thumbnail["together"]
        rng = np.random.default_rng((0, 0, index))
        rng.choice(3, p=(0, 0, 1))
        colours = {(card.row, card.column): card.colour for card in make_scene(rng, "train", 4, 4)}
        for cell, labels in enumerate(thumbnail["labels"].tolist()):
            colour = colours.get(divmod(cell, 4))
            assert labels[:8] == ([name == colour for name in COLOURS] if colour else nothing)
            assert labels[8:] == nothing


@pytest.mark.parametrize("together", [True, False])
def test_the_tower_is_right_where_its_tokens_are_the_words(together, make_dense, monkeypatch):
    model = make_dense("idefics3")
    words = list(range(10, 26))
    tower, names = WordTower(model, words), model.get_input_embeddings().weight.detach()[words]
    shown = (names[2] + names[8 + 5]).expand(1, 16, -1).clone()
    shown[0, 7] = names[4] + names[8 + 1]
    monkeypatch.setattr(tower.connector, "forward", lambda hidden: shown)
    labels = torch.zeros(1, 16, 16)
    labels[..., [2, 8 + 5]] = 1
    pixels, flag = torch.zeros(1, 3, 64, 64), torch.tensor([together])
    right = tower(pixels, flag, labels)
    named = right["logits"][0, :, :8].argmax(1), right["logits"][0, :, 8:].argmax(1)
    odd = torch.arange(16) == 7
    assert torch.equal(named[0], torch.where(odd & (not together), 4, 2))
    assert torch.equal(named[1], torch.where(odd & (not together), 1, 5))
    assert right["loss"] < tower(pixels, flag, labels.roll(1, dims=-1))["loss"]
    assert not tower.names.requires_grad


def test_tokens_are_made_as_long_as_words(make_dense):
    model = make_dense("idefics3")
    tower, pixels = WordTower(model, list(range(10, 26))).requires_grad_(False), torch.randn(3, 3, 64, 64)
    before = tower.tokens(pixels)
    tower.rescale(pixels)
    after = tower.tokens(pixels)
    words = model.get_input_embeddings().weight.detach()[10:26].norm(dim=1).mean()
    assert float(after.norm(dim=-1).mean()) == pytest.approx(float(words) * 2**0.5, rel=1e-4)
    torch.testing.assert_close(
        torch.nn.functional.normalize(after, dim=-1), torch.nn.functional.normalize(before, dim=-1)
    )


# The tower with a free classifier


def test_a_visual_token_of_a_thumbnail_shows_the_tile_at_its_centre():
    assert [[cell_tile(row, 0, rows, 4)[0] for row in range(4)] for rows in (1, 2, 3, 4)] == [
        [0, 0, 0, 0],
        [0, 0, 1, 1],
        [0, 1, 1, 2],
        [0, 1, 2, 3],
    ]
    assert [cell_tile(0, column, 4, 3)[1] for column in range(4)] == [0, 1, 1, 2]


@pytest.mark.parametrize("canvas", [(2, 4), (4, 3), (4, 4)])
def test_thumbnails_name_places_and_the_colours_of_every_canvas(canvas):
    tiles = Tiles("train", 10, seed=0, kinds=(0, 0, 1), canvases=[canvas], places=True)
    for index in range(10):
        thumbnail = tiles[index]
        assert thumbnail["pixel_values"].shape == (3, 64, 64) and thumbnail["labels"].shape == (16, 24)
        rng = np.random.default_rng((0, 0, index))
        rng.choice(3, p=(0, 0, 1))
        on = {(card.row, card.column): card.colour for card in make_scene(rng, "train", *canvas)}
        for cell, labels in enumerate(thumbnail["labels"].tolist()):
            row, column = divmod(cell, 4)
            colour = on.get(cell_tile(row, column, *canvas))
            assert labels[:8] == ([name == colour for name in COLOURS] if colour else [1 / 8] * 8)
            assert labels[16:20] == [each == row for each in range(4)]
            assert labels[20:] == [each == column for each in range(4)]


def test_tiles_have_no_place_to_name():
    for kinds in ((1, 0, 0), (0, 1, 0)):
        labels = Tiles("train", 5, seed=0, kinds=kinds, places=True)[0]["labels"]
        assert torch.equal(labels[:, 16:], torch.full((16, 8), 1 / 4))
        assert torch.equal(labels[:, :16], Tiles("train", 5, seed=0, kinds=kinds)[0]["labels"])


def test_the_free_classifier_learns_without_the_language_model(make_dense):
    model = make_dense("idefics3")
    tiles = [Tiles("train", 8, seed=0, kinds=(0.5, 0, 0.5), places=True)[index] for index in range(8)]
    pixels, labels = (torch.stack([tile[name] for tile in tiles]) for name in ("pixel_values", "labels"))
    together = torch.tensor([tile["together"] for tile in tiles])
    tower = FreeTower(model)
    losses, optimizer = [], torch.optim.Adam(tower.parameters(), 1e-2)
    for _ in range(15):
        out = tower(pixels, together, labels)
        losses.append(out["loss"].item())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert out["logits"].shape == (8, 16, 24)
    assert losses[-1] < 0.8 * losses[0]
    assert all(weight.grad is None for weight in model.model.text_model.parameters())
    assert all(weight.grad is None for weight in model.model.connector.parameters())
