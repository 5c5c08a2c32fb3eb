import numpy as np
import pytest
import torch

from modeling_qgsa.prompt_qgsa import find_question
from modeling_qgsa.selection_qgsa import (
    complexity_at,
    gated_attention_mask,
    gates_of_positions,
    keep_top_k,
    positions_to_keep,
    read_layout,
    relaxed_top_k,
    scores_of_tiles,
    splice,
    tile_relevance,
    to_images,
    token_cells,
)
from modeling_qgsa.selector_qgsa import ComplexityEstimator, QuestionGuidedSelector


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
    return read_layout(ids, tokens, IMAGE, GLOBAL, TILES)


def layout_of(*grids, tokens=16):
    """Layout of one sample with an image of each grid."""
    return read(prompts([1, *sum((image_block(*grid, tokens) for grid in grids), []), 2]), tokens)


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
        ([1, FAKE, GLOBAL] + [IMAGE] * 5 + [FAKE, 8], "5 image placeholders, which is no multiple of the 4 of a tile"),
        ([1, FAKE, GLOBAL, IMAGE, IMAGE, 8, IMAGE, IMAGE, FAKE], "the tile at position 3 is no run of 4"),
        ([IMAGE] * 4 + [FAKE, 8], "the tile at position 0 is no run of 4"),
        ([1, FAKE, 77] + [IMAGE] * 4 + [FAKE, 8], "token 77 before the tile at position 3"),
        ([1, FAKE, TILES[0]] + [IMAGE] * 4 + [NEWLINE, 8], "its last image has no global view"),
        ([1] + image_block(1, 1, 4)[:7] + image_block(1, 1, 4), "image 0 has 2 tiles where its grid of 1 x 1 needs 1"),
        ([1] + image_block(1, 2, 4)[6:], "image 0 has 1 tiles where its grid of 1 x 2 needs 2"),
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
    assert torch.equal(rows[layout.tile_image, layout.tile_slot], torch.arange(1.0, 5.0))


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


def test_relaxed_top_k_approaches_the_hard_one():
    scores = torch.randn(50, 12)
    candidates = torch.rand(50, 12) < 0.8
    k = torch.arange(50) % 7 + 1
    hard = keep_top_k(scores, candidates, k)
    gates = relaxed_top_k(scores, candidates, k, temperature=1e-5, noise=False).exp()
    assert torch.allclose(gates[candidates], hard[candidates].float(), atol=1e-2)


def test_relaxed_top_k_at_the_ends():
    scores, candidates = torch.randn(3, 6), torch.ones(3, 6, dtype=torch.bool)
    candidates[:, 5] = False
    gates = relaxed_top_k(scores, candidates, torch.tensor([1, 5, 50]), temperature=0.1)
    assert (gates <= 0).all() and (gates[0, :5] < 0).all()
    assert (gates[1:] == 0).all(), "a budget for all of them opens all gates"
    assert (gates[:, 5] == 0).all(), "what is no candidate is not gated"


def test_relaxed_top_k_draws_in_proportion_to_the_scores():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    scores = probabilities.log().expand(4000, 4)
    candidates = torch.ones_like(scores, dtype=torch.bool)
    gates = relaxed_top_k(scores, candidates, torch.ones(4000, dtype=torch.long), temperature=1e-4).exp()
    assert torch.allclose(gates.mean(0), probabilities, atol=0.03)


def test_relaxed_top_k_has_a_gradient_that_a_shift_of_all_scores_does_not_change():
    scores = torch.randn(2, 8, requires_grad=True)
    gates = relaxed_top_k(scores, torch.ones(2, 8, dtype=torch.bool), torch.tensor([3, 8]), temperature=1.0)
    gates.sum().backward()
    assert scores.grad[0].abs().max() > 0.1
    assert scores.grad[0].sum().abs() < 1e-5
    assert (scores.grad[1] == 0).all()


