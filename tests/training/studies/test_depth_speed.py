"""The seconds of schedules, on a random model of the tests' size."""

import pytest

from modeling_qgsa.schedule_qgsa import parse_schedule, vision_share
from training.studies.depth_speed import (
    DepthSpeedArguments,
    ask_again,
    format_depth_speed,
    format_questions,
    measure,
    schedules_of,
)


@pytest.fixture(scope="module")
def model(make_model):
    model = make_model(pointer="attention")
    model.generation_config.eos_token_id = None  # all answers must have the same length
    return model


def test_schedules_are_those_of_any_depth():
    for layers in (6, 30, 32):
        schedules = schedules_of(layers)
        assert len(schedules) == 5 and all(len(letters) == layers for letters in schedules.values())
    assert schedules["2 full, others cross"].count("F") == 2 and schedules["half full"].count("F") == 16


def test_every_schedule_is_timed(model, processor, make_image, monkeypatch):
    monkeypatch.setattr("training.studies.depth_speed.schedules_of", lambda layers: {"all full": "FF", "none": "TT"})
    run = DepthSpeedArguments(batch_sizes=[1, 2], repeats=1)
    rows = measure(model, processor, make_image(0), run)
    assert [(row["batch_size"], row["visual_tokens_mean"]) for row in rows[::2]] == [
        (1, 272),
        (1, 17),
        (2, 272),
        (2, 17),
    ]
    for full, none in zip(rows[::2], rows[1::2]):
        assert full["vision_share"] == 1 and none["vision_share"] == 0
        assert full["kv_cache_bytes"] > none["kv_cache_bytes"] > 0
        assert full["seconds_1"] < full["seconds_8"] < full["seconds_64"] and full["per_token"] > 0
    assert all(
        row["vision_share"] == vision_share(parse_schedule("", row["schedule"], 2), model.config) for row in rows
    )
    rows += ask_again(model, processor, make_image(0))
    assert len(format_depth_speed(rows).splitlines()) == 2 + 8
    assert rows[-1]["first"] > 0 and len(format_questions(rows).splitlines()) == 2 + 1


@pytest.mark.parametrize(
    "fields, complaint",
    [({"size": "2b"}, r"size \('2b'\)"), ({"dtype": "int8"}, r"dtype \('int8'\)"), ({"repeats": 0}, r"repeats \(0\)")],
)
def test_bad_input(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        DepthSpeedArguments(**fields)
