"""The losses of selection: worked by hand, and where their minimum lies."""

import pytest
import torch

from modeling_qgsa.layout_qgsa import VisualLayout
from modeling_qgsa.pointer_qgsa import complexity_at
from training.learning.losses import attention_loss, budget_loss, contrastive_loss, utility_loss


INF = float("inf")


def make_layout(*tiles):
    """The layout of one image per sample; `tiles` says how many high-resolution tiles each has, in one row."""
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


# Contrast


def test_contrastive_loss_by_hand():
    # Two images, two cells each. Question 0 looks along x and selects x; question 1 along y and selects the mean.
    query = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    relevance = torch.tensor([[1.0, 1e-30], [0.5, 0.5]]).log()
    loss = contrastive_loss(query, keys, relevance, torch.eye(2, dtype=torch.bool), temperature=0.5)
    half = 0.5**0.5
    first = torch.tensor([1.0, half, 0.0]) / 0.5  # its own, that of the other image, its own dropped
    second = torch.tensor([0.0, half, half]) / 0.5
    expected = -(first.log_softmax(0)[0] + second.log_softmax(0)[1]) / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_images_asked_the_same_are_no_negatives():
    query, keys = torch.randn(1, 8).expand(3, 8), torch.randn(3, 5, 8)
    relevance = torch.randn(3, 5).log_softmax(1)
    together = contrastive_loss(query, keys, relevance, torch.ones(3, 3, dtype=torch.bool))
    one = torch.ones(1, 1, dtype=torch.bool)
    alone = [contrastive_loss(query[:1], keys[[i]], relevance[[i]], one) for i in range(3)]
    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)


def test_contrast_teaches_relevance_and_keys_by_their_finite_differences():
    query, keys = (torch.randn(size, dtype=torch.float64) for size in ((3, 8), (3, 5, 8)))
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    same = torch.eye(3, dtype=torch.bool)

    def loss(logits):
        return contrastive_loss(query, keys, logits.log_softmax(1), same)

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    step = torch.zeros_like(logits)
    step[1, 2] = 1e-2
    with torch.no_grad():
        difference = (loss(logits + step) - loss(logits - step)) / 2e-2
    assert gradient[1, 2].item() == pytest.approx(difference.item(), rel=2e-2, abs=1e-5)
    assert gradient.abs().max() > 1e-4


# How much


def test_budget_loss_by_hand():
    # Level 1 of 0, 1, 2 with near certainty: complexity 0.5, 10 + 0.5 * 20 = 20 tokens against 16, a quarter too many.
    logits = torch.tensor([[0.0, 50.0, 0.0]])
    assert budget_loss(logits, 0.9, 10, 30, target=16).item() == pytest.approx(0.25, abs=1e-6)
    assert budget_loss(logits, 0.9, 10, 30, target=20).item() == pytest.approx(0, abs=1e-6)


def test_only_the_mean_is_held():
    logits = torch.tensor([[50.0, 0.0, 0.0], [0.0, 0.0, 50.0]])
    assert budget_loss(logits, 0.9, 10, 30, target=20).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("target", [14.0, 40.0])
def test_an_estimator_taught_the_budget_alone_comes_to_hold_it(target):
    inputs = torch.cat([torch.randn(64, 7), torch.ones(64, 1)], dim=1)
    weights = torch.zeros(8, 9, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        budget_loss(inputs @ weights, 0.95, 8, 60, target).backward()
        optimizer.step()
    tokens = 8 + 52 * complexity_at((inputs @ weights).detach(), 0.95)
    assert tokens.mean().item() == pytest.approx(target, rel=0.1)
