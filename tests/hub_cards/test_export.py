"""Exported folders are complete, load without this project, and appear whole or not at all."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import export
import pytest
import torch
import write_cards
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, Idefics3Processor

from modeling_qgsa import QGSAConfig, QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.evaluation.card import pointer_share


ROOT = Path(__file__).parents[2]
TINY = ROOT / "hub_cards" / "tiny-qgsa"
DENSE = ROOT / "hub_cards" / "tiny-dense"
CHECKPOINTS = ROOT.parent / "shared" / "checkpoints"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")


def arguments(*given):
    return HfArgumentParser(export.ExportArguments).parse_args_into_dataclasses(list(map(str, given)))[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    results = ROOT / "hub_cards" / "results" / "cards.json"
    for name, options in {
        "qgsa": ["--model", TINY, "--results", results, "--repo_id", "org/qgsa-tiny"],
        "idefics3": ["--model", TINY, "--format", "idefics3"],
        "smolvlm": ["--model", TINY, "--format", "smolvlm"],
        "fresh": ["--model", DENSE],
    }.items():
        export.export(arguments(*options, "--output_dir", folder / name))
    return folder


@pytest.fixture(scope="module")
def tiny():
    return QGSASmolVLMForConditionalGeneration.from_pretrained(TINY).eval()


@pytest.fixture(scope="module")
def question(make_image):
    processor = QGSAProcessor.from_pretrained(TINY, backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": "how many cards are there?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=prompt, images=[make_image(3)], return_tensors="pt")


def test_the_folder_is_complete(folders):
    names = {path.name for path in (folders / "qgsa").iterdir()}
    code = {path.name for path in (ROOT / "modeling_qgsa").glob("*_qgsa.py")}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json", "results.json"}
    assert names == {*code, *wanted, *TOKENIZER, "README.md", "LICENSE", "figures"}
    for path in (folders / "qgsa").glob("*_qgsa.py"):
        assert path.read_text() == (ROOT / "modeling_qgsa" / path.name).read_text()


@pytest.mark.parametrize("name", ["qgsa", "idefics3", "smolvlm"])
def test_tokenizer_and_preprocessor_are_copied_verbatim(name, folders):
    for file in TOKENIZER:
        assert (folders / name / file).read_bytes() == (TINY / file).read_bytes()


@pytest.mark.parametrize("name", ["qgsa", "idefics3", "smolvlm", "fresh"])
def test_generation_stops_at_the_end_of_an_utterance(name, folders, tiny):
    config = json.loads((folders / name / "generation_config.json").read_text())
    assert config["eos_token_id"] == tiny.config.end_of_utterance_token_id


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_plain_exports_have_the_logits_of_dense(name, folders, tiny, question):
    model = AutoModelForImageTextToText.from_pretrained(folders / name).eval()
    processor = AutoProcessor.from_pretrained(folders / name)
    assert model.config.model_type == name and type(processor) is Idefics3Processor
    assert not [weight for weight, _ in model.named_parameters() if "selector" in weight]
    stock = {key: value for key, value in question.items() if key != "question_mask"}
    with torch.no_grad():
        assert torch.equal(model(**stock).logits, tiny(**question, selection="dense").logits)


def test_legacy_config_fields_are_written(folders):
    for name in ("qgsa", "idefics3"):
        text = json.loads((folders / name / "config.json").read_text())["text_config"]
        assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] and text["rope_scaling"] is None
        assert text["architectures"] == ["LlamaForCausalLM"]


def test_a_dense_checkpoint_points_with_its_attention_and_has_a_card_that_says_so(folders):
    card = (folders / "fresh" / "README.md").read_text()
    assert "points with its own attention, without training" in card and "model-index" not in card
    config = json.loads((folders / "fresh" / "config.json").read_text())
    assert config["model_type"] == "qgsa_smolvlm"


def test_the_card_of_an_export_names_its_repository(folders):
    card = ModelCard.load(folders / "qgsa" / "README.md")
    assert 'from_pretrained("org/qgsa-tiny", trust_remote_code=True)' in card.text
    assert {result.metric_type for result in card.data.eval_results} >= {"accuracy", "visual_tokens_mean"}


def test_a_trained_checkpoint_without_results_says_that_nothing_was_measured(tmp_path):
    export.export(arguments("--model", TINY, "--output_dir", tmp_path / "bare"))
    card = (tmp_path / "bare" / "README.md").read_text()
    assert "own attention" not in card and "## Accuracy\n\nNot measured.\n" in card and "table above" not in card


def test_an_old_checkpoint_gets_the_ids_that_it_was_saved_without(tmp_path):
    old = shutil.copytree(TINY, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    known = config.pop("assistant_token_ids")
    (old / "config.json").write_text(json.dumps(config))
    export.export(arguments("--model", old, "--output_dir", tmp_path / "new"))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["assistant_token_ids"] == known


def test_a_folder_with_files_is_left_untouched(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be empty or not exist"):
        export.export(arguments("--model", TINY, "--output_dir", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--model", TINY, "--format", "gguf"], r"format \('gguf'\)"),
        (["--model", TINY, "--processor", ROOT / "hub_cards" / "results"], "no tokenizer_config.json"),
        (["--model", TINY, "--processor", "no/such/folder"], "no/such/folder is neither a local folder nor a Hub id"),
        (["--model", TINY, "--results", "no.json"], "no.json"),
    ],
)
def test_a_failed_export_leaves_no_folder(options, complaint, tmp_path):
    with pytest.raises((OSError, ValueError), match=complaint):
        export.export(arguments(*options, "--output_dir", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_the_script_reports_errors_in_one_line(tmp_path):
    command = [sys.executable, ROOT / "hub_cards" / "export.py", "--model", TINY, "--output_dir", tmp_path / "out"]
    done = subprocess.run([*map(str, command), "--format", "gguf"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: format ('gguf') must be one of qgsa, onnx, idefics3, smolvlm" in done.stderr


def test_former_option_names_still_work_with_a_warning(tmp_path):
    command = [sys.executable, ROOT / "hub_cards" / "export.py", "--base_model", TINY, "--output", tmp_path / "out"]
    command += ["--files", ROOT / "hub_cards" / "results"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 1 and "no tokenizer_config.json" in done.stderr and "Traceback" not in done.stderr
    for former, present in export.RENAMED.items():
        assert f"{former} is now called {present}" in done.stderr


@pytest.mark.parametrize("size", ["256m", "500m"])
@pytest.mark.slow
def test_published_architectures_are_exported(size, tmp_path):
    base = CHECKPOINTS / f"smolvlm-{size}-instruct"
    if not base.exists():
        pytest.skip(f"no {base.name}: its files are not part of the repository")
    output = tmp_path / f"qgsa-smolvlm-{size}"
    export.export(arguments("--model", base, "--random_weights", "--output_dir", output))
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == 49279
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json"):
        assert (output / name).read_bytes() == (base / name).read_bytes()
    card = ModelCard.load(output / "README.md")
    assert card.data.base_model is None and not card.data.eval_results
    assert f"random weights of {base.name}" in card.text
    config = QGSAConfig.from_pretrained(output)
    assert pointer_share(config) == pointer_share(write_cards.published_config(size))
    model = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True)
    assert model.config.text_config.rope_parameters["rope_theta"] == 100000


def test_the_snippet_of_the_card_answers(folders, make_image):
    card = (folders / "qgsa" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    scope = {"image": make_image(3), "question": "how many cards are there?"}
    exec(code.replace("org/qgsa-tiny", str(folders / "qgsa")), scope)
    assert scope["answer"].strip()
