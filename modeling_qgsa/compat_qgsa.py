"""Differences between transformers 4.57 and 5, and between versions of 5. All else here is written for the latest."""

import copy
import types
from dataclasses import Field, make_dataclass
from inspect import signature
from typing import Any, Union, get_args

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import masking_utils
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings
from transformers.processing_utils import ImagesKwargs, TextKwargs


TRANSFORMERS_V4 = transformers.__version__.startswith("4.")
# Since 5.24 the cache has another name among arguments and outputs, and outputs hold those of the encoder.
CACHE = "cache" if "cache" in signature(transformers.SmolVLMModel.forward).parameters else "past_key_values"


def strict_v4(config_class):
    """Replacement for huggingface_hub's `strict`, which needs dataclasses: transformers 4 configs are not dataclasses.

    The class gets an `__init__` that checks its annotated fields as `strict` does, hands everything else to
    `__post_init__`, and runs every `validate_...` method.
    """
    annotated = config_class.__annotations__
    defaults = {name: vars(config_class)[name] for name in annotated}
    for name in [name for name, default in defaults.items() if isinstance(default, Field)]:
        delattr(config_class, name)
    # The huggingface_hub that goes with transformers 4 accepts `Union[int, float]` but not `int | float`.
    unions = {
        name: Union.__getitem__(get_args(kind)) if isinstance(kind, types.UnionType) else kind
        for name, kind in annotated.items()
    }
    fields: Any = strict(make_dataclass("QGSAFields", [(name, unions[name], defaults[name]) for name in annotated]))
    validators = [name for name in vars(config_class) if name.startswith("validate_")]

    def __init__(self, **kwargs):
        own = fields(**{name: kwargs.pop(name) for name in annotated if name in kwargs})
        self.__post_init__(**kwargs)
        for name in annotated:
            setattr(self, name, getattr(own, name))
        for name in validators:
            getattr(self, name)()

    config_class.__init__ = __init__
    return config_class


class SmolVLMConfigV4(transformers.SmolVLMConfig):
    """SmolVLM's configuration with a dataclass-style `__post_init__`; reads files written by transformers 5."""

    def __post_init__(self, text_config=None, tie_word_embeddings=False, **kwargs):
        if isinstance(text_config, dict) and "rope_parameters" in text_config:
            rope = dict(text_config["rope_parameters"])
            theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
            text_config = text_config | {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope}
        if isinstance(text_config, dict):  # transformers 4 reads this flag from the text model's configuration
            text_config = text_config | {"tie_word_embeddings": tie_word_embeddings}
        super().__init__(text_config=text_config, tie_word_embeddings=tie_word_embeddings, **kwargs)


class PatchPositionsV5(SmolVLMVisionEmbeddings):
    """Patch embeddings at the patches' own positions, as in transformers 5.

    Transformers 4.57 gives all patches but the first the position of their neighbour: the fraction i / n is scaled by
    1 - 1e-6 and then falls just below the boundary that it should reach.
    """

    def forward(self, pixel_values, patch_attention_mask):
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        side, (_, height, width) = self.num_patches_per_side, patch_attention_mask.shape
        rows, columns = patch_attention_mask[:, :, :1].sum(1), patch_attention_mask[:, :1].sum(2)
        row = torch.arange(height, device=patches.device) * side // rows
        column = torch.arange(width, device=patches.device) * side // columns
        numbers = (row[:, :, None] * side + column[:, None]).flatten(1)
        return patches + self.position_embedding(numbers.where(patch_attention_mask.flatten(1), 0))


def use_v5_patch_positions(vision_model):
    """Give SmolVLM's encoder the patch positions of transformers 5."""
    if TRANSFORMERS_V4:
        vision_model.embeddings = PatchPositionsV5(vision_model.config)


def advance_positions(model_kwargs: dict, given: Any) -> dict:
    """Append the next position to the `given` ones, which transformers 4 repeats at every decoding step.

    Args:
        model_kwargs: arguments of the next decoding step, updated by `generate`.
        given: `position_ids` of this step, `(B, L)` int64; None if the model counts them itself.
    """
    repeated = given is not None and model_kwargs.get("position_ids") is given
    return model_kwargs | {"position_ids": torch.cat([given, given[:, -1:] + 1], dim=1)} if repeated else model_kwargs


def causal_mask(
    text_model,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    cache=None,
    layer: int = 0,
):
    """The mask that the layers of `text_model` expect, in the format of its attention implementation.

    Args:
        inputs_embeds: `(B, L, D)`.
        attention_mask: `(B, slots + L)`, 1 for tokens and 0 for padding.
        position_ids: `(B, L)` int64.
        cache: what precedes; None for a prefill without a cache.
        layer: the layer whose slots of the cache count, if layers differ in length.
    """
    if cache is not None and layer:
        layers, cache = cache.layers[layer:], copy.copy(cache)
        cache.layers = layers
    arguments = {
        "config": text_model.config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        CACHE: cache,
        "position_ids": position_ids,
    }
    if TRANSFORMERS_V4:
        arguments["input_embeds"] = arguments.pop("inputs_embeds")
        slots = attention_mask.shape[1] - inputs_embeds.shape[1]
        arguments["cache_position"] = torch.arange(slots, attention_mask.shape[1], device=inputs_embeds.device)
    return create_causal_mask(**arguments)


