"""The benchmark as a user runs it, on the tiny architecture, and the tables made from it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from training.benchmark import RENAMED, BenchmarkArguments, base_model_of, main
from training.cli.arguments import parse
from training.costs.meter import PARTS
from training.costs.speed_report import add_speedups, format_headline, format_speed
from training.costs.systems import SYSTEMS, build_models, present_systems
from training.costs.timing import Runner, Workload, pick_images


ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_image):
    """Results of one run of all systems, and the images it asked about."""
    folder = tmp_path_factory.mktemp("speed")
    (folder / "images").mkdir()
    for seed, size in enumerate([(256, 200), (100, 60)]):
        make_image(seed, *size).save(folder / "images" / f"{seed}.png")
    options = ["--base_model", "hub_cards/tiny-dense", "--images", str(folder / "images"), "--repeats", "2"]
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
    assert large["dense"]["tiles_mean"] == large["dense-fast"]["tiles_mean"] == (16 + 12) / 2  # 4 x 4 and 3 x 4 tiles
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
    assert results["n"] == 2 and results["settings"]["base_model"] == "tiny-dense"
    assert str(folder) not in (folder / "results.json").read_text()
    tuning = results["tuning"]
    assert tuning["vision_dtype"] in dict(tuning["seconds_per_tile_and_layer"]["by_dtype"])
    if not torch.cuda.is_available():
        assert tuning["threads"] in dict(tuning["seconds_per_tile_and_layer"]["by_threads"])
        assert results["environment"]["device"] == f"{tuning['threads']} CPU threads"
    assert tuning["text_dtype"] in dict(tuning["seconds_of_1000_tokens"])
    assert tuning["tiles_per_step"] in (1, 4) or torch.cuda.is_available()
    table = (folder / "table.md").read_text()
    assert all(f"| {name} |" in table for name in SYSTEMS) and "Longest edge 128 px" in table
    for name in ("breakdown", "seconds_by_tiles", "seconds_by_size"):
        assert Image.open(folder / f"{name}.png").size[0] > 300


def test_speedups_are_paired_by_image_size():
    def row(system, edge, seconds):
        return {"system": system, "longest_edge": edge, "seconds_median": seconds}

    rows = [row("dense", 512, 4.0), row("dense-fast", 512, 2.0), row("qgsa", 512, 1.0), row("qgsa", 1024, 1.0)]
    add_speedups(rows)
    assert rows[2]["speedup_vs_dense"] == 4 and rows[2]["speedup_vs_fast"] == 2
    assert rows[3]["speedup_vs_dense"] is None and rows[3]["speedup_vs_fast"] is None


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"architecture \(1b\): choose from 256m, 500m"):
        base_model_of(BenchmarkArguments(architecture="1b"))
    with pytest.raises(ValueError, match="must hold at least 3 JPEG or PNG files, .* but has 0"):
        pick_images(str(tmp_path), 3)


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--systems", "dense", "magic"], "systems (magic): unknown; choose from dense, "),
        (["--images", "no/images", "--base_model", "hub_cards/tiny-dense"], "images (no/images): not a folder"),
        (["--architecture", "1b"], "architecture (1b): choose from 256m, 500m"),
        (["--model", "hub_cards/nope"], "hub_cards/nope is neither a local folder nor a Hub id"),
        (["--model", "hub_cards/tiny-dense"], "model (hub_cards/tiny-dense): must be a QGSA checkpoint"),
        (["--repeats", "0"], "repeats (0): must be at least 1"),
        (["--device", "tpu"], "device (tpu): must be cpu, or cuda where a GPU is available"),
        (["--base_model", "hub_cards/nope"], "hub_cards/nope is neither a local folder nor a Hub id"),
    ],
)
def test_user_errors_are_one_line(options, complaint, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert str(stopped.value).startswith(f"error: {complaint}") and "\n" not in str(stopped.value)


def test_the_script_itself_ends_in_one_line():
    command = [sys.executable, "training/benchmark.py", "--systems", "dense", "magic"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "error: systems (magic): unknown; choose from dense, " in run.stderr


def test_a_former_system_name_works_with_a_warning(capsys):
    assert present_systems(["dense", "dense-tuned"]) == ["dense", "dense-fast"]
    assert "dense-tuned is now called dense-fast" in capsys.readouterr().err


def test_former_option_names_still_work(monkeypatch, capsys):
    options = ["--files", "hub_cards/tiny-dense", "--checkpoint=hub_cards/tiny-qgsa"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options])
    run = parse(BenchmarkArguments, "", RENAMED)
    assert (run.base_model, run.model) == ("hub_cards/tiny-dense", "hub_cards/tiny-qgsa")
    assert "--files is now called --base_model" in capsys.readouterr().err


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
    assert ends["dense-fast"] == ends["cdpruner"] == "–"


def test_of_a_checkpoint_dense_rows_are_dense(processor, make_model, tmp_path, make_image):
    make_model().save_pretrained(tmp_path)
    models = build_models(["dense", "qgsa"], str(tmp_path), str(tmp_path), processor.tokenizer, torch.device("cpu"))
    runner = Runner("dense", Workload(), models, {"stock": processor, "ours": processor})
    inputs = runner.process([make_image()], 256)
    output = runner.generate(inputs)
    assert "selection" not in output and runner.describe(inputs, None)["tiles_mean"] == 16


@pytest.mark.parametrize("name", ["dense", "fastv", "qgsa", "qgsa-blocks"])
def test_a_batch_is_described_per_question(model, processor, make_image, name):
    workload = Workload(tokens=20, new_tokens=3)
    runner = Runner(name, workload, {SYSTEMS[name].model: model}, {"stock": processor, "ours": processor})
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
