"""The training script: presets, the command line, and a whole run in small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

import training.data.aokvqa
from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from training.data.cards import Cards
from training.data.collator import QuestionCollator
from training.data.sets import DATASETS, load_data
from training.learning.trainer import QGSATrainingArguments
from training.standins.dense import parse_stages


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training" / "run_qgsa.py"
PRESETS = sorted(path.stem for path in (ROOT / "training" / "presets").glob("*.yaml"))


@pytest.fixture(scope="module")
def run_qgsa():
    """The script as a module; on import it puts the project in front of the path, which is put back."""
    path = list(sys.path)
    import training.run_qgsa as module

    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def parse(run_qgsa):
    """Parses a command line, presets included, as the script does."""

    def parse_arguments(*arguments):
        preset, rest = run_qgsa.read_preset(list(arguments))
        return preset, *HfArgumentParser((run_qgsa.RunArguments, QGSATrainingArguments)).parse_args_into_dataclasses(
            [*rest, "--use_cpu", "true"]
        )

    return parse_arguments


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


# Presets


def test_the_command_line_wins_over_the_preset(parse):
    _, run, args = parse("--preset", "demo", "--max_steps", "3", "--test_size", "8", "--output_dir", "elsewhere")
    assert (args.max_steps, run.test_size, args.output_dir) == (3, 8, "elsewhere")
    _, run, args = parse("--preset", "demo")
    assert (args.max_steps, run.test_size, args.output_dir) != (3, 8, "elsewhere")


def test_the_preset_wins_over_the_defaults(parse, run_qgsa):
    _, run, _ = parse("--preset", "vqa_rad_256m")
    assert run.dataset == "vqa_rad" != run_qgsa.RunArguments.dataset


@pytest.mark.parametrize("form", [["--preset", "vqa_rad_256m"], ["--preset=vqa_rad_256m"]])
def test_both_forms_of_naming_a_preset(form, run_qgsa):
    name, arguments = run_qgsa.read_preset(["--max_steps", "3", *form, "--seed=4"])
    assert name == "vqa_rad_256m"
    assert arguments[-3:] == ["--max_steps", "3", "--seed=4"]
    assert not any("preset" in argument for argument in arguments)
    assert arguments[arguments.index("--dataset") + 1] == "vqa_rad"


def test_without_a_preset_it_is_the_demo(run_qgsa):
    assert run_qgsa.read_preset([])[0] == "demo"


@pytest.mark.parametrize("name", ["dmeo", "../presets/demo", ""])
def test_an_unknown_preset_names_those_there_are(name, run_qgsa):
    with pytest.raises(SystemExit) as error:
        run_qgsa.read_preset(["--preset", name])
    message = str(error.value)
    assert f"unknown preset {name!r}" in message
    assert all(preset in message for preset in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_understood(name, parse):
    preset, run, args = parse("--preset", name)
    assert preset == name
    assert run.task in ("qgsa", "dense")
    assert (run.eval_split == "validation") == (run.dataset == "aokvqa"), "test but where it is not published"
    assert run.dataset in DATASETS
    assert args.output_dir.startswith("outputs/")
    assert 0 < run.min_visual_tokens <= run.max_visual_tokens
    assert 0 <= run.min_tiles <= run.max_tiles
    assert run.systems.split()[0] == "dense"
    if run.task == "dense" and run.dataset == "cards":
        assert parse_stages(run.words, args.per_device_train_batch_size)
        assert parse_stages(run.pictures, args.per_device_train_batch_size)


def test_data_that_is_not_there(parse):
    for fields, complaint in (
        ({"dataset": "imagenet"}, r"dataset \('imagenet'\): choose from cards, vqa_rad, aokvqa, refcoco"),
        ({"dataset": "aokvqa", "train_split": "test", "data_dir": "."}, "not published"),
        ({"dataset": "cards", "eval_split": "val"}, r"split \('val'\)"),
        ({"dataset": "vqa_rad", "data_dir": "nowhere"}, "folder nowhere not found"),
    ):
        _, run, _ = parse(*(part for name, value in fields.items() for part in (f"--{name}", value)))
        with pytest.raises((ValueError, FileNotFoundError), match=complaint):
            load_data(run, seed=1)


def test_difficult_direct_answers_are_not_asked(parse, monkeypatch):
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
        _, run, _ = parse("--preset", "aokvqa_256m", "--form", form)
        _, test = load_data(run, seed=1)
        asked[form] = list(test)
    assert asked == {"multiple_choice": [0, 1, 2], "direct_answer": [0, 2]}


def test_help_is_printed():
    result = run_script("--help")
    assert result.returncode == 0, result.stderr
    for option in ("--preset", "--base_model", "--max_visual_tokens", "--utility_weight", "--max_steps"):
        assert option in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--preset", "dmeo"], "unknown preset 'dmeo'"), (["--max_stepz", "2"], "max_stepz"), (["--task", "x"], "'x'")],
)
def test_mistakes_on_the_command_line_end_the_script(arguments, complaint, run_qgsa, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run_qgsa.py", "--output_dir", str(tmp_path), "--use_cpu", "true", *arguments])
    with pytest.raises((SystemExit, ValueError), match=complaint):
        run_qgsa.main()


# A whole run


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    output = tmp_path_factory.mktemp("outputs") / "smoke"
    result = run_script(
        *("--preset", "demo", "--base_model", "tiny", "--max_steps", "2", "--test_size", "8", "--use_cpu", "true"),
        *("--per_device_train_batch_size", "2", "--systems", "dense random qgsa", "--output_dir", str(output)),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| qgsa |" in result.stdout and str(output) in result.stdout
    return output


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
    options = ["--max_steps", "2", "--test_size", "4", "--per_device_train_batch_size", "2", "--systems", "dense qgsa"]
    done = run_script("--preset", "blocks", *options, "--use_cpu", "true", "--output_dir", str(output))
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


def test_blocks_do_not_go_with_a_feature_cache(tmp_path):
    done = run_script(
        "--preset", "blocks", "--feature_cache", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "run")
    )
    assert done.returncode and "selection is 'blocks': it takes pixels" in done.stderr
