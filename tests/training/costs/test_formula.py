"""The formula agrees with torch's count to within 0.1 %."""

import pytest
import torch
from transformers import Idefics3Config

from modeling_qgsa.compat_qgsa import CACHE
from modeling_qgsa.conversion_qgsa import config_of_dense
from modeling_qgsa.layered_cache_qgsa import held_by
from modeling_qgsa.layout_qgsa import VisualLayout, covered_by
from modeling_qgsa.pointer_qgsa import PointedScores
from modeling_qgsa.request_qgsa import Request
from modeling_qgsa.schedule_qgsa import parse_schedule
from modeling_qgsa.selection_qgsa import choose_tiles, choose_tokens, positions_to_keep
from training.costs.counter import count_flops
from training.costs.formula import (
    answer_table,
    cache_bytes,
    estimate_flops,
    format_tables,
    paper_table,
    schedule_flops,
    selector_flops,
    text_flops,
    vision_flops,
)


BUDGET = {"min_visual_tokens": 20, "max_visual_tokens": 20}


@pytest.fixture
def inputs(prepare, make_image):
    return prepare(("what shape is on the red card?", [make_image()]))


def check(counted, expected):
    for part in ("vision", "prefill", "decode", "total"):
        assert counted[part] == pytest.approx(expected[part], rel=1e-3), part


def test_dense(model, inputs):
    length = inputs["input_ids"].shape[1]
    check(count_flops(model, inputs, 5, selection="dense"), estimate_flops(model.config, 17, length, 5))


@pytest.mark.parametrize("selection, tiles", [("before_encoder", 0), ("before_encoder", 3), ("after_encoder", 16)])
def test_selection(model, inputs, selection, tiles):
    options = {"selection": selection, "min_tiles": tiles, "max_tiles": tiles, **BUDGET}
    length = model.select(**inputs, **options).keep_indices.shape[1]
    question = int(inputs["question_mask"].sum())
    expected = estimate_flops(model.config, 1 + tiles, length, 5, question)
    check(count_flops(model, inputs, 5, **options), expected)


@pytest.mark.parametrize("weights", [None, [[1.0, 0.5]]])
def test_attention_pointer(make_model, inputs, weights):
    model = make_model(pointer="attention", attention_weights=weights)
    options = {"min_tiles": 2, "max_tiles": 2, "min_visual_tokens": 48, "max_visual_tokens": 48}
    length = model.select(**inputs, **options).keep_indices.shape[1]
    header = covered_by(inputs["input_ids"], model.config.user_token_ids)
    question = int((inputs["question_mask"].bool() & ~header).sum())
    assert header.any()
    glance = length - 2 * 16 - 2 * 16  # without two tiles and all markers; line ends belong to the last tile of a line
    layout = VisualLayout.of(model.config, inputs["input_ids"])
    shown = layout.is_global[:, None].expand(-1, 16)
    read = int(positions_to_keep(inputs["attention_mask"], layout, shown).sum())
    assert glance - 5 <= read <= glance
    expected = estimate_flops(model.config, 3, length, 5, question, glance=read)
    check(count_flops(model, inputs, 5, **options), expected)


def test_blocks(model, inputs):
    options = {"selection": "blocks", "min_tiles": 2, "max_tiles": 2, **BUDGET}
    selection = model.select(**inputs, **options)
    with torch.no_grad():
        glance = model.model.glance_and_point(Request.take(model.config, dict(inputs)))
        scores = PointedScores(glance)
        tiles = choose_tiles("blocks", scores, glance.layout, torch.tensor([2]))
        counts = choose_tokens("blocks", scores, glance.layout, tiles, torch.tensor([20])).sum(1).tolist()
    whole, parts = counts.count(16), tuple(count for count in counts if 0 < count < 16)
    assert parts and whole + len(parts) == 1 + int(selection.tiles)
    length, question = selection.keep_indices.shape[1], int(inputs["question_mask"].sum())
    expected = estimate_flops(model.config, whole, length, 5, question, parts)
    check(count_flops(model, inputs, 5, **options), expected)


