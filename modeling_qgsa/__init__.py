"""SmolVLM that looks only where the question points."""

import transformers

from .configuration_qgsa import QGSAConfig
from .modeling_qgsa import QGSASmolVLMForConditionalGeneration, QGSASmolVLMModel
from .processing_qgsa import QGSAProcessor
from .selection_qgsa import QGSASelection
from .vision_qgsa import VisualCache


if transformers.__version__.startswith("4."):
    from transformers import AutoModelForVision2Seq
else:
    from transformers import AutoModelForImageTextToText as AutoModelForVision2Seq

__all__ = [
    "AutoModelForVision2Seq",
    "QGSAConfig",
    "QGSAProcessor",
    "QGSASelection",
    "QGSASmolVLMForConditionalGeneration",
    "QGSASmolVLMModel",
    "VisualCache",
]
