"""Outputs count in positions of the prompt, whatever was kept of it: what foreign trainers and loops rely on."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.trainer_pt_utils import LabelSmoother

from modeling_qgsa.readout_qgsa import columns_of_positions, labels_of_kept, shift_labels_of_kept


VARIANTS = ("before_encoder", "after_encoder", "blocks")
WHOLE = {"min_tiles": 16, "max_tiles": 16, "min_visual_tokens": 272, "max_visual_tokens": 272}


def kept_mask(selection, length):
    """The kept positions of the prompt, `(B, L)` bool."""
    kept = torch.zeros(len(selection.keep_indices), length + 1, dtype=torch.bool)
    return kept.scatter(1, selection.keep_indices % (length + 1), True)[:, :length]


def shifted_loss(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def test_a_dropped_position_has_the_column_of_the_last_kept_one_before_it():
    keep_indices = torch.tensor([[-1, 1, 2, 5], [0, 1, 3, 4]])
    assert columns_of_positions(keep_indices, 7).tolist() == [[1, 1, 2, 2, 2, 3, 3], [0, 1, 1, 2, 3, 3, 3]]


def test_labels_of_kept_positions():
    labels = torch.tensor([[10, 11, 12, 13, 14, 15]])
    keep_indices = torch.tensor([[-1, 1, 2, 5]])
    assert labels_of_kept(labels, keep_indices).tolist() == [[-100, -100, 12, 15]]
    shifted = torch.tensor([[11, 12, 13, 14, 15, -100]])
    assert shift_labels_of_kept(shifted, keep_indices).tolist() == [[-100, 12, 15, -100]]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_hidden_states_stand_at_the_positions_of_the_prompt(variant, training, make_model, labelled):
    model = make_model().train(training)
    seen = []
    model.model.text_model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    outputs = model(**labelled, selection=variant, output_hidden_states=True)
    rows, length = labelled["input_ids"].shape
    assert outputs.logits.shape == (rows, length, model.config.text_config.vocab_size)
    assert {states.shape[1] for states in outputs.hidden_states} == {length}
    indices = outputs.selection.keep_indices
    assert indices.shape[1] < length or training, "in training, all tokens that are looked at stay"
    compact = model.lm_head(seen[0])
    for row in range(rows):
        column = -1
        for position in range(length):
            found = (indices[row] == position).nonzero()
            column = int(found[0, 0]) if len(found) else column
            assert torch.equal(outputs.logits[row, position], compact[row, column])
            assert torch.equal(outputs.hidden_states[-1][row, position], seen[0][row, column])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_that_of_the_logits_over_the_prompt(variant, training, make_model, labelled):
    model = make_model().train(training)
    outputs = model(**labelled, selection=variant)
    assert torch.isclose(outputs.loss, shifted_loss(outputs.logits, labelled["labels"]), atol=1e-6)


def test_the_loss_over_all_labels_counts_the_kept_ones(model, labelled):
    """Also the first visual token of a tile whose predecessors were dropped is predicted from what was seen."""
    labels = labelled["input_ids"].masked_fill(labelled["attention_mask"] == 0, -100)
    mask = (labelled["labels"] == -100).long()
    outputs = model(**{**labelled, "labels": labelled["labels"]}, question_mask=mask)
    kept = kept_mask(outputs.selection, labels.shape[1])
    assert (~kept).sum() > 100
    expected = shifted_loss(outputs.logits, labels.masked_fill(~kept, -100))
    indices = outputs.selection.keep_indices
    compact = outputs.logits.gather(1, indices.clamp(min=0)[..., None].expand(-1, -1, outputs.logits.shape[-1]))
    assert torch.isclose(expected, shifted_loss(compact, labels_of_kept(labels, indices)), atol=1e-6)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("where", [1, 40, torch.tensor([3, 100, 7])])
def test_logits_to_keep_counts_positions_of_the_prompt(where, labels, model, labelled):
    inputs = labelled if labels else {name: value for name, value in labelled.items() if name != "labels"}
    every, some = model(**inputs), model(**inputs, logits_to_keep=where)
    expected = every.logits[:, -where:] if isinstance(where, int) else every.logits[:, where]
    assert torch.allclose(some.logits, expected, atol=1e-5)
    assert not labels or torch.equal(some.loss, every.loss)


def test_logits_to_keep_does_not_change_the_loss_of_dense(model, labelled):
    every, some = (model(**labelled, selection="dense", logits_to_keep=count) for count in (0, 1))
    assert some.logits.shape[1] == 1
    assert torch.equal(some.loss, every.loss)


def test_only_kept_positions_go_through_the_language_head(make_model, labelled):
    model, rows = make_model(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    unlabelled = {name: value for name, value in labelled.items() if name != "labels"}
    kept = [model(**inputs).selection.keep_indices.shape[1] for inputs in (labelled, unlabelled)]
    assert rows == kept and kept[1] < labelled["input_ids"].shape[1] / 2
    rows.clear()
    model(**unlabelled, logits_to_keep=1)
    assert rows == [1]


def test_with_everything_kept_logits_are_those_of_the_stock_model(make_dense, model, batch, stock_inputs):
    with torch.no_grad():
        expected = make_dense()(**stock_inputs(batch)).logits
        found = model(**batch, **WHOLE).logits
    real = batch["attention_mask"].bool()
    assert torch.allclose(found[real], expected[real], atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_with_everything_kept_hidden_states_are_not_copied(training, make_model, single):
    """They have gradients, and no second copy of the logits takes memory."""
    model, seen = make_model(**WHOLE).train(training), []
    model.model.text_model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    outputs = model(**single, output_hidden_states=True)
    assert outputs.selection.keep_indices.shape == single["input_ids"].shape
    assert training or outputs.hidden_states[-1] is seen[0]
    outputs.hidden_states[0].retain_grad()
    outputs.logits[0, -1, 0].backward()
    assert outputs.hidden_states[0].grad.any()


@pytest.mark.parametrize("training", [False, True])
def test_label_smoothing(training, make_model, labelled):
    outputs = make_model().train(training)(**labelled)
    loss = LabelSmoother(0.1)(outputs, labelled["labels"], shift_labels=True)
    assert loss.isfinite() and not torch.isclose(loss, outputs.loss)
    assert torch.isclose(LabelSmoother(0.0)(outputs, labelled["labels"], shift_labels=True), outputs.loss, atol=1e-6)


@pytest.mark.parametrize("variant", [*VARIANTS, "dense"])
def test_shifted_labels_give_the_same_loss(variant, model, labelled):
    labels = labelled["labels"]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    expected = model(**labelled, selection=variant).loss
    assert torch.equal(model(**labelled, selection=variant, shift_labels=shifted).loss, expected)
    other = model(**labelled, selection=variant, shift_labels=shifted.masked_fill(shifted == shifted.max(), -100))
    assert not torch.equal(other.loss, expected)


def test_shifted_labels_of_another_shape_are_named(model, labelled):
    with pytest.raises(ValueError, match="shift_labels has shape"):
        model(**labelled, shift_labels=labelled["labels"][:, 1:])


def test_a_text_head_on_the_base_model_reads_the_last_token_of_each_row(make_model, labelled):
    """As classifiers and embedders do on a right-padded batch."""
    model = make_model()
    last = labelled["attention_mask"].sum(1) - 1
    inputs = {name: value for name, value in labelled.items() if name != "labels"}
    hidden = model.model(**inputs, question_mask=(labelled["labels"] == -100).long()).last_hidden_state
    columns = model.model(**inputs, question_mask=(labelled["labels"] == -100).long()).selection.keep_indices
    assert torch.equal(columns.max(1).values, last)
    seen = []
    model.model.text_model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model.model(**inputs, question_mask=(labelled["labels"] == -100).long())
    assert torch.equal(hidden[range(2), last], seen[0][:, -1])
