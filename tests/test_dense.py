"""Training of the tiny dense model: its curriculum, its conversations, and both of its stages in a few steps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from training.data.cards import COLOURS, FIGURES, SPLITS, Cards, make_scene, place
from training.dense import (
    Conversations,
    CurriculumCollator,
    Stage,
    Tiles,
    exact_match_by_family,
    parse_curriculum,
    train_dense,
)


# Curriculum


def test_stages_are_read_in_order_and_rounded_to_whole_batches():
    assert parse_curriculum("2x2:100:0.5 4x3:96:0", 48) == [Stage(2, 2, 96, 0.5), Stage(4, 3, 96, 0.0)]
    assert parse_curriculum("1x1:7:1", 7) == [Stage(1, 1, 7, 1.0)]


@pytest.mark.parametrize(
    "stage", ["4x4", "4x4:48", "4:48:0.2", "4x4x4:48:0.2", "4x4:many:0.2", "4x4:48:0.2:1", "axb:48:1"]
)
def test_stages_that_cannot_be_read_are_refused_by_name(stage):
    with pytest.raises(ValueError, match=f"cannot read the stage '{stage}'"):
        parse_curriculum(f"2x2:48:0.5 {stage}", 48)


def test_a_stage_below_one_batch_is_refused():
    with pytest.raises(ValueError, match="'4x4:47:0.2' is smaller than one batch of 48"):
        parse_curriculum("4x4:47:0.2", 48)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (2, 3), (4, 4)])
def test_a_canvas_keeps_its_size(rows, columns, processor):
    stage = Stage(rows, columns, 4, 0.5)
    samples = [Conversations(stage, 0)[index] for index in range(2)]
    inputs = CurriculumCollator(processor)(samples)
    tiles = 1 if rows == columns == 1 else rows * columns + 1
    assert inputs["pixel_values"].shape == (2, tiles, 3, 64, 64)


# Conversations


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (4, 4)])
def test_no_question_is_asked_twice_in_a_sample(rows, columns):
    conversations = Conversations(Stage(rows, columns, 300, 0.0), seed=0)
    lengths = set()
    for index in range(300):
        questions = [turn["question"] for turn in conversations[index]["turns"]]
        assert len(set(questions)) == len(questions)
        lengths.add(len(questions))
    assert lengths == {1, 2, 3, 4}


def test_descriptions_name_every_card():
    conversations, asked = Conversations(Stage(4, 4, 200, 1.0), seed=3), set()
    for index in range(200):
        rng = np.random.default_rng((3, SPLITS.index("train"), 4, 4, index))
        scene = make_scene(rng, "train")
        (turn,) = conversations[index]["turns"]
        facts = {
            "what is on the cards?": {f"{card.colour} {card.figure}" for card in scene},
            "which colours are the shapes?": {f"{card.figure} {card.colour}" for card in scene},
            "where are the cards?": {f"{card.colour} {place(card)}" for card in scene},
            "where are the shapes?": {f"{card.figure} {place(card)}" for card in scene},
        }
        named = turn["answer"].split(", ")
        assert len(named) == len(scene)
        assert set(named) == facts[turn["question"]]
        asked.add(turn["question"])
    assert len(asked) == 4


def test_the_share_of_descriptions_is_that_of_the_stage():
    conversations = Conversations(Stage(2, 2, 400, 0.3), seed=0)
    descriptions = {question for question, _ in Conversations.DESCRIPTIONS}
    described = [conversations[index]["turns"][0]["question"] in descriptions for index in range(400)]
    assert np.mean(described) == pytest.approx(0.3, abs=0.07)


def test_stages_draw_from_the_training_layouts():
    conversations, cards = Conversations(Stage(4, 4, 5, 0.0), seed=2), Cards("train", 5, seed=2)
    assert conversations.split == "train"
    assert len(conversations) == len(cards) == 5


# Tower


def test_tiles_hold_one_card_and_say_what_it_is():
    tiles = Tiles("train", 50, seed=0)
    for index in range(50):
        tile = tiles[index]
        assert tile["pixel_values"].shape == (3, 64, 64)
        assert tile["pixel_values"].min() >= -1 and tile["pixel_values"].max() <= 1
        colour, figure = tile["labels"].tolist()
        rng = np.random.default_rng((0, 0, index))
        (card,) = make_scene(rng, "train", 1, 1)
        assert (list(COLOURS)[colour], FIGURES[figure]) == (card.colour, card.figure)
    assert torch.equal(tiles[3]["pixel_values"], Tiles("train", 50, seed=0)[3]["pixel_values"])
    assert not torch.equal(tiles[3]["pixel_values"], Tiles("validation", 50, seed=0)[3]["pixel_values"])


# Training


def test_exact_match_needs_every_token_of_the_answer():
    dataset = [{"family": "open"}, {"family": "find"}, {"family": "open"}]
    labels = np.array([[-100, -100, 5, 6], [-100, 7, 8, -100], [-100, -100, 5, 9]])
    guesses = np.array([[1, 5, 6, 0], [7, 8, 3, 4], [1, 5, 6, 0]])
    prediction = SimpleNamespace(predictions=guesses, label_ids=labels)
    scores = exact_match_by_family(dataset)(prediction)
    assert scores == {"exact_match": pytest.approx(2 / 3), "open": 0.5, "find": 1.0}


def test_a_few_steps_of_both_stages(make_dense, processor, tmp_path, capsys):
    model = make_dense("idefics3")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=50,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        logging_steps=1,
    )
    trained = train_dense(model, processor, args, "1x1:2:1 2x2:2:0", tower_samples=64, validation_size=4)
    assert "names the figure on" in capsys.readouterr().out
    after = dict(trained.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("vision_model.encoder", "connector", "text_model.layers", "lm_head"):
        assert any(part in name for name in changed), part
    assert not any(weight.requires_grad for weight in trained.model.vision_model.parameters())
    assert all(torch.isfinite(weight).all() for weight in after.values())
