"""The layout read from a prompt, and the geometry between tiles, images and cells."""

import numpy as np
import pytest
import torch
from handmade import END, FAKE, GLOBAL, IMAGE, NEWLINE, TILES, image_block, layout_of, prompts, read

from modeling_qgsa.layout_qgsa import tile_relevance, to_images, to_samples, to_tiles, token_cells, token_relevance


def test_layout_of_a_handmade_prompt():
    one_by_two = [1, 7] + image_block(1, 2, 4) + [8, 9, END, 5]
    text_only = [1, 8, 9, END, 5]
    two_images = [1] + image_block(0, 0, 4) + [6] + image_block(2, 1, 4) + [8, END]
    ids = prompts(one_by_two, text_only, two_images)
    layout = read(ids)

    assert layout.tile_sample.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert layout.tile_image.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert layout.tile_ordinal.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert layout.tile_slot.tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert layout.tile_row.tolist() == [0, 0, -1, -1, 0, 1, -1]
    assert layout.tile_column.tolist() == [0, 1, -1, -1, 0, 0, -1]
    assert layout.is_global.tolist() == [False, False, True, True, False, False, True]
    assert layout.grids.tolist() == [[1, 2], [0, 0], [2, 1]]
    assert layout.image_sample.tolist() == [0, 2, 2]
    assert (ids[layout.tile_sample[:, None], layout.token_positions] == IMAGE).all()
    assert layout.token_positions.shape == (7, 4)

    where = layout.tile_of_position
    pad = ids.shape[1] - len(one_by_two)
    # text, two tiles of 2 + 4 (with the two line breaks after the second), the global view of 2 + 4 + 1, text
    assert where[0, pad:].tolist() == [-1] * 2 + [0] * 6 + [1] * 8 + [2] * 7 + [-1] * 4
    assert (where[1] == -1).all()
    assert ((where >= 0) == torch.isin(ids, torch.tensor([IMAGE, GLOBAL, FAKE, NEWLINE, *TILES]))).all()


def test_layout_of_text_only_is_empty():
    layout = read(prompts([1, 8, 9, END], [1, END]))
    assert len(layout.tile_sample) == 0 and layout.grids.shape == (0, 2)
    assert layout.token_positions.shape == (0, 4) and (layout.tile_of_position == -1).all()


@pytest.mark.parametrize(
    "ids, message",
    [
        (
            [1, FAKE, GLOBAL] + [IMAGE] * 5 + [FAKE, 8],
            r"image placeholders \(5\) must be a multiple of the number of visual tokens per tile \(4\)",
        ),
        (
            [1, FAKE, GLOBAL, IMAGE, IMAGE, 8, IMAGE, IMAGE, FAKE],
            "expected 4 consecutive image placeholders after the two tile markers at position 3",
        ),
        (
            [IMAGE] * 4 + [FAKE, 8],
            "expected 4 consecutive image placeholders after the two tile markers at position 0",
        ),
        ([1, FAKE, 77] + [IMAGE] * 4 + [FAKE, 8], "token 77 before the tile at position 3"),
        ([1, FAKE, TILES[0]] + [IMAGE] * 4 + [NEWLINE, 8], "the last image has no global view"),
        ([1] + image_block(1, 1, 4)[:7] + image_block(1, 1, 4), "image 0 has 2 tiles, but its grid of 1 x 1 needs 1"),
        ([1] + image_block(1, 2, 4)[6:], "image 0 has 1 tiles, but its grid of 1 x 2 needs 2"),
    ],
)
def test_a_broken_layout_is_named(ids, message):
    with pytest.raises(ValueError, match=message):
        read(prompts(ids))


@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (1, 4), (6, 5), (3, 1)])
def test_tile_relevance_is_the_mass_of_the_map_on_the_tile(grid):
    rows, columns = grid
    relevance = torch.rand(1, 16).softmax(-1)
    mass = tile_relevance(relevance, layout_of(grid))
    fine = np.kron(relevance.view(4, 4), np.ones((rows * columns, rows * columns))) / (rows * columns) ** 2
    height, width = 4 * columns, 4 * rows
    expected = fine.reshape(rows, height, columns, width).sum((1, 3)).flatten()
    assert torch.allclose(mass[:-1], torch.tensor(expected, dtype=torch.float32), atol=1e-6)
    assert mass[-1] == 0 and torch.isclose(mass.sum(), torch.tensor(1.0))


def test_tile_relevance_on_the_identity_grid_is_the_map():
    relevance = torch.rand(1, 16).softmax(-1)
    assert torch.allclose(tile_relevance(relevance, layout_of((4, 4)))[:-1], relevance[0])


def test_tile_relevance_keeps_images_apart():
    relevance = torch.rand(3, 16).softmax(-1)
    mass = tile_relevance(relevance, layout_of((2, 2), (0, 0), (1, 3)))
    assert torch.allclose(mass[:4].sum(), torch.tensor(1.0)) and torch.allclose(mass[6:9].sum(), torch.tensor(1.0))
    assert mass[[4, 5, 9]].tolist() == [0, 0, 0]
    assert torch.allclose(mass[:4], relevance[0].view(2, 2, 2, 2).sum((1, 3)).flatten())


@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (5, 1)])
def test_token_cells_hold_the_centres_of_the_tokens(grid):
    rows, columns = grid
    cells = token_cells(layout_of(grid))
    for tile in range(rows * columns):
        for token in range(16):
            y = (tile // columns + (token // 4 + 0.5) / 4) / rows
            x = (tile % columns + (token % 4 + 0.5) / 4) / columns
            assert cells[tile, token] == int(y * 4) * 4 + int(x * 4)
    assert cells[-1].tolist() == list(range(16))


def test_to_images_pads_short_images():
    layout = layout_of((1, 2), (0, 0))
    rows = to_images(torch.arange(1.0, 5.0), layout, -1)
    assert rows.tolist() == [[1, 2, 3], [4, -1, -1]]
    assert torch.equal(to_tiles(rows, layout), torch.arange(1.0, 5.0))


def test_to_samples_follows_the_prompt_and_pads_short_samples():
    layout = read(prompts([1] + image_block(1, 1, 4), [1] + image_block(0, 0, 4)))
    values = torch.arange(12.0).view(3, 4)
    assert to_samples(values, layout).tolist() == [list(range(8)), [8, 9, 10, 11, 0, 0, 0, 0]]


def test_token_relevance_peaks_where_the_map_does():
    relevance = torch.full((1, 16), -5.0)
    relevance[0, 5] = 0.0  # row 1, column 1 of 4 x 4: the tile in the same place
    found = token_relevance(relevance, layout_of((4, 4)))
    assert int(found[:-1].amax(1).argmax()) == 5 and int(found[-1].argmax()) == 5
    assert torch.allclose(found[-1], relevance[0], atol=1e-6), "a token of the global view lies on its own cell"
