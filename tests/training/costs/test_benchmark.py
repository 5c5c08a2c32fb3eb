"""The benchmark as a user runs it, on the tiny architecture, and what it measures by."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_qgsa.tiles_qgsa import LazyTiles
from training.benchmark import SYSTEMS, BenchmarkArguments, Runner, build_models, files_of, pick_images
from training.costs.meter import PARTS, peak_memory, time_answer
from training.costs.speed_report import add_speedups, format_headline, format_speed


ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_image):
    """Results of one run of everything, and the images it asked about."""
    folder = tmp_path_factory.mktemp("speed")
    (folder / "images").mkdir()
    for seed, size in enumerate([(256, 200), (100, 60)]):
        make_image(seed, *size).save(folder / "images" / f"{seed}.png")
    options = ["--files", "hub_cards/tiny-dense", "--images", str(folder / "images"), "--repeats", "2"]
    options += ["--longest_edges", "256", "128", "--new_tokens", "3", "--output_dir", str(folder), "--device", "cpu"]
    command = [sys.executable, "training/benchmark.py", *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def test_every_system_is_timed_by_part_at_every_size(rows):
    assert [(row["system"], row["longest_edge"]) for row in rows] == [(n, e) for e in (256, 128) for n in SYSTEMS]
    for row in rows:
        assert set(row["seconds"]) == set(PARTS) and min(row["seconds"].values()) > 0
        low, high = row["seconds_range"]
        assert low <= row["seconds_median"] <= high
        assert row["memory_bytes"] >= 0 and row["weight_bytes"] > 1e6
        assert row["questions_per_second"] == pytest.approx(1 / row["seconds_median"])


def test_rows_say_what_was_looked_at(rows):
    large = {row["system"]: row for row in rows if row["longest_edge"] == 256}
    assert large["dense"]["tiles_mean"] == large["dense-tuned"]["tiles_mean"] == (16 + 12) / 2  # 4 x 4 and 3 x 4 tiles
    assert large["dense-half-resolution"]["tiles_mean"] == 4
    assert large["dense-native-size"]["tiles_mean"] == (16 + 4) / 2 and large["dense-global-only"]["tiles_mean"] == 0
    for name in ("fastv", "visionzip", "divprune", "cdpruner", "qgsa", "qgsa-after-encoder", "qgsa-blocks"):
        assert large[name]["visual_tokens_mean"] == 17
    assert large["qgsa"]["tiles_mean"] == 2 and 0 < large["qgsa-blocks"]["tiles_mean"] <= 2
    assert large["qgsa"]["flops"]["total"] < large["fastv"]["flops"]["total"] < large["dense"]["flops"]["total"]
    assert large["qgsa-blocks"]["flops"]["vision"] < large["qgsa"]["flops"]["vision"]
    assert large["qgsa"]["kv_cache_bytes"] < large["dense"]["kv_cache_bytes"]
    assert large["qgsa"]["overhead"] > 0 and "overhead" not in large["fastv"]


def test_results_tell_of_the_run_and_not_of_the_machines_paths(folder):
    results = json.loads((folder / "results.json").read_text())
    assert results["n"] == 2 and results["settings"]["files"] == "tiny-dense"
    assert str(folder) not in (folder / "results.json").read_text()
    assert set(results["tuning"]) >= {"vision_dtype", "tiles_per_step", "text_dtype"}
    table = (folder / "table.md").read_text()
    assert all(f"| {name} |" in table for name in SYSTEMS) and "Longest edge 128 px" in table
    for name in ("breakdown", "seconds_by_tiles", "seconds_by_size"):
        assert Image.open(folder / f"{name}.png").size[0] > 300


def test_speedups_are_paired_by_image_size():
    def row(system, edge, seconds):
        return {"system": system, "longest_edge": edge, "seconds_median": seconds}

    rows = [row("dense", 512, 4.0), row("dense-tuned", 512, 2.0), row("qgsa", 512, 1.0), row("qgsa", 1024, 1.0)]
    add_speedups(rows)
    assert rows[2]["speedup_vs_dense"] == 4 and rows[2]["speedup_vs_tuned"] == 2
    assert rows[3]["speedup_vs_dense"] is None and rows[3]["speedup_vs_tuned"] is None


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


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="architecture is '1b': choose from 256m, 500m"):
        files_of(BenchmarkArguments(architecture="1b"))
    with pytest.raises(ValueError, match="holds 0 images, 3 are needed"):
        pick_images(str(tmp_path), 3)
    command = [sys.executable, "training/benchmark.py", "--systems", "dense", "magic"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode and "unknown systems magic: choose from dense, " in run.stderr


def test_what_was_not_measured_is_a_dash():
    row = {
        "system": "qgsa", "longest_edge": 512, "visual_tokens_mean": 17.0, "tiles_mean": 2.0,
        "seconds": dict.fromkeys(PARTS, 1.0), "seconds_median": 4.0, "seconds_range": [4.0, 4.0],
        "flops": {"total": 1e12}, "memory_bytes": 1e9, "weight_bytes": 1e9, "kv_cache_bytes": 1e6,
    }  # fmt: skip
    add_speedups([row])
    assert "| – | – | 1.00 | 1.00 + 1.00 | 1.0 |" in format_speed([row], 512)


def test_the_headline_joins_seconds_and_accuracy(rows):
    cards = [
        {
            "system": name,
            "delta_vs_dense_pp": delta,
            "delta_ci95": [delta - 1, delta + 1],
            "visual_tokens_mean": 17,
            "tiles_mean": 1.5,
        }
        for name, delta in (("dense", 0.0), ("qgsa", -0.4), ("qgsa, k = 17", -9.0), ("fastv, k = 17", -30.0))
    ]
    table = format_headline(rows, cards, 256).splitlines()
    ends = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in table[2:]}
    assert set(ends) == set(SYSTEMS)
    assert (
        ends["qgsa"] == "-0.4 [-1.4, +0.6], k 17.0, m 1.50" and ends["fastv"] == "-30.0 [-31.0, -29.0], k 17.0, m 1.50"
    )
    assert ends["dense-tuned"] == ends["cdpruner"] == "–"


def test_of_a_checkpoint_dense_rows_are_dense(processor, make_model, tmp_path, make_image):
    make_model().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    run = BenchmarkArguments(checkpoint=str(tmp_path), files=str(tmp_path), systems=["dense", "qgsa"], device="cpu")
    models = build_models(run, processor)
    runner = Runner("dense", run, models, {"stock": processor, "ours": processor})
    inputs = runner.process([make_image()], 256)
    output = runner.generate(inputs)
    assert "selection" not in output and runner.describe(inputs, None)["tiles_mean"] == 16


@pytest.mark.parametrize("name", ["dense", "fastv", "qgsa", "qgsa-blocks"])
def test_a_batch_is_told_by_the_question(model, processor, make_image, name):
    run = BenchmarkArguments(systems=[name], batch_size=2, tokens=20, new_tokens=3, device="cpu")
    runner = Runner(name, run, {SYSTEMS[name].model: model}, {"stock": processor, "ours": processor})
    images = [make_image(0), make_image(1, 256, 64)]
    alone = []
    for batch in ([images[0]], [images[1]], images):
        inputs = runner.process(batch, 256)
        alone.append(runner.describe(inputs, runner.generate(inputs).get("selection")))
    for key in ("visual_tokens_mean", "tiles_mean", "prompt_tokens"):
        assert alone[2][key] == pytest.approx((alone[0][key] + alone[1][key]) / 2)
    if name in ("qgsa", "qgsa-blocks"):
        total = [one["flops"]["total"] for one in alone]
        assert total[2] == pytest.approx((total[0] + total[1]) / 2, rel=1e-6)
