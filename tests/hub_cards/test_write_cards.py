"""The committed cards are those of the committed results."""

import re

import pytest
import write_cards
from huggingface_hub import ModelCard

from training.data.sets import DATASETS
from training.evaluation.card import render_card


def test_the_committed_cards_are_those_of_the_results():
    cards = write_cards.committed_cards()
    assert {str(path.relative_to(write_cards.HERE)) for path in cards} == {
        "qgsa-smolvlm-256m.md",
        "qgsa-smolvlm-500m.md",
        "tiny-dense/README.md",
        "tiny-qgsa/README.md",
    }
    for path, text in cards.items():
        assert path.read_text() == text, f"{path.name}: python hub_cards/write_cards.py"


def test_the_committed_cards_hold_what_was_measured_and_no_more():
    cards = {content.name: (ModelCard.load(path), content) for path, content in write_cards.qgsa_cards().items()}
    assert set(cards) == {"qgsa-smolvlm-256m", "qgsa-smolvlm-500m", "qgsa-smolvlm-tiny"}
    for card, content in cards.values():
        results = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
        if content.accuracy is None:
            assert (
                "points with its own attention" in card.text
                and not results
                and "## Accuracy\n\nNot measured" in card.text
            )
            continue
        (row,) = [row for row in content.accuracy["rows"] if row["system"] == "qgsa"]
        assert results and all(value == row[kind] for kind, value in results.items())
        for control in ("random", "centre", "blank-image"):
            assert f"| {control} |" in card.text


def test_a_changed_number_changes_the_card():
    (content,) = [content for content in write_cards.qgsa_cards().values() if content.accuracy]
    before = str(render_card(content))
    row = content.accuracy["rows"][-1]
    row["accuracy"] += 0.01
    changed = [line for line in str(render_card(content)).split("\n") if line not in before]
    assert any(re.match(r"\| qgsa \|", line) for line in changed) and any("value:" in line for line in changed)


@pytest.mark.parametrize("dataset, split", [("aokvqa", "validation"), ("refcoco", "test"), ("cards", "validation")])
def test_a_card_names_the_split_and_the_rule_of_its_results(dataset, split):
    (content,) = [content for content in write_cards.qgsa_cards().values() if content.accuracy]
    content.accuracy |= {"dataset": dataset, "split": split}
    card = render_card(content)
    assert f"questions of {dataset} ({split})" in card.text and f"graded by {DATASETS[dataset].graded_by}" in card.text
    assert {result.dataset_split for result in card.data.eval_results} == {split}
    content.accuracy["dataset"] = "mmmu"
    with pytest.raises(ValueError, match=r"dataset \('mmmu'\): choose from cards"):
        render_card(content)
    del content.accuracy["split"]
    with pytest.raises(ValueError, match=r"results \(split\): missing"):
        render_card(content)
