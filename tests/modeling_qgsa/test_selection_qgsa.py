"""From scores to a selection, and from a selection to a shorter prompt."""

import torch
from handmade import END, FAKE, GLOBAL, IMAGE, NEWLINE, TILES, image_block, layout_of, prompts, read

from modeling_qgsa.selection_qgsa import keep_top_k, positions_to_keep, splice, top_k_per_image


def test_keep_top_k():
    scores = torch.tensor([[1.0, 3.0, 2.0, 9.0], [5.0, 5.0, 5.0, 5.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    candidates = torch.ones(4, 4, dtype=torch.bool)
    candidates[0, 3] = False
    keep = keep_top_k(scores, candidates, torch.tensor([2, 2, 9, 0]))
    assert keep.tolist() == [[False, True, True, False], [True, True, False, False], [True] * 4, [False] * 4]


def test_keep_top_k_breaks_ties_by_the_first_in_long_rows():
    keep = keep_top_k(torch.zeros(2, 1088), torch.ones(2, 1088, dtype=torch.bool), torch.tensor([5, 100]))
    assert keep[0].nonzero()[:, 0].tolist() == list(range(5))
    assert keep[1].nonzero()[:, 0].tolist() == list(range(100))


def test_keep_top_k_takes_no_candidate_that_is_none():
    keep = keep_top_k(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, False, False]]), torch.tensor([3]))
    assert keep.tolist() == [[True, False, False]]


def test_splice_pads_on_the_left():
    keep = torch.tensor([[True, False, True, True], [False, False, False, True], [False] * 4])
    ids = torch.arange(12).view(3, 4)
    (taken, features), indices = splice(keep, (ids, -7), (ids[..., None].float() * torch.ones(2), 0.5))
    assert taken.tolist() == [[0, 2, 3], [-7, -7, 7], [-7, -7, -7]]
    assert indices.tolist() == [[0, 2, 3], [-1, -1, 3], [-1, -1, -1]]
    assert features.shape == (3, 3, 2) and features[1, :, 0].tolist() == [0.5, 0.5, 7.0]


def test_splice_carries_gradients():
    embeds = torch.randn(1, 3, 2, requires_grad=True)
    (taken,), _ = splice(torch.tensor([[True, False, True]]), (embeds, 0.0))
    taken.sum().backward()
    assert embeds.grad[0].tolist() == [[1, 1], [0, 0], [1, 1]]


def test_positions_to_keep_takes_the_markers_with_the_last_token():
    ids = prompts([1] + image_block(1, 2, 4) + [8, END])
    layout = read(ids)
    kept = torch.zeros(3, 4, dtype=torch.bool)
    kept[1, 2] = True
    keep = positions_to_keep(torch.ones_like(ids), layout, kept)
    assert ids[keep].tolist() == [1, FAKE, TILES[1], IMAGE, NEWLINE, NEWLINE, FAKE, GLOBAL, FAKE, 8, END]
    attention_mask = torch.ones_like(ids)
    attention_mask[0, 0] = 0
    assert not positions_to_keep(attention_mask, layout, kept)[0, 0]


def test_top_k_per_image_ranks_the_tokens_of_an_image_together():
    layout = layout_of((1, 2), (0, 0), tokens=4)
    scores = torch.tensor([[1.0, 9, 2, 3], [8, 0, 0, 0], [7, 6, 0, 0], [1, 2, 3, 4]])
    candidates = torch.ones_like(scores, dtype=torch.bool)
    candidates[0, 1] = False
    keep = top_k_per_image(scores, candidates, layout, torch.tensor([3, 2]))
    assert keep.nonzero().tolist() == [[1, 0], [2, 0], [2, 1], [3, 2], [3, 3]]


def test_top_k_per_image_ranks_tiles_too():
    layout = layout_of((1, 2), (0, 0), tokens=4)
    keep = top_k_per_image(torch.tensor([1.0, 2, 9, 5]), ~layout.is_global, layout, torch.tensor([1, 1]))
    assert keep.tolist() == [False, True, False, False]
