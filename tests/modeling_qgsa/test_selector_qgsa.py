"""The selector under tools that act on module calls (adapters, offloading, quantization); weights of version 0.2."""

import re

import pytest
import torch
from accelerate import disk_offload
from former import to_former_names
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText

from modeling_qgsa import QGSAConfig, QGSASmolVLMForConditionalGeneration, VisualCache
from modeling_qgsa.compat_qgsa import bidirectional_mask
from modeling_qgsa.selector_qgsa import SelectorLayer


# PEFT still uses a former name of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

OWN = ("selector", "complexity_estimator")
VARIANTS = ("before_encoder", "after_encoder", "blocks", "dense")


@pytest.fixture
def former_layer():
    """A layer of version 0.2, with weights that all matter."""
    layer = nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return layer


def logits(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits


def relevance(model, inputs):
    return model.select(**inputs).relevance


# Its layers


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_layer_computes_what_the_former_one_did(attention, former_layer):
    config = QGSAConfig(selector_hidden_size=32, selector_heads=4, attn_implementation=attention)
    layer = SelectorLayer(config)
    layer.load_state_dict(former_layer.state_dict())
    hidden, present = torch.randn(3, 20, 32), torch.ones(3, 20).bool()
    present[0, 12:], present[1, :3], present[2, 5:7] = False, False, False
    with torch.no_grad():
        for given in (present, torch.ones_like(present)):
            expected = former_layer(hidden, src_key_padding_mask=~given)
            got = layer(hidden, bidirectional_mask(config, hidden, given))
            assert torch.allclose(got[given], expected[given], atol=1e-5)


def test_the_selector_follows_the_attention_of_the_model(make_model, batch):
    model = make_model()
    expected = relevance(model, batch)
    model.set_attn_implementation("eager")
    assert torch.allclose(relevance(model, batch), expected, atol=1e-5)


# Weights of version 0.2


def test_former_names_load_without_random_weights(model, batch, tmp_path, caplog):
    model.save_pretrained(tmp_path)
    to_former_names(tmp_path / "model.safetensors")
    expected = logits(model, batch)
    for auto in (QGSASmolVLMForConditionalGeneration, AutoModelForImageTextToText):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(logits(loaded, batch), expected)
    assert not caplog.records
    base, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        assert torch.equal(model.lm_head(base(**batch).last_hidden_state), expected)


def test_what_was_loaded_by_former_names_is_saved_and_loaded_again(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    to_former_names(tmp_path / "model.safetensors")
    loaded = QGSASmolVLMForConditionalGeneration.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again, report = QGSASmolVLMForConditionalGeneration.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values()) and torch.equal(logits(again, batch), logits(model, batch))


def test_a_key_mapping_of_ones_own_is_added(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    to_former_names(tmp_path / "model.safetensors")
    weights = load_file(tmp_path / "model.safetensors")
    weights["head.weight"] = weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = QGSASmolVLMForConditionalGeneration.from_pretrained(tmp_path, key_mapping={"^head": "lm_head"})
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_former_adapters_load(make_model, batch, tmp_path):
    """The selector as PEFT saves it next to adapters: a module that is trained as a whole."""
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=list(OWN), init_lora_weights=False)
    trained = get_peft_model(make_model(), config)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "modules_to_save" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    trained.save_pretrained(tmp_path)
    to_former_names(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(trained, batch))


# Tools that act on calls


def test_adapters_on_every_linear_layer_act_before_they_are_merged_as_after(make_model, batch):
    plain = relevance(make_model(), batch)
    model = make_model()
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)).eval()
    assert any("selector.layers.0.self_attn.in_proj.lora_A" in name for name, _ in adapted.named_parameters())
    before, expected = relevance(model, batch), logits(adapted, batch)
    assert (before - plain).abs().max() > 0.01
    merged = adapted.merge_and_unload()
    assert torch.allclose(relevance(merged, batch), before, atol=1e-4)
    assert torch.allclose(logits(merged, batch), expected, atol=1e-3)


@pytest.mark.parametrize("part", ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"])
def test_an_adapter_on_any_layer_of_the_selector_counts(part, make_model, batch):
    model = make_model()
    plain = relevance(model, batch)
    targets = rf".*selector\.layers\.1\.{re.escape(part)}"
    get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    assert (relevance(model, batch) - plain).abs().max() > 1e-4


@pytest.mark.parametrize("selection", VARIANTS)
def test_a_model_on_disk_answers_alike(selection, make_model, batch, tmp_path):
    expected = logits(make_model(), batch, selection=selection)
    offloaded = disk_offload(make_model(), str(tmp_path), execution_device="cpu")
    assert all(weight.is_meta for weight in offloaded.parameters())
    assert torch.equal(logits(offloaded, batch, selection=selection), expected)


def test_a_visual_cache_serves_a_model_on_disk(make_model, batch, tiles_encoded, tmp_path):
    model = make_model().tune(tiles_per_step=1)
    expected = logits(model, batch)
    cache, offloaded = VisualCache(), disk_offload(model, str(tmp_path), execution_device="cpu")
    assert torch.equal(logits(offloaded, batch, visual_cache=cache), expected)
    with tiles_encoded(offloaded) as encoded:
        assert torch.equal(logits(offloaded, batch, visual_cache=cache), expected)
    assert not encoded


class Int8Linear(nn.Module):
    """A linear layer as quantizers make it: what it computes is known to its forward pass alone."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, values):
        return nn.functional.linear(values, self.weight * self.scale, self.bias)


def test_a_quantized_selector_points_alike(make_model, batch):
    model = make_model()
    expected = relevance(model, batch)
    for own in OWN:
        for parent in list(model.model.get_submodule(own).modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))
    found = relevance(model, batch)
    assert not torch.equal(found, expected) and torch.allclose(found, expected, atol=0.2)
