"""FLOPs that add up, and the report."""

import json

import pytest
from PIL import Image

from training.costs.flops import count_flops
from training.data.cards import FAMILIES
from training.evaluation.report import (
    format_families,
    format_table,
    plot_accuracy,
    plot_selections,
    write_dense_card,
    write_results,
)
from training.evaluation.systems import DENSE
from training.model_card import CardContent, format_flops, format_kept, write_card


# FLOPs


@pytest.mark.parametrize("tiles", [0, 1, 4])
def test_vision_costs_its_tiles_and_parts_sum_to_the_total(tiles, model, single):
    dense = count_flops(model, single, 3, **DENSE)
    few = count_flops(model, single, 3, min_tiles=tiles, max_tiles=tiles)
    assert few["vision"] / dense["vision"] == pytest.approx((1 + tiles) / 17, rel=1e-6)
    for counts in (dense, few):
        assert counts["total"] == counts["vision"] + counts["prefill"] + counts["decode"]
        assert min(counts.values()) > 0
    assert few["prefill"] < dense["prefill"]


def test_vision_is_that_of_the_formula(model, single):
    config = model.config.vision_config
    patches, width, inner = 64, config.hidden_size, config.intermediate_size
    layer = 2 * patches * width * (4 * width + 2 * inner) + 2 * 2 * patches**2 * width
    embedding = 2 * patches * width * 3 * 8**2
    connector = 2 * 16 * 4 * width * model.config.text_config.hidden_size
    expected = 17 * (embedding + config.num_hidden_layers * layer + connector)
    assert count_flops(model, single, 1, **DENSE)["vision"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("options", [DENSE, {"min_tiles": 2, "max_tiles": 2}], ids=["dense", "before_encoder"])
def test_eager_and_sdpa_count_the_same(options, make_dense, make_model, single):
    eager, sdpa = (
        count_flops(make_model(make_dense("smolvlm", attention)), single, 3, **options)
        for attention in ("eager", "sdpa")
    )
    for part in ("vision", "prefill", "decode", "total"):
        assert sdpa[part] == pytest.approx(eager[part], rel=0.01), part


def test_counting_leaves_no_hooks_behind(model, single):
    count_flops(model, single, 1)
    for part in (model.model.vision_model, model.model.connector, model.lm_head):
        assert not part._forward_pre_hooks and not part._forward_hooks


# The report


def test_results_are_written_in_one_step(rows, tmp_path):
    path = tmp_path / "results.json"
    write_results(path, "demo", "cards", 8, 1, rows)
    written = json.loads(path.read_text())
    assert set(written) == {"preset", "dataset", "split", "n", "seed", "environment", "rows"}
    assert written["split"] == "test"
    assert written["rows"] == rows
    assert (written["preset"], written["dataset"], written["n"], written["seed"]) == ("demo", "cards", 8, 1)
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


def test_the_table_has_a_line_for_every_system_and_dashes_for_what_was_not_measured(rows):
    header, rule, *lines = format_table(rows).split("\n")
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [row["system"] for row in rows]
    assert {line.count("|") for line in (header, rule, *lines)} == {header.count("|")}
    bare = {name: value for name, value in rows[0].items() if name != "flops"}
    assert format_table([bare]).split("\n")[2].count("–") == 2


def test_the_card_has_every_number_of_the_tables(rows, tmp_path):
    results = write_results(tmp_path / "results.json", "demo", "cards", 8, 1, rows)
    content = CardContent(
        "qgsa-demo", "outputs/demo", "some/base", None, "1 to 2", "python run.py", 0.02, True, accuracy=results
    )
    write_card(tmp_path, content)
    card = (tmp_path / "README.md").read_text()
    for table in (format_table(rows), format_families(rows), format_kept(rows[-1]), format_flops(rows)):
        assert table in card
    for row in rows:
        line = next(line for line in card.split("\n") if line.startswith(f"| {row['system']} |"))
        for number in (
            f"{row['accuracy']:.1%}",
            f"{row['delta_vs_dense_pp']:+.1f}",
            f"{row['visual_tokens_mean']:.1f}",
            f"{row['tiles_mean']:.2f}",
            f"{row['flops']['total'] / 1e9:.2f}",
            f"{1000 * row['seconds_median']:.1f}",
        ):
            assert number in line
    assert "qgsa-demo" in card and "some/base" in card and "python run.py" in card
    assert "{{" not in card and "{%" not in card


def test_the_card_of_the_dense_model_sums_its_families_up(rows, tmp_path):
    needed = {family: tiles for family, (tiles, _) in FAMILIES.items()}
    table = write_dense_card(tmp_path, "tiny-dense", 1_234_567, 8, rows[0], needed, "python training/run_qgsa.py")
    card = (tmp_path / "README.md").read_text()
    assert table in card and "1,234,567 parameters" in card
    for family, scores in rows[0]["by_family"].items():
        assert f"| {family} | {needed[family]} | {scores['n']} | {scores['accuracy']:.1%} |" in card
    assert f"| **all** | | 8 | **{rows[0]['accuracy']:.1%}** |" in card


def test_figures_are_drawn(rows, model, processor, questions, collate, tmp_path):
    plot_accuracy(rows, tmp_path / "accuracy.png")
    plot_selections(model, processor, [questions[0], questions[1]], collate, tmp_path / "selections.png")
    for name in ("accuracy", "selections"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 200
