"""Where transformers 4 differs from 5: one set of files serves both, and all else is written for 5."""

import types
from dataclasses import Field, make_dataclass
from inspect import signature
from typing import Union, get_args

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings
from transformers.processing_utils import ImagesKwargs


IS_FOUR = transformers.__version__.startswith("4.")


def strict_of_four(config_class):
    """In the place of huggingface_hub's `strict`, which is for dataclasses: configs of transformers 4 are none.

    Gives the class an `__init__` that checks its annotated fields as `strict` does, hands all else to `__post_init__`,
    and runs every `validate_...`.
    """
    annotated = config_class.__annotations__
    defaults = {name: vars(config_class)[name] for name in annotated}
    for name in [name for name, default in defaults.items() if isinstance(default, Field)]:
        delattr(config_class, name)
    # The huggingface_hub of transformers 4 knows `Union[int, float]` and not `int | float`.
    unions = {
        name: Union.__getitem__(get_args(kind)) if isinstance(kind, types.UnionType) else kind
        for name, kind in annotated.items()
    }
    fields = strict(make_dataclass("QGSAFields", [(name, unions[name], defaults[name]) for name in annotated]))
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


class SmolVLMConfigOfFour(transformers.SmolVLMConfig):
    """SmolVLM's configuration with the hook of a dataclass, reading what transformers 5 wrote."""

    def __post_init__(self, text_config=None, tie_word_embeddings=False, **kwargs):
        if isinstance(text_config, dict) and "rope_parameters" in text_config:
            rope = dict(text_config["rope_parameters"])
            theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
            text_config = text_config | {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope}
        if isinstance(text_config, dict):  # whose word is the one that counts there
            text_config = text_config | {"tie_word_embeddings": tie_word_embeddings}
        super().__init__(text_config=text_config, tie_word_embeddings=tie_word_embeddings, **kwargs)


class PatchPositionsOfFive(SmolVLMVisionEmbeddings):
    """Patches at their own positions. On transformers 4.57 all but the first have those of their neighbour: what is
    right there but for rounding, i / n, is scaled by 1 - 1e-6 and falls below the bound that it should reach.
    """

    def forward(self, pixel_values, patch_attention_mask):
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        side, (_, height, width) = self.num_patches_per_side, patch_attention_mask.shape
        rows, columns = patch_attention_mask[:, :, :1].sum(1), patch_attention_mask[:, :1].sum(2)
        row = torch.arange(height, device=patches.device) * side // rows
        column = torch.arange(width, device=patches.device) * side // columns
        numbers = (row[:, :, None] * side + column[:, None]).flatten(1)
        return patches + self.position_embedding(numbers.where(patch_attention_mask.flatten(1), 0))


def mend_patch_positions(vision_model):
    """Give SmolVLM's encoder the patch positions of transformers 5, where they are not."""
    if IS_FOUR:
        vision_model.embeddings = PatchPositionsOfFive(vision_model.config)


class AdvancingPositions:
    """For models whose prompt is given with positions of its own: transformers 4 leaves them as they are."""

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        given = model_kwargs.get("position_ids")
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if given is not None and model_kwargs.get("position_ids") is given:
            model_kwargs["position_ids"] = torch.cat([given, given[:, -1:] + 1], dim=1)
        return model_kwargs


def tile_features(outputs) -> torch.Tensor:
    """What SmolVLM's `get_image_features` returns, a tensor or a list in an output, as one tensor."""
    return outputs if torch.is_tensor(outputs) else torch.cat(list(outputs.pooler_output))


def image_options(image_processor) -> set[str]:
    """Names of the options that an image processor of Idefics3 takes in a call."""
    known = (
        signature(image_processor.preprocess).parameters if IS_FOUR else image_processor.valid_kwargs.__annotations__
    )
    return set(known) | set(ImagesKwargs.__annotations__)


if IS_FOUR:
    strict_config, SmolVLMConfig = strict_of_four, SmolVLMConfigOfFour
    # Modules are initialised as a whole there, or not at all where they are loaded.
    initialization = types.SimpleNamespace(
        normal_=nn.init.normal_, zeros_=nn.init.zeros_, copy_=lambda tensor, other: tensor.data.copy_(other)
    )
    AS_OUTPUT = {}
else:
    from transformers import initialization as initialization

    strict_config, SmolVLMConfig = strict, transformers.SmolVLMConfig
    AS_OUTPUT = {"return_dict": True}  # for `get_image_features`, whatever the config says
