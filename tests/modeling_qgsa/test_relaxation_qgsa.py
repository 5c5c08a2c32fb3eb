"""The relaxed selection of training."""

import torch
from handmade import END, image_block, prompts, read

from modeling_qgsa.relaxation_qgsa import gated_attention_mask, gates_of_positions, relaxed_top_k
from modeling_qgsa.selection_qgsa import keep_top_k


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
    assert (gates[:, 5] == 0).all(), "only candidates are gated"


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


def test_markers_that_stay_are_open():
    layout = read(prompts([1, 7] + image_block(1, 2, 4) + [8, 9, END, 5]))
    gates = -torch.rand(3, 4) - 1
    shut, left_open = (gates_of_positions(gates, layout, stay) for stay in (False, True))
    markers = layout.tile_of_position >= 0
    markers[0, layout.token_positions] = False
    assert (shut[markers] < 0).any() and (left_open[markers] == 0).all()
    assert torch.equal(shut[~markers], left_open[~markers])


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
