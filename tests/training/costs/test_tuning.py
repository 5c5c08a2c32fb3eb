"""Models of one size are tuned alike: a comparison must not hang on what two measurements differ by."""

import torch

from training.costs import tuning


def test_the_first_one_is_measured(make_model, monkeypatch):
    def tune(model):
        measured.append(model)
        model.tune(torch.bfloat16, 2)
        return {"tiles_per_step": 2, "threads": None}

    measured = []
    monkeypatch.setattr(tuning, "tune", tune)
    one, other = make_model(), make_model(glance_downscale=2)
    assert tuning.tune_alike([one, other])["tiles_per_step"] == 2
    assert measured == [one]
    assert other.model.vision_model.dtype == torch.bfloat16 and other.lm_head.weight.dtype == torch.float32
    assert other.config.tiles_per_step == 2 and other.config.glance_downscale == 2
    assert tuning.tune_alike([]) is None
