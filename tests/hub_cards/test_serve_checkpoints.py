"""Checkpoints that hub_cards/serve.py refuses in one line, before anything is built."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from serve import ServeArguments, load, load_served
from serve_checkpoints import load_pair

from modeling_qgsa import GuidedVLM, QGSASmolVLMForConditionalGeneration


NAME = "hub_cards/tiny-qgsa"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A copy of the checkpoint without its weights."""
    shutil.copytree(NAME, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "model"


@pytest.fixture(scope="module")
def weights():
    return load_file(f"{NAME}/model.safetensors")


def write_index(folder, shards):
    """An index of `{file name: names of weights}`."""
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit(folder, **fields):
    """Change fields of the configuration; `text_config={...}` changes some of those inside."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        config[name] = config[name] | value if isinstance(config.get(name), dict) else value
    (folder / "config.json").write_text(json.dumps(config))


def test_a_loaded_checkpoint_is_that_of_from_pretrained():
    model, stock = load(NAME)[0], QGSASmolVLMForConditionalGeneration.from_pretrained(NAME).eval()
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(one, other) for one, other in zip(model.state_dict().values(), stock.state_dict().values()))
    assert model.generation_config.to_dict() == stock.generation_config.to_dict()
    assert (model.name_or_path, model.dtype, model.training) == (NAME, stock.dtype, False)
    assert model.config.to_dict() == stock.config.to_dict()


def test_shards_are_loaded(folder, weights):
    names = sorted(weights)
    shards = {"model-1.safetensors": names[:90], "model-2.safetensors": names[90:]}
    for shard, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / shard)
    write_index(folder, shards)
    model = load(str(folder))[0]
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), load(NAME)[0].parameters()))


def test_an_index_names_safetensors_beside_it_only(folder, weights, tmp_path):
    torch.save(weights, folder / "weights.bin")
    save_file(weights, tmp_path / "model.safetensors")
    outside = [
        "../model.safetensors",
        str(tmp_path / "model.safetensors"),
        "a/../../model.safetensors",
        "..\\a.safetensors",
    ]
    for shard in ["weights.bin", "weights.pt", ".safetensors", *outside]:
        write_index(folder, {shard: weights})
        with pytest.raises(ValueError, match=f"{INDEX} names .*: must be a .safetensors file beside it"):
            load(str(folder))


def test_no_other_file_is_loaded(folder, weights):
    """Neither what the configuration names, nor adapters, nor checkpoints of several processes, which are pickles."""
    torch.save(weights, folder / "adapter_model.bin")
    (folder / ".metadata").write_bytes(b"a pickle")
    save_file(weights, folder / "other.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other", "peft_type": "LORA"}')
    for named in ("adapter_model.bin", "other.safetensors"):
        edit(folder, transformers_weights=named)
        with pytest.raises(OSError, match="has no model.safetensors: other formats than safetensors are not loaded"):
            load(str(folder))
    shutil.copy(f"{NAME}/model.safetensors", folder)
    assert not load(str(folder))[0]._hf_peft_config_loaded


def test_a_pair_is_checked_too(tmp_path):
    model, processor = load(NAME)
    GuidedVLM(model, model, processor).save_pretrained(tmp_path)
    assert load_pair(str(tmp_path)).guidance.exit_threshold is None
    for part in ("guide", "target"):
        weights = load_file(tmp_path / part / "model.safetensors")
        (tmp_path / part / "model.safetensors").rename(tmp_path / "kept")
        torch.save(weights, tmp_path / part / "weights.bin")
        write_index(tmp_path / part, {"weights.bin": weights})
        with pytest.raises(ValueError, match="must be a .safetensors file beside it"):
            load_served(ServeArguments(model=str(tmp_path)))
        (tmp_path / "kept").rename(tmp_path / part / "model.safetensors")
    (tmp_path / "guidance.json").write_text('{"threshold": 1}')
    with pytest.raises(ValueError, match="cannot be loaded: .*threshold"):
        load_served(ServeArguments(model=str(tmp_path)))


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"text_config": {"num_hidden_layers": 10**6}},
            r"num_hidden_layers \(1000000\) of config.json exceeds the 180",
        ),
        ({"vision_config": {"num_hidden_layers": 10**6}}, r"num_hidden_layers \(1000000\) of config.json exceeds"),
        ({"selector_layers": 10**6}, r"selector_layers \(1000000\) of config.json exceeds the 180 tensors"),
        ({"text_config": {"num_hidden_layers": 7}}, r"layers.6.* is missing in the weights"),
        (
            {"text_config": {"intermediate_size": 10**9}},
            r"shape \[384, 128\] .* but \[1000000000, 128\] by config.json",
        ),
        (
            {"text_config": {"vocab_size": 10**12}},
            r"has the shape \[448, 128\] in the weights, but \[1000000000000, 128\]",
        ),
        ({"vision_config": {"image_size": 2**20}}, "has the shape .* by config.json"),
        ({"complexity_levels": 10**9}, "has the shape .* by config.json"),
        ({"text_config": {"hidden_size": "128"}}, "hidden_size"),
        ({"text_config": {"model_type": "none"}}, "none"),
        ({"text_config": {"num_attention_heads": 0}}, "cannot be loaded: ZeroDivisionError"),
    ],
)
def test_configurations_that_do_not_match(fields, message, folder):
    shutil.copy(f"{NAME}/model.safetensors", folder)
    edit(folder, **fields)
    started = time.perf_counter()
    with pytest.raises((ValueError, OSError, StrictDataclassError), match=message):
        load(str(folder))
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", b'{"model_type":"qgsa_smolvlm","a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        ("config.json", b'{"model_type":"qgsa_smolvlm","a":' + b'{"a":' * 900 + b"1" + b"}" * 901),
        ("config.json", b"[]"),
        ("config.json", b"{"),
        ("config.json", b"\xff"),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", b"\x02" + bytes(7) + b"{}"),
        (INDEX, b"[]"),
        (INDEX, b'{"weight_map": 1}'),
        (INDEX, b'{"weight_map": {"a": 1}}'),
        (INDEX, b"[" * 10**5),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"[]"),
        ("preprocessor_config.json", b"[]"),
        ("generation_config.json", b"[]"),
    ],
)
def test_broken_files(name, content, folder):
    if name != INDEX:
        shutil.copy(Path(NAME, "model.safetensors"), folder)
    (folder / name).write_bytes(content)
    with pytest.raises((ValueError, OSError)) as raised:
        load(str(folder))
    assert str(raised.value).strip()


def test_cut_weights(folder):
    (folder / "model.safetensors").write_bytes(Path(NAME, "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be loaded: SafetensorError"):
        load(str(folder))
