"""FLOPs of an answer by part, as reported in result rows."""

import pytest

from training.costs.counter import count_flops
from training.evaluation.systems import DENSE


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
