"""Training of the tiny dense model: its stages, tower, words, and all of its steps in a few batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from standins import arguments

from training.cli.groups import StandInArguments
from training.standins.dense import WordTrainer, exact_match_by_family, parse_stages, train_dense
from training.standins.lessons import Lessons, WordCollator


# Stages


def test_stages_are_read_in_order_and_rounded_to_whole_batches():
    assert parse_stages("2x2:100 2x2,4x3:96", 48) == [([(2, 2)], 96), ([(2, 2), (4, 3)], 96)]
    assert parse_stages("1x1:7", 7) == [([(1, 1)], 7)]


@pytest.mark.parametrize("stage", ["4x4", "4:48", "4x4x4:48", "4x4:many", "4x4:48:1", "axb:48", "4x4,:48"])
def test_stages_that_cannot_be_read_are_refused_by_name(stage):
    with pytest.raises(ValueError, match=rf"stage \('{stage}'\): cannot be parsed"):
        parse_stages(f"2x2:48 {stage}", 48)


def test_a_stage_below_one_batch_is_refused():
    with pytest.raises(ValueError, match=r"stage \('4x4:47'\): must not be smaller than one batch \(48\)"):
        parse_stages("4x4:47", 48)


# Words


def test_words_stand_where_visual_tokens_would(make_dense, processor, tmp_path, monkeypatch):
    model = make_dense("idefics3")
    inputs = WordCollator(processor)([Lessons("train", 2, 0, [(2, 2)], 2, drawn=False)[0]])
    seen = {}

    def forward(inputs_embeds, labels, **kwargs):
        seen.update(embeddings=inputs_embeds, **kwargs)
        return {"loss": inputs_embeds.sum()}

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    WordTrainer(model, arguments(tmp_path)).compute_loss(model, dict(inputs))
    table, words = model.get_input_embeddings().weight, inputs["words"]
    visual = seen["embeddings"][inputs["input_ids"] == processor.image_token_id]
    assert len(visual) == len(words)
    for vector, facts in zip(visual, words.tolist()):
        expected = sum((table[word] for word in facts if word >= 0), torch.zeros_like(vector))
        torch.testing.assert_close(vector, expected)
    text = inputs["input_ids"] != processor.image_token_id
    assert torch.equal(seen["embeddings"][text], table[inputs["input_ids"][text]])
    assert torch.equal(seen["attention_mask"], inputs["attention_mask"])


# Training


def test_exact_match_needs_every_token_of_the_answer():
    dataset = [{"family": "open"}, {"family": "find"}, {"family": "open"}]
    labels = np.array([[-100, -100, 5, 6], [-100, 7, 8, -100], [-100, -100, 5, 9]])
    guesses = np.array([[1, 5, 6, 0], [7, 8, 3, 4], [1, 5, 6, 0]])
    prediction = SimpleNamespace(predictions=guesses, label_ids=labels)
    scores = exact_match_by_family(dataset)(prediction)
    assert scores == {"exact_match": pytest.approx(2 / 3), "open": 0.5, "find": 1.0}


def test_a_few_steps_of_all_three(make_dense, processor, tmp_path, capsys):
    model = make_dense("idefics3")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2)
    stand_in = StandInArguments(words="2x2:2", tower_samples=64, pictures="2x2:2 4x4:2", validation_size=4)
    trained = train_dense(model, processor, args, stand_in)
    assert "names the figure on" in capsys.readouterr().out
    after = dict(trained.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("vision_model.encoder", "connector", "text_model.layers", "lm_head"):
        assert any(part in name for name in changed), part
    assert not any(weight.requires_grad for weight in trained.model.vision_model.parameters())
    assert all(torch.isfinite(weight).all() for weight in after.values())


def test_a_stopped_run_goes_on_where_it_was(make_dense, processor, tmp_path):
    """Steps that were finished are loaded, not trained again; the result is that of the uninterrupted run."""

    def run(folder, pictures):
        torch.manual_seed(0)
        args = arguments(tmp_path / folder, save_strategy="steps", save_steps=1, max_steps=pictures, seed=3)
        last = sorted((tmp_path / folder).glob("checkpoint-*"))
        args.resume_from_checkpoint = str(last[-1]) if last else None
        stand_in = StandInArguments(words="2x2:4", tower_samples=128, pictures="2x2:4", validation_size=4)
        return train_dense(make_dense("idefics3"), processor, args, stand_in)

    unbroken = run("unbroken", 2)
    words = tmp_path / "broken" / "words"
    run("broken", 2)
    for checkpoint in (tmp_path / "broken").glob("checkpoint-*"):
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    stamps = {path: path.stat().st_mtime_ns for path in words.rglob("*.safetensors")}
    resumed = run("broken", 2)
    assert stamps == {path: path.stat().st_mtime_ns for path in words.rglob("*.safetensors")}
    for name, weight in unbroken.named_parameters():
        torch.testing.assert_close(dict(resumed.named_parameters())[name], weight, msg=name)
