"""The training script: its command line, and a whole run on a small scale."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import training.data.aokvqa
import training.run_qgsa as run_qgsa
from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from training.cli.presets import as_options, load_presets
from training.data.cards import Cards
from training.data.collator import QuestionCollator
from training.data.sets import load_data


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training" / "run_qgsa.py"


def parse(*arguments):
    """The preset's name, the groups and the training arguments of a command line."""
    return run_qgsa.parse([*arguments, "--use_cpu", "true"])


def run_script(*arguments, **environment):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=300,
    )


# Arguments


def test_data_that_is_not_there():
    for fields, complaint in (
        ({"dataset": "imagenet"}, r"dataset \('imagenet'\): choose from cards, vqa_rad, aokvqa, refcoco"),
        ({"dataset": "aokvqa", "train_split": "test", "data_dir": "."}, "not published"),
        ({"dataset": "cards", "eval_split": "val"}, r"split \('val'\)"),
        ({"dataset": "vqa_rad", "data_dir": "nowhere"}, "folder nowhere not found"),
    ):
        _, _, _, data, *_ = parse(*as_options(fields))
        with pytest.raises((ValueError, FileNotFoundError), match=complaint):
            load_data(data, seed=1)


def test_difficult_direct_answers_are_not_asked(monkeypatch):
    class Rows(torch.utils.data.Dataset):
        def __init__(self, data_dir, split, form):
            self.rows = [{"form": form, "difficult": difficult} for difficult in (False, True, False)]

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return index

    monkeypatch.setattr(training.data.aokvqa, "load_aokvqa", Rows)
    asked = {}
    for form in ("multiple_choice", "direct_answer"):
        _, _, _, data, *_ = parse("--preset", "aokvqa_256m", "--form", form)
        _, test = load_data(data, seed=1)
        asked[form] = list(test)
    assert asked == {"multiple_choice": [0, 1, 2], "direct_answer": [0, 2]}


def test_help_shows_our_options_by_group_on_a_few_screens():
    result = run_script("--help", COLUMNS="80")
    assert result.returncode == 0, result.stderr
    groups = {line.removesuffix(":") for line in result.stdout.splitlines() if re.fullmatch(r"[a-z ]+:", line)}
    assert groups >= {"task", "model", "data", "selection", "evaluation", "features of frozen networks", "losses"}
    shown = set(re.findall(r"^  (--\w+)", result.stdout, re.MULTILINE))
    assert shown >= {"--preset", "--task", "--base_model", "--systems", "--max_visual_tokens", "--utility_weight"}
    assert not shown & {"--max_steps", "--push_to_hub", "--words"}
    assert "transformers.TrainingArguments" in result.stdout and "--help_all" in result.stdout
    assert len(result.stdout.splitlines()) < 120


def test_help_all_shows_the_options_of_trainer_too():
    result = run_script("--help_all")
    assert result.returncode == 0, result.stderr
    for option in ("--preset", "--base_model", "--max_visual_tokens", "--utility_weight", "--max_steps", "--bf16"):
        assert f"  {option}" in result.stdout


MISTAKES = [
    (["--preset", "dmeo"], "unknown preset 'dmeo': choose from aokvqa_256m"),
    (["--preset", "tiny_dense"], "preset 'tiny_dense' belongs to another script: run_stand_in.py"),
    (["--max_stepz", "2"], "unknown option --max_stepz: did you mean --max_steps?"),
    (["--words", "2x2:16"], "option --words belongs to another script: run_stand_in.py"),
    (["--longest_edge=512"], "option --longest_edge belongs to another script: run_stand_in.py"),
    (["--max_tiles", "many"], "--max_tiles"),
    (["--task", "x"], "task ('x'): choose from train, evaluate"),
    (["--task", "dense"], "task ('dense'): now a script of its own. Use python training/run_stand_in.py"),
    (["--systems", "dense", "qgsa", "clip"], "systems (clip): unknown; choose from dense, "),
    (["--systems", "qgsa"], "must include dense and qgsa"),
    (["--dataset", "imagenet"], "dataset ('imagenet')"),
    (["--dataset", "vqa_rad", "--data_dir", "nowhere"], "folder nowhere not found"),
    (["--base_model", "hub_cards/nope"], "hub_cards/nope is neither a local folder nor a Hub id"),
    (["--base_model", ""], "base_model (None): required. Name a Hub id or a folder with --base_model"),
    (["--selection", "everything"], "everything"),
    (["--max_tiles", "-1"], "max_tiles"),
    (["--quantization", "2bit"], "quantization ('2bit'): choose from none, 4bit, 8bit"),
    (["--lora_targets", "nothing"], "lora_targets ('nothing'): it must match at least one of the model's"),
    (["--lora_targets", "(q_proj"], "lora_targets ('(q_proj'): not a regular expression, missing )"),
    (["--patch_word_weight", "1", "--clip_model", ""], "clip_model (None): patch_word_weight needs one"),
    (["--warmup_steps", "-3"], "warmup_steps"),
]


