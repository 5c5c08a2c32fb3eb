"""The model: our glance, point, look and keep in front of vLLM's text model."""

import copy
import re
from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.idefics3 import Idefics3DummyInputsBuilder
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from modeling_qgsa import QGSASmolVLMModel
from modeling_qgsa.pointer_qgsa import attention_layers
from modeling_qgsa.selector_qgsa import FORMER_NAMES
from modeling_qgsa.vision_qgsa import VisualCache

from .processing import QGSAMultiModalProcessor, QGSAProcessingInfo
from .selecting import AskedImage, check_servable, embed_images


class WordEmbeddings(nn.Module):
    """The word embeddings of vLLM's text model, which are not held twice."""

    def __init__(self, language_model: nn.Module):
        super().__init__()
        self.source = (language_model,)  # a tuple: it is no part of this module

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.source[0].embed_input_ids(input_ids)


def layers_that_point(config) -> int:
    """How many layers of the text model the pointer reads, from the first one on; 0 for the selector."""
    if config.pointer == "selector":
        return 0
    weights = config.attention_weights
    return attention_layers(config.text_config.num_hidden_layers) if weights is None else len(weights)


def build_selecting(config, language_model: nn.Module, dtype: torch.dtype) -> QGSASmolVLMModel:
    """Our model without the part of its text model that no pointer reads.

    Encoder, connector and selector are held here alone, word embeddings by vLLM alone. A pointer that reads attention
    holds its layers of the text model a second time, since vLLM's give no attention maps.
    """
    smaller = copy.deepcopy(config)
    smaller.text_config.num_hidden_layers = layers_that_point(config)
    smaller.attention_weights = None
    model = QGSASmolVLMModel._from_config(smaller, dtype=dtype, attn_implementation="sdpa")
    model.config = config
    model.set_input_embeddings(WordEmbeddings(language_model))
    return model


@MULTIMODAL_REGISTRY.register_processor(
    QGSAMultiModalProcessor, info=QGSAProcessingInfo, dummy_inputs=Idefics3DummyInputsBuilder
)
class QGSAForVllm(nn.Module, SupportsMultiModal):
    """QGSA-SmolVLM for vLLM.

    `additional_config={"visual_cache_mb": 256}` keeps the features of tiles that were encoded, for further questions
    about the same images; tiles are then encoded one at a time.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.text_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.": "selecting.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality.startswith("image"):
            return "<image>"
        raise ValueError(f"modality ({modality!r}) must be 'image'")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        check_servable(config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["LlamaForCausalLM"],
            )
        with self._mark_tower_model(vllm_config, "image"):
            self.selecting = build_selecting(config, self.language_model, vllm_config.model_config.dtype)
        megabytes = (vllm_config.additional_config or {}).get("visual_cache_mb", 0)
        self.visual_cache = VisualCache(megabytes * 2**20) if megabytes else None
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        if kwargs.get("pixel_values") is None:
            return []
        counts = kwargs["num_patches"].flatten().tolist()
        images = zip(
            kwargs["prompt_ids"],
            kwargs["pixel_values"].split(counts),
            kwargs["pixel_attention_mask"].split(counts),
            map(tuple, kwargs["limits"].tolist()),
        )
        return embed_images(self.selecting, [AskedImage(*image) for image in images], self.visual_cache)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs: object):
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint; what of the text model a pointer reads goes to both places."""
        twice = {name for name, _ in self.selecting.named_parameters() if name.startswith("text_model.")}

        def named():
            kept = []
            for name, weight in weights:
                for former, present in FORMER_NAMES.items():
                    name = re.sub(former, present, name)
                yield name, weight
                own = name.removeprefix("model.")
                if own in twice:
                    kept.append((f"selecting.{own}", weight))
            yield from kept

        return AutoWeightsLoader(self).load_weights(named(), mapper=self.hf_to_vllm_mapper)
