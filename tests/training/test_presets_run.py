"""Every preset for the published models: a few steps on their architecture, with random weights and little data.

python -m pytest -m slow tests/training/test_presets_run.py        # a minute and a half per preset on two cores
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, List, Value


ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT.parent / "shared" / "checkpoints"
PRESETS = [f"{data}_{size}" for size in ("256m", "500m") for data in ("vqa_rad", "aokvqa", "refcoco")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="the published configurations are not at ../shared"),
]


@pytest.fixture(scope="module")
def images(make_image):
    """Four images that the published processor cuts into one row of four tiles."""
    return [make_image(seed, 1024, 256) for seed in range(4)]


def write_vqa_rad(folder, images):
    (folder / "images").mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(folder / "images" / f"{number}.jpg")
    for name, numbers in (("trainset", (0, 1)), ("testset", (2, 3))):
        rows = [
            {
                "qid": number,
                "image_name": f"{number}.jpg",
                "question": "is it red?",
                "answer": "yes",
                "answer_type": "CLOSED",
            }
            for number in numbers
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))


def write_parquet(folder, splits, images, features, row):
    folder.mkdir(parents=True)
    for split, numbers in splits.items():
        rows = [{"image": images[number], "question_id": str(number), **row} for number in numbers]
        table = Dataset.from_list(
            rows, features=Features({"image": Image(), "question_id": Value("string"), **features})
        )
        table.to_parquet(folder / f"{split}.parquet")


def write_aokvqa(folder, images):
    texts = List(Value("string"))
    features = {
        "question": Value("string"),
        "choices": texts,
        "correct_choice_idx": Value("int64"),
        "direct_answers": texts,
        "difficult_direct_answer": Value("bool"),
    }
    row = {
        "question": "what is it?",
        "choices": ["dog", "cat", "cow", "hen"],
        "correct_choice_idx": 2,
        "direct_answers": ["cow"] * 10,
        "difficult_direct_answer": False,
    }
    write_parquet(folder, {"train": (0, 1), "validation": (2, 3)}, images, features, row)


def write_refcoco(folder, images):
    features = {"answer": List(Value("string")), "bbox": List(Value("float32"))}
    row = {"answer": ["the red block"], "bbox": [100.0, 20.0, 300.0, 200.0]}
    write_parquet(folder, {"val": (0, 1), "test": (2, 3)}, images, features, row)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_and_reports(preset, images, tmp_path):
    data, size = preset.rsplit("_", 1)
    {"vqa_rad": write_vqa_rad, "aokvqa": write_aokvqa, "refcoco": write_refcoco}[data](tmp_path / "data", images)
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "training" / "run_qgsa.py"), "--preset", preset, "--random_weights"),
            *("--base_model", str(CHECKPOINTS / f"smolvlm-{size}-instruct"), "--data_dir", str(tmp_path / "data")),
            *("--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--per_device_train_batch_size", "1"),
            *("--gradient_accumulation_steps", "1", "--complexity_start", "0", "--systems", "dense", "qgsa"),
            *("--max_new_tokens", "2", "--use_cpu", "true"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        cwd=ROOT,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["preset"], results["dataset"], results["n"]) == (preset, data, 2)
    dense, qgsa = results["rows"]
    assert dense["tiles_mean"] == 4 and qgsa["tiles_mean"] <= 4 and dense["scores"]