def test_gates_of_positions_shut_the_markers_with_their_tile():
    one_by_two = [1, 7] + image_block(1, 2, 4) + [8, 9, END, 5]
    layout = read(prompts(one_by_two))
    gates = -torch.arange(1.0, 13.0).view(3, 4)
    found = gates_of_positions(gates, layout)
    expected = torch.zeros(1, len(one_by_two))
    for tile in range(3):
        start = int(layout.tile_start[tile])
        expected[0, start : start + 4] = gates[tile]
    markers = (layout.tile_of_position[0] >= 0) & (expected[0] == 0)
    for position in markers.nonzero()[:, 0].tolist():
        tile = int(layout.tile_of_position[0, position])
        expected[0, position] = (-1.0, -5.0, 0.0)[tile]
    assert markers.sum() >= 6
    assert torch.equal(found, expected)


def test_gated_attention_mask_weighs_the_keys_by_their_gates():
    gates = torch.rand(2, 6).clamp(min=0.05)
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    mask = gated_attention_mask(attention_mask, gates.log())
    assert mask.shape == (2, 1, 6, 6)
    scores = torch.randn(2, 1, 6, 6)
    weights = (scores + mask).softmax(-1)
    seen = torch.ones(6, 6).tril() * attention_mask[:, None, None, :]
    expected = scores.exp() * gates[:, None, None, :] * seen
    expected = expected / expected.sum(-1, keepdim=True)
    real = attention_mask.bool()[:, None, :]
    assert torch.allclose(weights[real], expected[real], atol=1e-6)
    assert weights.isfinite().all()


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


def test_find_question_takes_the_last_closed_turn():
    ids = prompts([1, 20, 21, END, 5, 30, END, 40, 41, END, 6], [1, 50, END, 6], [1, 60, 61])
    question = find_question(ids, ids != PAD, END)
    assert [ids[row][question[row]].tolist() for row in range(3)] == [[40, 41], [1, 50], [1, 60, 61]]


def test_find_question_reads_nothing_that_is_hidden():
    ids = prompts([1, 20, 21, 22, END, 6, 30, 31, END])
    readable = torch.tensor([[True, False, True, True, True, True, False, False, False]])
    question = find_question(ids, readable, END)
    assert ids[question].tolist() == [1, 21, 22]


def test_scores_of_tiles():
    layout = read(prompts([1] + image_block(1, 1, 4), [1] + image_block(0, 0, 4)))
    scores = torch.arange(16.0).view(2, 8)
    assert scores_of_tiles(scores, layout).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    transposed = scores.t().contiguous().t()
    assert torch.equal(scores_of_tiles(transposed, layout), scores_of_tiles(scores, layout))
    with pytest.raises(ValueError, match=r"shape \(2, 7\): the prompts hold 2 samples of at most 8 visual tokens"):
        scores_of_tiles(scores[:, :7], layout)
    with pytest.raises(ValueError, match=r"shape \(8,\)"):
        scores_of_tiles(scores[0], layout)


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


@pytest.fixture
def fresh_selector():
    return QuestionGuidedSelector(24, 16, hidden_size=16, layers=2, heads=2, max_question_tokens=5)


@pytest.fixture
def selector(fresh_selector):
    """One that has learnt places."""
    with torch.no_grad():
        fresh_selector.cell_position.normal_()
        fresh_selector.word_position.normal_()
    return fresh_selector


def test_selector_gives_log_probabilities(selector):
    relevance, question = selector(torch.randn(3, 4, 24), torch.ones(3, 4).bool(), torch.randn(3, 16, 24))
    assert relevance.shape == (3, 16) and question.shape == (3, 24)
    assert torch.allclose(relevance.exp().sum(1), torch.ones(3))


