"""The losses of selection: worked by hand, and where their minimum lies."""

import pytest
import torch

from modeling_qgsa.selection_qgsa import VisualLayout
from training.losses import attention_loss, utility_loss


INF = float("inf")


def make_layout(*tiles):
    """The layout of one image a sample; `tiles` says how many high-resolution tiles each has, in one row."""
    numbers = [(image, column) for image, count in enumerate(tiles) for column in (*range(count), -1)]
    image, column = torch.tensor(numbers).T
    slot = torch.tensor([slot for count in tiles for slot in range(count + 1)])
    return VisualLayout(
        tile_sample=image.contiguous(),
        tile_image=image.contiguous(),
        tile_ordinal=slot,
        tile_row=torch.where(column < 0, -1, 0),
        tile_column=column,
        tile_start=2 + 3 * slot,
        tile_of_position=torch.zeros(len(tiles), 1, dtype=torch.long),
        grids=torch.tensor([[int(count > 0), count] for count in tiles]),
        tokens_per_tile=1,
    )


# Where


def test_utility_loss_by_hand():
    # Utilities 0 and log 3 at temperature 1 are a teacher of 1/4 and 3/4; the selector has 1/2 and 1/8 there.
    mass = torch.tensor([0.5, 0.125, 0.0])
    utility = torch.tensor([1.0, 3.0, 0.0]).log()
    loss = utility_loss(mass, utility, make_layout(2), temperature=1.0)
    half = torch.tensor(2.0).log()
    assert loss.item() == pytest.approx((0.25 * half + 0.75 * 3 * half).item())


def test_utility_loss_by_hand_at_another_temperature():
    # log 3 at temperature 1/2 is log 9: 1/10 and 9/10.
    mass = torch.tensor([0.5, 0.5, 0.0])
    utility = torch.tensor([-2.0, -2.0 + torch.tensor(3.0).log(), -INF])
    even = utility_loss(mass, utility, make_layout(2), temperature=0.5)
    assert even.item() == pytest.approx(torch.tensor(2.0).log().item())
    tilted = utility_loss(torch.tensor([0.25, 0.75, 0.0]), utility, make_layout(2), temperature=0.5)
    expected = -(0.1 * torch.tensor(0.25).log() + 0.9 * torch.tensor(0.75).log())
    assert tilted.item() == pytest.approx(expected.item(), rel=1e-5)


def test_utility_loss_is_least_at_the_teacher():
    layout = make_layout(3, 4)
    utility = torch.tensor([-1.0, -0.5, -3.0, -INF, -2.0, -1.0, -1.5, -0.1, -INF])
    teacher = torch.cat([(row / 0.5).softmax(0) for row in utility.split([4, 5])])
    least = utility_loss(teacher, utility, layout, 0.5)
    for _ in range(50):
        other = torch.cat([(row.log() + 0.5 * torch.randn(len(row))).softmax(0) for row in teacher.split([4, 5])])
        assert utility_loss(other, utility, layout, 0.5) > least
    entropy = -(teacher * teacher.clamp(min=1e-30).log()).sum() / 2
    assert least.item() == pytest.approx(entropy.item(), rel=1e-5)


def test_gradient_descent_finds_the_teacher():
    layout = make_layout(3)
    utility = torch.tensor([-1.0, -0.2, -0.6, -INF])
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(400):
        mass = torch.cat([logits.softmax(0), torch.zeros(1)])
        optimizer.zero_grad()
        utility_loss(mass, utility, layout, 0.5).backward()
        optimizer.step()
    assert torch.allclose(logits.detach().softmax(0), (utility[:3] / 0.5).softmax(0), atol=1e-3)


def test_images_of_a_single_tile_count_nothing():
    utility = torch.tensor([-1.0, -0.5, -INF])
    mass = torch.tensor([0.3, 0.6, 0.0])
    alone = utility_loss(mass, utility, make_layout(2), 0.5)
    beside = utility_loss(
        torch.cat([torch.zeros(1), mass, torch.zeros(1)]),
        torch.cat([torch.tensor([-INF]), utility, torch.tensor([-INF])]),
        make_layout(0, 2, 0),
        0.5,
    )
    assert torch.equal(alone, beside)


def test_a_batch_of_single_tiles_has_no_loss_but_a_gradient():
    mass = torch.zeros(2, requires_grad=True)
    loss = utility_loss(mass, torch.full((2,), -INF), make_layout(0, 0), 0.5)
    assert loss.item() == 0
    loss.backward()
    assert torch.isfinite(mass.grad).all()


def test_a_tile_without_any_mass_costs_much_and_stays_finite():
    loss = utility_loss(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, -40.0, -INF]), make_layout(2), 0.5)
    assert 50 < loss.item() < 100


def test_a_selector_that_is_sure_of_the_wrong_tile_still_learns():
    logits = torch.tensor([0.0, 20.0], requires_grad=True)
    mass = torch.cat([logits.softmax(0), torch.zeros(1)])
    utility_loss(mass, torch.tensor([0.0, -40.0, -INF]), make_layout(2), 0.5).backward()
    assert logits.grad.tolist() == pytest.approx([-1, 1])


# Which tokens


def test_attention_loss_by_hand():
    # Attention 1 and 3 is a teacher of 1/4 and 3/4; equal matches are 1/3 each, for glance and tiles alike.
    layout = make_layout(2)
    loss = attention_loss(torch.zeros(3, 1), torch.tensor([[1.0], [3.0], [0.0]]), layout)
    assert loss.item() == pytest.approx(torch.tensor(3.0).log().item())
    match = torch.tensor([0.25, 0.5, 0.25]).log()[:, None]
    expected = -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.5).log())
    loss = attention_loss(match + 5, torch.tensor([[1.0], [3.0], [0.0]]), layout)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_attention_loss_leaves_out_images_that_were_not_asked_about():
    match, attention = torch.randn(5, 1), torch.tensor([[1.0], [2.0], [1.0], [0.0], [0.0]])
    alone = attention_loss(match[:3], attention[:3], make_layout(2))
    assert attention_loss(match, attention, make_layout(2, 1)).item() == pytest.approx(alone.item())


def test_a_batch_without_attention_has_no_loss_but_a_gradient():
    match = torch.randn(3, 1, requires_grad=True)
    attention_loss(match, torch.zeros(3, 1), make_layout(2)).backward()
    assert torch.isfinite(match.grad).all()


def test_gradient_descent_finds_the_attention():
    layout, attention = make_layout(3), torch.tensor([[1.0], [5.0], [0.5], [3.5]])
    match = torch.zeros(4, 1, requires_grad=True)
    optimizer = torch.optim.Adam([match], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        attention_loss(match, attention, layout).backward()
        optimizer.step()
    assert torch.allclose(match.detach().softmax(0), attention / 10, atol=1e-3)