def bidirectional_mask(config, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor):
    """The mask that hides padding from layers in both directions, in the format of the attention implementation.

    Args:
        config: the configuration that names the attention implementation.
        inputs_embeds: `(B, L, D)`.
        attention_mask: `(B, L)`, 1 for tokens and 0 for padding.
    """
    arguments = {"config": config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
    if not TRANSFORMERS_V4:
        return masking_utils.create_bidirectional_mask(**arguments)
    arguments["input_embeds"] = arguments.pop("inputs_embeds")
    arguments["cache_position"] = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
    arguments["past_key_values"] = None
    arguments["or_mask_function"] = lambda sample, head, query, key: key >= 0  # what comes later is seen, too
    return create_causal_mask(**arguments)


def take_cache(arguments: dict[str, Any]):
    """The cache among the arguments of `forward` or `generate`, from which it is taken out, or None.

    Raises ValueError if it has both of its names, `past_key_values` and `cache`.
    """
    found = [arguments.pop(name, None) for name in ("past_key_values", "cache")]
    if None not in found:
        raise ValueError("past_key_values and cache are names of the same argument: give one of them")
    return next((cache for cache in found if cache is not None), None)


def features_field(features: torch.Tensor) -> dict[str, Any]:
    """The field of an output of SmolVLM that holds the features of tiles, `(n, P, D)`."""
    if CACHE == "cache":
        return {"image_outputs": BaseModelOutputWithPooling(pooler_output=features)}
    return {"image_hidden_states": features}


def features_in(outputs) -> torch.Tensor:
    """The features of tiles in an output, see `features_field`."""
    return outputs.image_outputs.pooler_output if CACHE == "cache" else outputs.image_hidden_states


def is_checkpointing(model) -> bool:
    """Whether activation checkpointing is on. Stock's property has another name since 5.23, and the old one warns."""
    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    return any(layer.gradient_checkpointing for layer in layers)


def tile_features(outputs) -> torch.Tensor:
    """Features from SmolVLM's `get_image_features`, which returns a tensor or an output with a list, as one tensor."""
    return outputs if torch.is_tensor(outputs) else torch.cat(list(outputs.pooler_output))


def encoded_images(mm_encoder_outputs):
    """The encoder's output for images from `mm_encoder_outputs`: a dictionary by modality, or that output itself."""
    return mm_encoder_outputs["image"] if type(mm_encoder_outputs) is dict else mm_encoder_outputs


def continued_inputs(text_inputs: dict[str, torch.Tensor], cache) -> dict[str, torch.Tensor]:
    """Text inputs as `generate` expects them beside a `cache`, which may be None.

    Transformers 5 wants embeddings and positions of what is in the cache too, which it cuts off unread; transformers 4
    wants to be told the slots of the new ones.

    Args:
        text_inputs: `inputs_embeds` `(B, L, D)`, `attention_mask` `(B, slots + L)` and `position_ids` `(B, L)`.
    """
    names = ("inputs_embeds", "attention_mask", "position_ids")
    text_inputs = {name: text_inputs[name] for name in names}
    embeds, positions = text_inputs["inputs_embeds"], text_inputs["position_ids"]
    slots = 0 if cache is None else int(cache.get_seq_length())  # what `generate` takes for the length
    if not slots:
        return text_inputs
    if TRANSFORMERS_V4:
        return text_inputs | {"cache_position": torch.arange(embeds.shape[1], device=embeds.device) + slots}
    padded = {
        "inputs_embeds": nn.functional.pad(embeds, (0, 0, slots, 0)),
        "position_ids": nn.functional.pad(positions, (slots, 0)),
    }
    return text_inputs | padded


def image_processor_options(image_processor) -> set[str]:
    """Names of the options that an Idefics3 image processor accepts per call."""
    by_signature = TRANSFORMERS_V4 and not image_processor.is_fast
    known = (
        signature(image_processor.preprocess).parameters
        if by_signature
        else image_processor.valid_kwargs.__annotations__
    )
    return set(known) | set(ImagesKwargs.__annotations__)


def uses_torchvision(image_processor) -> bool:
    """Whether an image processor resizes tensors with torchvision; the others resize with PIL."""
    return image_processor.is_fast if TRANSFORMERS_V4 else image_processor.backend == "torchvision"


def torchvision_pixels(image_processor, image) -> torch.Tensor:
    """A PIL image as an image processor that uses torchvision resizes it, `(3, H, W)` uint8."""
    return image_processor._process_image(image) if TRANSFORMERS_V4 else image_processor.process_image(image)


def torchvision_resample(image_processor):
    """The filter of an image processor that uses torchvision, as its methods for resizing take it."""
    if not TRANSFORMERS_V4:
        return image_processor.resample
    return transformers.image_utils.pil_torch_interpolation_mapping[image_processor.resample]


def tokenizer_options() -> set[str]:
    """Names of the options that a tokenizer accepts per call."""
    of_processors = {"return_mm_token_type_ids", "return_text_replacement_offsets"}
    return (set(TextKwargs.__annotations__) | {"return_tensors"}) - of_processors


strict_config: Any
SmolVLMConfig: Any
initialization: Any
RETURN_OUTPUT: dict[str, bool]

if TRANSFORMERS_V4:
    strict_config, SmolVLMConfig = strict_v4, SmolVLMConfigV4
    # Transformers 4 initialises a module either completely or, if its weights are loaded, not at all.
    initialization = types.SimpleNamespace(
        normal_=nn.init.normal_, zeros_=nn.init.zeros_, copy_=lambda tensor, other: tensor.data.copy_(other)
    )
    RETURN_OUTPUT = {}
else:
    from transformers import initialization as v5_initialization

    strict_config, SmolVLMConfig, initialization = strict, transformers.SmolVLMConfig, v5_initialization
    RETURN_OUTPUT = {"return_dict": True}  # `get_image_features` returns an output whatever the configuration says