@pytest.mark.parametrize(("arguments", "complaint"), MISTAKES)
def test_mistakes_end_the_script_with_one_line(arguments, complaint, monkeypatch, tmp_path):
    options = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--train_size", "64", "--test_size", "8"]
    monkeypatch.setattr(sys, "argv", ["run_qgsa.py", *options, *arguments])
    with pytest.raises(SystemExit) as end:
        run_qgsa.main()
    message = str(end.value)
    assert message.startswith("error: ") and complaint in message
    assert "\n" not in message


@pytest.mark.parametrize(("arguments", "complaint"), [MISTAKES[0], MISTAKES[2], MISTAKES[4]])
def test_mistakes_leave_one_line_on_stderr_and_an_exit_status(arguments, complaint):
    done = run_script(*arguments)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and complaint in line
    assert not done.stdout


def test_other_processes_name_themselves():
    done = run_script("--preset", "dmeo", RANK="1")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1 and line.startswith("error in process 1: unknown preset")


def test_the_folder_of_another_run_is_refused_in_one_line(monkeypatch, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"max_tiles": 3}))
    monkeypatch.setattr(sys, "argv", ["run_qgsa.py", "--output_dir", str(tmp_path), "--use_cpu", "true"])
    with pytest.raises(SystemExit, match=r"^error: output_dir \(.*\): it belongs to a run with "):
        run_qgsa.main()
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["run.json"]


def test_the_former_name_of_the_task_still_works(capsys):
    assert parse("--task", "qgsa")[1].task == "train"
    assert "--task qgsa is now called --task train" in capsys.readouterr().err


@pytest.mark.parametrize("systems", [["dense qgsa"], ["dense", "qgsa"], ["dense ", " qgsa random"]])
def test_systems_are_a_list_or_one_string(systems):
    *_, evaluation, _, _ = parse("--systems", *systems)
    assert evaluation.systems == " ".join(systems).split()


