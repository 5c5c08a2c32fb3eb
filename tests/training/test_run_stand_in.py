"""The stand-in's training script: its command line, and a whole run on a small scale."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

import training.run_stand_in as run_stand_in
from modeling_qgsa import QGSASmolVLMForConditionalGeneration


ROOT = Path(__file__).parents[2]
SMALL = {
    "max_steps": 1,
    "words": "2x2:2",
    "tower_samples": 64,
    "pictures": "2x2:2",
    "validation_size": 4,
    "test_size": 8,
    "per_device_train_batch_size": 2,
    "eval_strategy": "no",
    "use_cpu": "true",
}


def run_script(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "training" / "run_stand_in.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
        cwd=ROOT,
        timeout=300,
    )


def test_help_shows_the_options_of_the_stand_in_only():
    result = run_script("--help", COLUMNS="80")
    assert result.returncode == 0, result.stderr
    shown = set(re.findall(r"^  (--\w+)", result.stdout, re.MULTILINE))
    assert shown >= {"--preset", "--words", "--longest_edge", "--dataset", "--max_new_tokens", "--help_all"}
    assert not shown & {"--base_model", "--lora_rank", "--systems", "--utility_weight", "--max_steps"}
    assert "small_dense, tiny_dense, tiny_dense_vqa_rad" in " ".join(result.stdout.split())
    assert len(result.stdout.splitlines()) < 80


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--preset", "dmeo"], "unknown preset 'dmeo': choose from small_dense, tiny_dense, tiny_dense_vqa_rad"),
        (["--preset", "vqa_rad_256m"], "preset 'vqa_rad_256m' belongs to another script: run_qgsa.py"),
        (["--validation_sise", "2"], "unknown option --validation_sise: did you mean --validation_size?"),
        (["--systems", "dense"], "unknown option --systems"),
        (["--longest_edge", "wide"], "--longest_edge"),
        (["--dataset", "imagenet"], "dataset ('imagenet')"),
        (["--dataset", "vqa_rad", "--data_dir", "nowhere"], "folder nowhere not found"),
        (["--words", "2x2"], "'2x2'"),
        (["--size", "huge"], "size ('huge'): must be tiny or small"),
        (["--preset", "small_dense", "--glimpses", "2x2"], "'2x2'"),
    ],
)
def test_mistakes_end_the_script_with_one_line(arguments, complaint, monkeypatch, tmp_path):
    options = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--train_size", "64", "--test_size", "8"]
    monkeypatch.setattr(sys, "argv", ["run_stand_in.py", *options, *arguments])
    with pytest.raises(SystemExit) as end:
        run_stand_in.main()
    message = str(end.value)
    assert message.startswith("error: ") and complaint in message
    assert "\n" not in message


def test_the_folder_of_another_run_is_refused_in_one_line(monkeypatch, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"words": "1x1:16"}))
    monkeypatch.setattr(sys, "argv", ["run_stand_in.py", "--output_dir", str(tmp_path), "--use_cpu", "true"])
    with pytest.raises(SystemExit, match=r"^error: output_dir \(.*\): it belongs to a run with "):
        run_stand_in.main()


def test_a_run_leaves_a_checkpoint_with_results_and_card(tmp_path):
    output = tmp_path / "stand-in"
    arguments = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    done = run_script("--preset", "tiny_dense", *arguments, "--output_dir", str(output))
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((output / "results.json").read_text())
    assert (results["preset"], results["dataset"], results["n"]) == ("tiny_dense", "cards", 8)
    assert [row["system"] for row in results["rows"]] == ["dense"]
    assert "python training/run_stand_in.py --preset tiny_dense" in (output / "README.md").read_text()
    identity = json.loads((output / "run.json").read_text())
    assert identity["words"] == "2x2:2" and "base_model" not in identity
    model = AutoModelForImageTextToText.from_pretrained(output)
    assert model.config.use_cache is True
    processor = AutoProcessor.from_pretrained(output, backend="pil")
    assert processor.image_seq_len == 16
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "why?"}]}]
    assert processor.apply_chat_template(asked, add_generation_prompt=True).endswith(
        "why?<end_of_utterance>\nAssistant:"
    )


def test_the_small_stand_in_has_results_per_canvas(tmp_path):
    output = tmp_path / "small"
    changes = {"glimpses": "2x2:2", "pictures": "2x2:4", "max_steps": 2, "test_size": 12}
    arguments = [part for name, value in (SMALL | changes).items() for part in (f"--{name}", str(value))]
    done = run_script("--preset", "small_dense", *arguments, "--output_dir", str(output))
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((output / "results.json").read_text())
    rows = results["rows"]
    assert (results["preset"], results["split"]) == ("small_dense", "test")
    assert [row["canvas"] for row in rows] == ["4x4", "4x4", "3x4", "4x3", "2x4", "4x2"]
    assert [row.get("families") for row in rows] == [None] + ["all"] * 5
    assert sum(family["n"] for family in rows[2]["by_family"].values()) == 12
    model = AutoModelForImageTextToText.from_pretrained(output)
    assert model.config.text_config.num_hidden_layers == 12
    assert QGSASmolVLMForConditionalGeneration.from_dense(str(output)).config.text_config.num_hidden_layers == 12
