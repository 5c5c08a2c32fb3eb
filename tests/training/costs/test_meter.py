"""Seconds of one answer by part, and peak memory."""

import time
from pathlib import Path

import pytest
import torch

from modeling_qgsa.tiles_qgsa import LazyTiles
from training.costs.meter import PARTS, peak_memory, time_answer


def test_parts_sum_to_the_total(model, prepare, samples):
    def generate(inputs):
        return model.generate(**inputs, max_new_tokens=3, do_sample=False)

    seconds, output = time_answer(model, lambda: prepare(samples[0], lazy_tiles=True), generate)
    assert sum(seconds[part] for part in PARTS) == pytest.approx(seconds["total"])
    assert min(seconds.values()) > 0 and output.shape[0] == 1
    assert not model.lm_head._forward_hooks


def test_cutting_tiles_is_processing(model, prepare, samples, monkeypatch):
    inputs = prepare(samples[0], lazy_tiles=True)
    cut = LazyTiles.cut

    def slowly(*args):
        time.sleep(0.5)
        return cut(*args)

    monkeypatch.setattr(LazyTiles, "cut", slowly)
    options = {"min_tiles": 1, "max_tiles": 1, "max_new_tokens": 2}
    seconds, _ = time_answer(model, lambda: inputs, lambda given: model.generate(**given, **options))
    assert seconds["processing"] > 0.5 and seconds["prefill"] < 0.5


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_peak_memory_is_what_was_held_at_once():
    def hold():
        torch.ones(50_000_000)  # 200 MB, given back at once

    assert 150e6 < peak_memory(torch.device("cpu"), hold) < 300e6
