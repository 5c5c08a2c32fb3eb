"""Training of the small dense model: glimpses, places, its optimizer, and all of its steps in a few batches."""

import pytest
import torch
from standins import arguments

from training.cli.groups import StandInArguments
from training.data.cards import FIGURES, TILES_NEEDED
from training.standins.lessons import ALL_SHARES, LessonCollator, Lessons
from training.standins.muon import Muon, make_optimizer, orthogonalize
from training.standins.small import (
    COLOUR_NAMES,
    GlimpseCollator,
    GlimpseTrainer,
    reading_loss,
    train_small,
)


CANVASES = [(2, 4), (3, 4), (4, 4)]
NO = (-100, -100)  # an empty tile
ROW = [(0, 0), (0, 1), (0, 1), (0, 2)]  # the tiles that the first row of a thumbnail shows, of three columns


def batch_of(canvas, split=True, size=2):
    """The first batch of lessons that is (or is not) shown in tiles."""
    dataset = Lessons("train", 100 * size, 0, [canvas], size, questions=3, shares=ALL_SHARES)
    first = next(index for index in range(0, len(dataset), size) if dataset[index].split == split)
    return [dataset[first + number] for number in range(size)]


# Lessons


def test_lessons_ask_for_relations():
    assert set(ALL_SHARES) == set(TILES_NEEDED)
    assert sum(ALL_SHARES.values()) == pytest.approx(1)
    dataset = Lessons("train", 60, 0, [(3, 4)], 2, drawn=False, shares=ALL_SHARES)
    asked = " ".join(question.text for index in range(60) for question in dataset[index].questions)
    for words in ("left of", "above", "two cards share", "odd one out", "where is the card with"):
        assert words in asked


# Glimpses


@pytest.mark.parametrize("canvas", CANVASES)
def test_a_glimpse_is_a_whole_prompt_with_one_visual_token_per_tile(canvas, processor):
    lessons = batch_of(canvas)
    rows, columns = canvas
    whole = GlimpseCollator(processor, whole=True)(lessons)
    glimpse = GlimpseCollator(processor)(lessons)
    visual = glimpse["input_ids"] == processor.image_token_id
    assert visual.sum(1).tolist() == [rows * columns + 16] * 2
    assert whole["input_ids"].shape[1] - glimpse["input_ids"].shape[1] == 15 * rows * columns
    for row in range(2):
        kept = [whole["position_ids"][row].tolist().index(each) for each in glimpse["position_ids"][row].tolist()]
        text = [index for index, token in enumerate(glimpse["input_ids"][row].tolist()) if not visual[row, index]]
        assert [glimpse["input_ids"][row, index] for index in text if index < visual[row].nonzero().max()] == [
            whole["input_ids"][row, kept[index]] for index in text if index < visual[row].nonzero().max()
        ]
    assert torch.equal(glimpse["labels"][glimpse["labels"] != -100], whole["labels"][whole["labels"] != -100])
    length = glimpse["input_ids"].shape[1]
    assert glimpse["attention_mask"].shape == (2, 1, length, length)
    stock = LessonCollator(processor)(lessons)
    assert all(torch.equal(whole[name], stock[name]) for name in stock)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_visual_tokens_are_labelled_with_what_they_show(whole, split, processor):
    lessons = batch_of((2, 3), split)
    everything = GlimpseCollator(processor, whole)(lessons)["shown"]
    for lesson, shown in zip(lessons, everything.tolist()):
        on = {(card.row, card.column): card for card in lesson.cards}
        tiles, thumbnail = shown[:-16], shown[-16:]
        assert len(tiles) == (6 * (16 if whole else 1) if split else 0)
        for number, (colour, figure, row, column) in enumerate(tiles):
            assert (row, column) == divmod(number // 16 if whole else number, 3)
            card = on.get((row, column))
            assert (colour, figure) == ((COLOUR_NAMES.index(card.colour), FIGURES.index(card.figure)) if card else NO)
        assert [tuple(place) for *_, row, column in thumbnail[:4] for place in [(row, column)]] == ROW
        assert [row for _, _, row, _ in thumbnail[::4]] == [0, 0, 1, 1]
        for colour, figure, row, column in thumbnail:
            card = on.get((row, column))
            assert (colour, figure) == (COLOUR_NAMES.index(card.colour) if card else -100, -100)


@pytest.fixture
def trainer(make_dense, tmp_path):
    """A trainer of a model with two layers."""
    return GlimpseTrainer(make_dense("idefics3").eval(), arguments(tmp_path))


def test_the_whole_prompt_has_the_stock_answer_loss(trainer, processor, monkeypatch):
    """On all visual tokens, the loss without that of reading is the stock model's."""
    inputs = GlimpseCollator(processor, whole=True)(batch_of((2, 2)))
    monkeypatch.setattr("training.standins.small.reading_loss", lambda *args: 0.0)
    loss = trainer.compute_loss(trainer.model, inputs)
    stock = trainer.model(**{name: value for name, value in inputs.items() if name != "shown"}).loss
    torch.testing.assert_close(loss, stock)


def test_a_glimpse_averages_the_tokens_of_a_tile(trainer, processor, monkeypatch):
    lessons, seen, model = batch_of((2, 2)), [], trainer.model
    tokens = torch.randn(10, 16, 32)
    monkeypatch.setattr("training.standins.small.visual_tokens", lambda *args: tokens)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kwargs: seen.append(kwargs["inputs_embeds"]) or forward(**kwargs))
    for whole in (False, True):
        inputs = GlimpseCollator(processor, whole)(lessons)
        ids = inputs["input_ids"]
        trainer.compute_loss(model, dict(inputs))
        visual = seen.pop()[ids == processor.image_token_id].view(2, -1, 32)
        tiles, thumbnail = tokens.view(2, 5, 16, 32).split([4, 1], dim=1)
        torch.testing.assert_close(visual[:, :-16], tiles.flatten(1, 2) if whole else tiles.mean(2))
        torch.testing.assert_close(visual[:, -16:], thumbnail[:, 0])