def test_one_token_costs_what_all_weights_of_the_text_model_do(model):
    text = model.config.text_config
    weights = sum(p.numel() for n, p in model.named_parameters() if ("text_model.layers" in n and "proj" in n))
    weights += text.vocab_size * text.hidden_size
    assert text_flops(model.config, 1) == pytest.approx(2 * weights, rel=0.01)


def test_the_papers_table():
    """QGSA, table of cross-modal attention: 17 of the patches are left."""
    rows = {row["pixels"]: row for row in paper_table()}
    assert [row["patches"] for row in rows.values()] == [196, 441, 576, 784, 1296]
    assert rows[224]["saved"] == pytest.approx(0.913, abs=5e-4) and rows[576]["saved"] == pytest.approx(
        0.987, abs=5e-4
    )
    assert round(rows[384]["times"]) == 34 and round(rows[576]["times"]) == 76


@pytest.fixture
def published():
    """The sizes of SmolVLM-256M."""
    text = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    text |= {"num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280, "model_type": "llama"}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision |= {"image_size": 512, "patch_size": 16}
    return config_of_dense(Idefics3Config(text_config=text, vision_config=vision, scale_factor=4))


def test_the_published_tile_costs_214_gflops_and_the_selector_far_less_than_two_percent_of_it(published):
    tile = vision_flops(published, [1024])
    assert tile == pytest.approx(214e9, rel=0.01)
    assert selector_flops(published, question=128, tiles=3) < 0.02 * tile


def test_the_table_of_answers(published):
    rows = {row["system"]: row["flops"] for row in answer_table(published)}
    dense, after, before, blocks = rows.values()
    assert dense["vision"] == after["vision"] == 17 * vision_flops(published, [1024])
    assert before["vision"] * 17 == dense["vision"] * 3
    assert before["cross_modal_attention"] * 17 * 64 == dense["cross_modal_attention"] * 17
    assert blocks["total"] < before["total"] < after["total"] < dense["total"]
    table = format_tables({"256m": published})
    assert "| 576 | 1296 | 98.7% | 76 |" in table and "| 256m | dense | " in table


@pytest.mark.parametrize("cross", ["own", "block"])
@pytest.mark.parametrize("letters", ["FF", "FC", "CT", "TT", "TC"])
def test_schedules(make_model, inputs, letters, cross):
    model = make_model(pointer="attention", vision_cross=cross)
    kinds = parse_schedule("", letters, 2)
    everything = {"selection": "after_encoder", "min_visual_tokens": 9999, "max_visual_tokens": 9999}
    counted = count_flops(model, inputs, 5, **everything, vision_budget=letters)
    visual = 17 * 16
    words = inputs["input_ids"].shape[1] - visual
    expected = schedule_flops(model.config, kinds, visual, words, 5)
    for part in ("prefill", "decode"):
        assert counted[part] == pytest.approx(expected[part], rel=1e-3), part
    without = count_flops(model, inputs, 5, **everything, vision_budget="TT")
    difference = counted["total"] - counted["vision"] - without["total"] + without["vision"]
    assert difference == pytest.approx(expected["visual"], rel=1e-3, abs=1e4)
    with torch.no_grad():
        cache = model(**inputs, **everything, vision_budget=letters)[CACHE]
    seen = [] if held_by(cache) is None else held_by(cache).seen.values()
    held = sum(each.keys.nbytes + each.values.nbytes for each in [*cache.layers, *seen])
    assert cache_bytes(model.config, kinds, visual, words) == held


def test_pruning_behind_a_layer(make_model, inputs):
    model = make_model(pointer="attention", keep_tile_markers=True)
    visual, kept = 17 * 16, 20
    words = inputs["input_ids"].shape[1] - visual
    scores = torch.rand(1, visual, generator=torch.Generator().manual_seed(0))
    options = {"selection": "after_encoder", "prune_layer": 1, "visual_token_scores": scores, **BUDGET}
    counted = count_flops(model, inputs, 5, **options)
    expected = schedule_flops(model.config, ("full", "full"), visual, words, 5, (1, kept))
    for part in ("prefill", "decode"):
        assert counted[part] == pytest.approx(expected[part], rel=1e-3), part
