"""Prompts and layouts made by hand."""

import torch

from modeling_qgsa.layout_qgsa import VisualLayout
from modeling_qgsa.processing_qgsa import MarkerIds


IMAGE, GLOBAL, FAKE, END, NEWLINE, PAD = 100, 101, 102, 103, 10, 0


TILES = list(range(200, 236))


def image_block(rows, columns, tokens):
    """The prompt of one image, as the processor writes it."""
    ids = []
    for row in range(rows):
        for column in range(columns):
            ids += [FAKE, TILES[6 * row + column]] + [IMAGE] * tokens
        ids += [NEWLINE]
    return ids + [NEWLINE] * bool(rows) + [FAKE, GLOBAL] + [IMAGE] * tokens + [FAKE]


def prompts(*rows):
    length = max(map(len, rows))
    return torch.tensor([[PAD] * (length - len(row)) + row for row in rows])


def read(ids, tokens=4):
    return VisualLayout.of(MarkerIds(tokens, IMAGE, GLOBAL, TILES), ids)


def layout_of(*grids, tokens=16):
    """Layout of one sample with an image of each grid."""
    return read(prompts([1, *sum((image_block(*grid, tokens) for grid in grids), []), 2]), tokens)