def test_what_is_shown_is_read_from_hidden_states():
    torch.manual_seed(0)
    shown = torch.tensor([[[3, 1, 0, 1], [-100, -100, 3, 2], [7, -100, 2, 2]]]).expand(2, -1, -1)
    hidden = torch.randn(2, 3, 64, requires_grad=True)
    optimizer = torch.optim.Adam([hidden], 0.1)
    losses = []
    for _ in range(200):
        losses.append(reading_loss(hidden, shown))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].item() < 0.2 * losses[0].item()
    torch.testing.assert_close(reading_loss(3 * hidden, shown), losses[-1], rtol=0.05, atol=1e-3)  # no matter how long
    assert reading_loss(hidden, shown.flip(1)).item() > 1
    nothing = reading_loss(hidden, torch.full_like(shown, -100))
    assert nothing.item() == 0 and nothing.requires_grad


# Optimizer


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 20), (2, 20, 8)])
def test_matrices_become_nearly_orthogonal(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.3


def test_matrices_of_the_text_model_take_muon_and_the_rest_adamw(make_dense, tmp_path):
    model = make_dense("idefics3")
    model.model.vision_model.requires_grad_(False)
    optimizer = make_optimizer(model, arguments(tmp_path, learning_rate=0.01, weight_decay=0.1))
    muon, adam = optimizer.param_groups
    assert (muon["muon"], muon["weight_decay"], adam["muon"], adam["weight_decay"]) == (True, 0.1, False, 0.0)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(muon["params"]) + len(adam["params"]) == len(trained)
    assert all(weight.ndim == 2 for weight in muon["params"])
    assert len(muon["params"]) == 7 * model.config.text_config.num_hidden_layers


def test_adamw_groups_move_as_in_torch():
    weights = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(3)]
    groups = [{"params": [weights[0]], "muon": False}, {"params": [weights[1]], "muon": True}]
    ours, stock = Muon(groups, lr=0.1), torch.optim.AdamW([weights[2]], lr=0.1)
    for step in range(3):
        for weight in weights:
            weight.grad = torch.arange(12.0).view(3, 4) - 5 + step
        ours.step()
        stock.step()
    torch.testing.assert_close(weights[0], weights[2])
    assert not torch.equal(weights[1], weights[2])
    size = (weights[1] - 1).norm() / 12**0.5
    assert 0.01 < size.item() < 0.1  # of the size of AdamW's
    assert [group["params"] for group in ours.param_groups] == [[weights[0]], [weights[1]]]


# Training


@pytest.fixture(autouse=True)
def read_after_one_layer(monkeypatch):
    """For models with two."""
    monkeypatch.setattr("training.standins.small.READING_LAYERS", 1)


def test_a_few_steps_of_all_three(make_dense, processor, tmp_path, capsys):
    model = make_dense("idefics3")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2)
    stand_in = StandInArguments(
        size="small",
        tower_samples=64,
        glimpses="2x2:2",
        pictures="2x2:2 4x4:2",
        validation_size=4,
    )
    trained = train_small(model, processor, args, stand_in)
    assert "names the figure on" in capsys.readouterr().out
    after = dict(trained.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("vision_model.encoder", "connector", "text_model.layers", "embed_tokens"):
        assert any(part in name for name in changed), part
    assert not any(weight.requires_grad for weight in trained.model.vision_model.parameters())
    assert all(torch.isfinite(weight).all() for weight in after.values())


def test_a_stopped_run_goes_on_where_it_was(make_dense, processor, tmp_path):
    """The optimizer's momenta are saved too: the result is that of the uninterrupted run."""
    stand_in = StandInArguments(size="small", tower_samples=64, glimpses="2x2:2", pictures="2x2:6", validation_size=4)

    def run(folder):
        torch.manual_seed(0)
        args = arguments(tmp_path / folder, save_strategy="steps", save_steps=1, save_total_limit=None, seed=3)
        last = sorted((tmp_path / folder).glob("checkpoint-*"))
        args.resume_from_checkpoint = str(last[-1]) if last else None
        return train_small(make_dense("idefics3"), processor, args, stand_in)

    unbroken = run("stopped")
    for file in (tmp_path / "stopped" / "checkpoint-3").iterdir():
        file.unlink()
    (tmp_path / "stopped" / "checkpoint-3").rmdir()
    resumed = dict(run("stopped").named_parameters())
    for name, weight in unbroken.named_parameters():
        torch.testing.assert_close(resumed[name], weight, msg=name)
