"""A saved checkpoint in a fresh process that has nothing but transformers."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from modeling_qgsa import QGSAConfig, QGSAProcessor, QGSASmolVLMForConditionalGeneration


CODE = [f"{name}_qgsa.py" for name in ("configuration", "modeling", "processing", "selection", "selector")]

SCRIPT = """
import json
import multiprocessing
import pickle
import sys

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

checkpoint, inputs, image, again = sys.argv[1:]
trust = {"trust_remote_code": True}
inputs = load_file(inputs)
config = AutoConfig.from_pretrained(checkpoint, **trust)
model = AutoModelForImageTextToText.from_pretrained(checkpoint, **trust)
base = AutoModel.from_pretrained(checkpoint, **trust)
multimodal = AutoModelForMultimodalLM.from_pretrained(checkpoint, **trust)
processor = AutoProcessor.from_pretrained(checkpoint, **trust)
model.save_pretrained(again)
processor.save_pretrained(again)
reloaded = AutoModelForImageTextToText.from_pretrained(again, **trust)
pickled, pickled_base = pickle.loads(pickle.dumps((model, base)))
with multiprocessing.get_context("spawn").Pool(1) as pool:
    spawned = pool.apply(model.generate, (), {**inputs, "max_new_tokens": 5}).tolist()

content = [{"type": "image", "image": image}, {"type": "text", "text": "where is the red card?"}]
messages = [{"role": "user", "content": content}]
pipe = pipeline("image-text-to-text", model=checkpoint, **trust)
answer = pipe(text=messages, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
chat = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    report = {
        "classes": {
            name: [type(each).__module__, type(each).__name__]
            for name, each in {
                "config": config,
                "model": model,
                "base": base,
                "multimodal": multimodal,
                "processor": processor,
                "reloaded": reloaded,
            }.items()
        },
        "logits": {
            name: each(**inputs).logits.double().tolist()
            for name, each in {
                "model": model, "multimodal": multimodal, "reloaded": reloaded, "pickled": pickled
            }.items()
        },
        "hidden": base(**inputs).last_hidden_state.double().tolist(),
        "pickled_hidden": pickled_base(**inputs).last_hidden_state.double().tolist(),
        "spawned": spawned,
        "ids": model.generate(**inputs, max_new_tokens=5).tolist(),
        "prompt": sorted(processor.apply_chat_template(messages, **chat)),
        "answer": answer,
        "packages": sorted(name for name in sys.modules if name.split(".")[0] in ("modeling_qgsa", "training")),
    }
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def checkpoint(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def report(checkpoint, batch, make_image, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    save_file({name: value.contiguous() for name, value in batch.items()}, folder / "inputs.safetensors")
    make_image(7, 256, 64).save(folder / "image.png")
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    arguments = [checkpoint, folder / "inputs.safetensors", folder / "image.png", folder / "again"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"again": folder / "again", "stderr": done.stderr}


def test_the_checkpoint_brings_its_code(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert set(CODE) <= names
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    for reference in auto_map.values():
        assert f"{reference.split('.')[0]}.py" in names
    processor = json.loads((checkpoint / "processor_config.json").read_text())
    assert processor["auto_map"]["AutoProcessor"] == "processing_qgsa.QGSAProcessor"


def test_classes_come_from_the_checkpoint_and_not_from_the_package(report):
    names = {name: reported[1] for name, reported in report["classes"].items()}
    assert names == {
        "config": "QGSAConfig",
        "model": "QGSASmolVLMForConditionalGeneration",
        "base": "QGSASmolVLMModel",
        "multimodal": "QGSASmolVLMForConditionalGeneration",
        "processor": "QGSAProcessor",
        "reloaded": "QGSASmolVLMForConditionalGeneration",
    }
    assert all(module.startswith("transformers_modules.") for module, _ in report["classes"].values())
    assert report["packages"] == []


@pytest.mark.parametrize("name", ["model", "multimodal", "reloaded", "pickled"])
def test_logits_are_equal(name, report, model, batch):
    with torch.no_grad():
        expected = model(**batch).logits
    real = batch["attention_mask"] > 0
    assert torch.allclose(torch.tensor(report["logits"][name])[real], expected[real], atol=1e-5)


def test_hidden_states_of_the_base_model_are_equal(report, model, batch):
    with torch.no_grad():
        expected = model.model(**batch).last_hidden_state
    real = batch["attention_mask"] > 0
    assert torch.allclose(torch.tensor(report["hidden"])[real], expected[real], atol=1e-5)
    assert report["pickled_hidden"] == report["hidden"]


def test_generated_ids_are_equal(report, model, batch):
    assert report["ids"] == model.generate(**batch, max_new_tokens=5).tolist()


def test_a_spawned_process_generates_alike(report):
    assert report["spawned"] == report["ids"]


def test_the_pipeline_answers(report, model, prepare, tokenizer, make_image):
    inputs = prepare(("where is the red card?", [make_image(7, 256, 64)]))
    ids = model.generate(**inputs, max_new_tokens=4)[0, -4:]
    assert report["answer"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_chat_template_gives_a_question_mask(report):
    assert "question_mask" in report["prompt"] and "pixel_values" in report["prompt"]


def test_saving_again_brings_the_code_again(report, checkpoint):
    for name in CODE:
        assert (report["again"] / name).read_text() == (checkpoint / name).read_text()
    again, first = (json.loads((folder / "config.json").read_text()) for folder in (report["again"], checkpoint))
    assert again["auto_map"] == first["auto_map"]


def test_loading_without_trust_is_refused(checkpoint):
    ask = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(checkpoint)!r})"
    done = subprocess.run([sys.executable, "-I", "-c", ask], capture_output=True, text=True, input="n\n")
    assert done.returncode != 0 and "trust_remote_code=True" in done.stderr


def test_with_the_package_imported_no_code_of_a_checkpoint_is_needed_or_run(checkpoint, tmp_path):
    hostile = shutil.copytree(checkpoint, tmp_path / "hostile")
    for path in hostile.glob("*_qgsa.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = AutoConfig.from_pretrained(hostile)
    model = AutoModelForImageTextToText.from_pretrained(hostile)
    processor = AutoProcessor.from_pretrained(hostile)
    assert type(config) is QGSAConfig and type(processor) is QGSAProcessor
    assert type(model) is QGSASmolVLMForConditionalGeneration
    assert not (tmp_path / "ran").exists()
