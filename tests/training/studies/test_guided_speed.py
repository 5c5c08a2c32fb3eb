"""The seconds of a pair, on random models of the tests' size."""

import copy

import pytest
import torch

from modeling_qgsa import GuidedVLM
from training.studies import guided_speed
from training.studies.guided_speed import GuidedSpeedArguments, format_speed, make_inputs, make_systems, measure


@pytest.fixture(scope="module")
def systems(make_dense, make_model, processor):
    """As `make_systems` makes them, of two small models with one encoder."""

    def build(checkpoints, size):
        model = make_model(make_dense(), pointer="attention")
        model.generation_config.eos_token_id = None
        return model, copy.copy(processor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guided_speed, "build", build)
        return make_systems(GuidedSpeedArguments())


def test_every_system_is_timed_and_counted(systems, make_image):
    rows = measure(*systems, [make_image(0), make_image(1)], new_tokens=2)
    found = {row["system"]: row for row in rows}
    assert list(found) == list(systems[0]) and len(found) == 13
    assert all(row["flops"]["total"] > 0 and row["seconds_median"] > 0 for row in rows)
    assert found["target, dense"]["speedup_vs_dense"] == 1
    guide, target = found["guide, dense"], found["target, dense"]
    assert found["sgl"]["weight_bytes"] == guide["weight_bytes"] + target["weight_bytes"]
    shared, apart = found["sgl-before-encoder"], found["sgl-before-encoder, each its own encoder"]
    assert shared["flops"]["vision"] < apart["flops"]["vision"]
    alone, asked = (found[f"sgl-before-encoder, glance, {name}"]["flops"] for name in ("guide alone", "exit asked"))
    assert alone["total"] < asked["total"] < shared["flops"]["total"]
    assert len(format_speed(rows).splitlines()) == 2 + len(rows)


def test_each_model_gets_its_own_inputs(systems, make_image):
    by_name, pair = systems
    sizes = [make_inputs(pair, by_name[name][0], make_image(0)).keys() for name in ("target, dense", "sgl")]
    assert sizes[1] - sizes[0] == {"guide_inputs"} and isinstance(by_name["sgl"][0], GuidedVLM)


def test_the_published_sizes():
    """256M guides 500M, or 2.2B with 81 tokens a tile."""
    run = GuidedSpeedArguments()
    if not (guided_speed.SHARED / "checkpoints").is_dir():
        pytest.skip("the published files are not at hand")
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda seed: None)
        built = [guided_speed.build(run.checkpoints, size) for size in ("256m", "500m", "2b")]
    assert [model.config.tokens_per_tile for model, _ in built] == [64, 64, 81]
    sizes = [round(sum(weight.numel() for weight in model.parameters()) / 1e6) for model, _ in built]
    assert 250 < sizes[0] < 270 and 490 < sizes[1] < 530 and 2200 < sizes[2] < 2300
    assert built[2][1].image_seq_len == 81


@pytest.mark.parametrize("fields, complaint", [({"target": "8b"}, "target"), ({"repeats": 0}, "repeats")])
def test_bad_options(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        GuidedSpeedArguments(**fields)