# A whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished process, and its output folder: the demo as `make demo` runs it, on a machine without a GPU."""
    output = tmp_path_factory.mktemp("outputs") / "smoke"
    result = run_script(
        *("--preset", "demo", "--base_model", "tiny", "--max_steps", "2", "--test_size", "8"),
        *("--per_device_train_batch_size", "2", "--systems", "dense", "random", "qgsa", "--output_dir", str(output)),
        CUDA_VISIBLE_DEVICES="",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result, output


@pytest.fixture(scope="module")
def output(finished):
    return finished[1]


def test_a_run_prints_its_table_and_folder_and_no_warning(finished):
    result, output = finished
    assert "| qgsa |" in result.stdout and str(output) in result.stdout
    said = [line for line in (result.stdout + result.stderr).splitlines() if re.search("warn|deprecat", line, re.I)]
    assert said == []


def test_a_run_leaves_results_card_and_figures(output):
    results = json.loads((output / "results.json").read_text())
    assert (results["preset"], results["dataset"], results["n"], results["seed"]) == ("demo", "cards", 8, 1)
    assert [row["system"] for row in results["rows"]] == ["dense", "random", "qgsa"]
    card = (output / "README.md").read_text()
    for row in results["rows"]:
        assert f"| {row['system']} | {row['accuracy']:.1%} |" in card
        assert f"| {row['flops']['total'] / 1e9:.2f} |" in card
    assert "--max_steps 2" in card
    for figure in ("accuracy", "selections"):
        with Image.open(output / "figures" / f"{figure}.png") as image:
            image.verify()


def test_a_run_leaves_a_checkpoint_with_its_code(output):
    code = {"configuration_qgsa.py", "modeling_qgsa.py", "processing_qgsa.py", "selection_qgsa.py", "selector_qgsa.py"}
    files = {path.name for path in output.iterdir()}
    assert code | {"config.json", "model.safetensors", "tokenizer.json"} <= files
    config = json.loads((output / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"] == "modeling_qgsa.QGSASmolVLMForConditionalGeneration"
    assert (config["min_visual_tokens"], config["max_visual_tokens"]) == (8, 60)

    model = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True).eval()
    assert model.config.use_cache is True
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    inputs = QuestionCollator(processor, with_answer=False)([Cards("test", 1)[0]])
    with torch.no_grad():
        selection = model(**inputs).selection
    assert 8 <= selection.visual_tokens.item() <= 60
    ids = model.generate(**inputs, max_new_tokens=3)
    assert ids.shape[1] > inputs["input_ids"].shape[1]


def test_a_run_saves_what_it_resumes_from(output):
    assert (output / "checkpoint-2" / "trainer_state.json").is_file()
    assert json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


def test_a_run_with_blocks_adapts_the_encoder_too(tmp_path):
    """The adapters are merged: what is saved is a checkpoint like any other, that looks at blocks by itself."""
    output = tmp_path / "blocks"
    adapted = load_presets()["blocks"]["lora_targets"]
    # That preset sets a quantile; this one leaves it to the checkpoint.
    options = ["--preset", "canvases", "--selection", "blocks", "--lora_targets", adapted]
    options += "--max_steps 2 --test_size 4 --per_device_train_batch_size 2 --systems dense qgsa".split()
    options += ["--use_cpu", "true", "--output_dir", str(output)]
    done = run_script(*options)
    assert done.returncode == 0, done.stderr[-2000:]
    model = QGSASmolVLMForConditionalGeneration.from_pretrained(output)
    dense = AutoModelForImageTextToText.from_pretrained(ROOT / "hub_cards" / "tiny-dense")
    assert model.config.selection == "blocks"
    trained, before = model.state_dict(), dense.state_dict()
    for name in (
        "model.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.text_model.layers.0.self_attn.q_proj.weight",
    ):
        assert not torch.equal(trained[name], before[name]), name
    kept = "model.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(trained[kept], before[kept])
    spent = []
    model.config.complexity_quantile = 0.01  # without the option, that of the checkpoint counts
    model.config.save_pretrained(output)
    for quantile in (["--complexity_quantile", "0.01"], ["--complexity_quantile", "1"], []):
        done = run_script(*options, "--task", "evaluate", *quantile)
        assert done.returncode == 0, done.stderr[-2000:]
        spent.append(json.loads((output / "results.json").read_text())["rows"][-1]["visual_tokens_mean"])
    assert spent[0] == spent[2] < spent[1] == 60


def test_blocks_do_not_go_with_a_feature_cache(tmp_path):
    done = run_script(
        "--preset", "blocks", "--feature_cache", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "run")
    )
    assert done.returncode == 1 and "selection is 'blocks' and needs pixels" in done.stderr


def test_calibration_needs_no_training(tmp_path):
    """The whole task on a small scale, then again: what was observed is read, and the result is the same."""
    options = "--task calibrate --calibration_size 20 --target_loyalty 0.6 --test_size 4 --use_cpu true"
    arguments = [
        *options.split(),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    first = run_script(*arguments)
    assert first.returncode == 0, first.stderr
    output = tmp_path / "run"
    model = QGSASmolVLMForConditionalGeneration.from_pretrained(output)
    assert model.config.pointer == "attention" and model.config.calibration["samples"] == 20
    rows = json.loads((output / "results.json").read_text())["rows"]
    controls = ["dense-global-only", "blank-image", "random", "centre"]
    assert [row["system"] for row in rows] == ["dense", *controls, "qgsa", "qgsa-attention"]
    assert rows[-1]["tiles_mean"] == 4 and rows[-1]["visual_tokens_mean"] == 80
    card = (output / "README.md").read_text()
    assert "It was calibrated on 20 questions without their answers." in card
    assert len(list((output / "observations").glob("*.pt"))) == 20
    recorded = (output / "run.json").read_text()
    alone = run_script("--task", "evaluate", *arguments[6:], "--systems", "dense", "qgsa")
    assert alone.returncode == 0, alone.stderr
    assert [row["system"] for row in json.loads((output / "results.json").read_text())["rows"]] == ["dense", "qgsa"]
    assert (output / "run.json").read_text() == recorded
    second = run_script(*arguments)
    assert second.returncode == 0, second.stderr
    again = QGSASmolVLMForConditionalGeneration.from_pretrained(output)
    assert again.config.calibration == model.config.calibration
    other = run_script(*[each.replace("0.6", "0.7") for each in arguments])
    assert other.returncode == 1 and "target_loyalty 0.6, but this run has 0.7" in other.stderr


def test_calibration_has_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folders = []
    monkeypatch.setattr(run_qgsa, "run", lambda *given: folders.append(given[-1].output_dir))
    monkeypatch.setattr(sys, "argv", ["run_qgsa.py", "--task", "calibrate", "--use_cpu", "true"])
    run_qgsa.main()
    assert folders == ["outputs/demo_calibrated"]
