"""Adapters, offloaded weights and quantized layers: tools that act on modules and therefore on their calls."""

import copy

import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from recording import assert_close
from torch import nn
from transformers import BitsAndBytesConfig, SmolVLMForConditionalGeneration
from transformers.utils import is_bitsandbytes_available

from modeling_qgsa import QGSASmolVLMForConditionalGeneration


# peft reads an attribute that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@torch.no_grad()
def results(model, inputs):
    """Logits of the last position and, with a selection, the relevance of each cell and the kept tokens."""
    output = model(**inputs)
    found = [output.logits[:, -1]]
    selection = getattr(output, "selection", None)
    return found if selection is None else [*found, selection.relevance, selection.kept_tokens.float()]


def assert_alike(found, expected, atol):
    assert len(found) == len(expected)
    for one, two in zip(found, expected):
        assert_close(one, two, atol)


def adapt(model, **options):
    """LoRA whose untrained adapters already act."""
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(0.3)
    return model.eval()


def linear_layers(model, part=""):
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and part in name}


@pytest.mark.parametrize("targets", ["all-linear", "selector", "text_model"])
def test_adapters_act_and_merge(targets, kind, tool_model, asked):
    """Every adapted layer acts as much before it is merged as after."""
    layers = "all-linear" if targets == "all-linear" else list(linear_layers(tool_model, targets))
    if not layers or (targets == "selector" and kind == "dense"):
        pytest.skip("nothing is selected")
    before = results(tool_model, asked)
    tuned = adapt(tool_model, target_modules=layers)
    expected = results(tuned, asked)
    logits, *selections = ((one - two).abs().max() for one, two in zip(expected, before))
    assert targets == "selector" or logits > 1e-2
    assert targets == "text_model" or not selections or selections[0] > 1e-4, "the relevance moves"
    assert_alike(results(tuned.merge_and_unload(), asked), expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["stock", "before_encoder", "blocks", "after_encoder"], indirect=True)
def test_every_linear_layer_is_called(tool_model, asked):
    """As a module: hooks, LoRA, offloading and quantization rest on it."""
    called, layers = set(), linear_layers(tool_model)
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
    tool_model.generate(**asked, max_new_tokens=1)
    assert set(layers) == called


def test_training_for_few_bits(kind, tool_model, labelled):
    """PEFT's preparation of quantized models: float32 norms, reentrant checkpointing, inputs that need gradients."""
    plain = adapt(copy.deepcopy(tool_model), target_modules="all-linear").train()
    prepared = adapt(prepare_model_for_kbit_training(tool_model), target_modules="all-linear").train()
    losses = []
    for model in (plain, prepared):
        torch.manual_seed(0)
        losses.append(model(**labelled).loss)
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    gradients = {name: weight.grad for name, weight in plain.named_parameters() if weight.grad is not None}
    assert any("text_model" in name for name in gradients)
    if kind not in ("stock", "dense"):
        assert any("selector" in name and gradient.any() for name, gradient in gradients.items())
    for name, weight in prepared.named_parameters():
        if name in gradients and weight.requires_grad:
            scale = max(1.0, gradients[name].abs().max().item())
            found = torch.zeros_like(weight) if weight.grad is None else weight.grad
            assert (found - gradients[name]).abs().max() <= 1e-4 * scale, name


def test_weights_on_disk(tool_model, asked, tmp_path):
    expected = results(tool_model, asked)
    ids = tool_model.generate(**asked, max_new_tokens=4)
    offloaded = disk_offload(tool_model, tmp_path / "weights", execution_device=torch.device("cpu"))
    assert next(tool_model.parameters()).is_meta
    assert_alike(results(offloaded, asked), expected, atol=1e-5)
    assert torch.equal(offloaded.generate(**asked, max_new_tokens=4), ids)


def test_a_device_map_with_a_folder(kind, tool_model, asked, tmp_path):
    expected = results(tool_model, asked)
    tool_model.save_pretrained(tmp_path / "saved")
    model_class = SmolVLMForConditionalGeneration if kind == "stock" else QGSASmolVLMForConditionalGeneration
    # The head is tied to the embeddings of the text model: both have to be in the same place.
    device_map = {"model.vision_model": "disk", "model.connector": "disk", "model.text_model": "cpu", "lm_head": "cpu"}
    if kind != "stock":
        device_map |= {"model.selector": "disk", "model.complexity_estimator": "disk"}
    loaded = model_class.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=str(tmp_path / "offloaded")
    )
    assert_alike(results(loaded, asked), expected, atol=1e-5)


# Quantized layers


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale per row, as quantization libraries put in place of `nn.Linear`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = nn.Buffer(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.stored = nn.Buffer((linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def rounded(self):
        return self.stored * self.scale

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.rounded(), self.bias)


@torch.no_grad()
def quantize(model, replace):
    """Round every linear layer but the head to int8, in place or (`replace`) as another module."""
    for name, module in linear_layers(model).items():
        if name == "lm_head":
            continue
        quantized = Int8Linear(module)
        if replace:
            model.set_submodule(name, quantized)
        else:
            module.weight.copy_(quantized.rounded())
    return model


def test_replaced_linear_layers(make_kind, kind, asked):
    """The same numbers, whether the weights are rounded in place or the layers replaced by quantized ones."""
    expected = quantize(make_kind(kind), replace=False)
    found = quantize(make_kind(kind), replace=True)
    assert_alike(results(found, asked), results(expected, asked), atol=1e-4)
    assert torch.equal(found.generate(**asked, max_new_tokens=4), expected.generate(**asked, max_new_tokens=4))


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed: pip install bitsandbytes")
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits, kind, tool_model, asked, asked_alone, decode, tmp_path):
    """Close to the full model: the same answers, and a selection by nearly the same relevance."""
    tool_model.save_pretrained(tmp_path)
    model_class = SmolVLMForConditionalGeneration if kind == "stock" else QGSASmolVLMForConditionalGeneration
    layers = linear_layers(tool_model).items()
    odd = [name for name, layer in layers if layer.in_features % 64 or layer.out_features % 32]  # not in 4 bit on CPUs
    spared = ["lm_head"] if bits == 8 else ["lm_head", *odd]
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, llm_int8_skip_modules=spared)
    model = model_class.from_pretrained(tmp_path, quantization_config=config).eval()
    assert model.get_memory_footprint() < tool_model.get_memory_footprint()
    if kind not in ("stock", "dense"):
        expected, found = (each.select(**asked).relevance for each in (tool_model, model))
        assert (found - expected).abs().sum((1, 2)).max() < (0.1 if bits == 8 else 0.6)
    ids = model.generate(**asked_alone, max_new_tokens=4)
    assert decode(ids, asked_alone["input_ids"].shape[1]) == ["moon"]