def test_selector_does_not_see_where_the_question_is_padded(selector):
    words, glance = torch.randn(1, 3, 24), torch.randn(1, 16, 24)
    expected = selector(words, torch.ones(1, 3).bool(), glance)
    noise = torch.randn(1, 2, 24)
    for padded, mask in (
        (torch.cat([noise, words], 1), [0, 0, 1, 1, 1]),
        (torch.cat([words, noise], 1), [1, 1, 1, 0, 0]),
        (torch.cat([words[:, :1], noise, words[:, 1:]], 1), [1, 0, 0, 1, 1]),
    ):
        got = selector(padded, torch.tensor([mask]).bool(), glance)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected))
    mixed = torch.cat([torch.cat([noise, words], 1), torch.randn(1, 5, 24)])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    got = selector(mixed, mask, glance.expand(2, -1, -1))
    assert all(torch.allclose(a[:1], b, atol=1e-6) for a, b in zip(got, expected))


def test_selector_reads_the_last_words_of_a_long_question_in_their_order(selector):
    words, glance = torch.randn(1, 9, 24), torch.randn(1, 16, 24)
    everything = torch.ones(1, 9).bool()
    relevance, _ = selector(words, everything, glance)
    changed = words.clone()
    changed[:, :4] += 1
    assert torch.equal(selector(changed, everything, glance)[0], relevance)
    changed[:, 4] += torch.randn(24)
    assert not torch.allclose(selector(changed, everything, glance)[0], relevance)
    assert not torch.allclose(selector(words.flip(1)[:, :5], everything[:, :5], glance)[0], relevance)


def test_selector_scores_glance_and_tiles_by_keys_of_their_own(selector):
    features, state = torch.randn(2, 16, 24), torch.randn(2, 24)
    is_global = torch.tensor([False, True])
    before = selector.match_tokens(state, features, is_global)
    with torch.no_grad():
        selector.tile_key.weight.mul_(-2)
    after = selector.match_tokens(state, features, is_global)
    assert not torch.allclose(before[0], after[0]) and torch.equal(before[1], after[1])


def test_a_fresh_selector_matches_words_with_the_tokens_that_are_like_them(fresh_selector):
    word, features = torch.randn(2, 24), torch.randn(2, 16, 24)
    features[[0, 1], [5, 9]] = word
    match = fresh_selector.match_tokens(word, features, torch.tensor([False, True]))
    assert match.dtype == torch.float32 and match.argmax(1).tolist() == [5, 9]


def test_a_fresh_selector_knows_no_places(fresh_selector):
    selector = fresh_selector
    words, mask, glance = torch.randn(1, 4, 24), torch.ones(1, 4).bool(), torch.randn(1, 16, 24)
    order = torch.randperm(16)
    relevance, _ = selector(words, mask, glance)
    assert torch.allclose(selector(words, mask, glance[:, order])[0], relevance[:, order], atol=1e-5)
    with torch.no_grad():
        selector.cell_position.normal_()
    assert not torch.allclose(selector(words, mask, glance[:, order])[0], selector(words, mask, glance)[0][:, order])


def test_estimator_reads_the_question_and_the_glance_and_no_padding():
    estimator = ComplexityEstimator(24, 16, levels=5)
    words, glance, mask = torch.randn(3, 6, 24), torch.randn(3, 16, 24), torch.rand(3, 6) < 0.7
    mask[:, 0] = True
    logits = estimator(words, mask, glance)
    assert logits.shape == (3, 5) and logits.dtype == torch.float32
    assert torch.equal(estimator(words.masked_fill(~mask[..., None], 7.0), mask, glance), logits)
    assert not torch.allclose(estimator(words.masked_fill(mask[..., None], 7.0), mask, glance), logits)
    assert not torch.allclose(estimator(words, mask, glance.flip(0)), logits)


def test_complexity_is_the_lowest_that_suffices_as_often_as_asked():
    logits = torch.tensor([[0.5, 0.25, 0.0, 0.2, 0.05], [0.0, 0.0, 1.0, 0.0, 0.0]]).log()
    for quantile, expected in ((0.4, 0), (0.6, 0.25), (0.8, 0.75), (0.94, 0.75), (0.97, 1.0)):
        assert complexity_at(logits, quantile).tolist() == [expected, 0.5]
    sure = complexity_at(torch.randn(50, 9), 1.0)
    assert (sure == 1).all(), "rounding of the sum is no way past the highest level"
