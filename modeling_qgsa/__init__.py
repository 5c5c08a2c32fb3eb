"""SmolVLM that looks only where the question points."""

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_qgsa import QGSAConfig
from .modeling_qgsa import QGSASmolVLMForConditionalGeneration, QGSASmolVLMModel
from .processing_qgsa import QGSAProcessor
from .selection_qgsa import QGSASelection
from .vision_qgsa import VisualCache


if transformers.__version__.startswith("4."):
    from transformers import AutoModelForVision2Seq
else:
    from transformers import AutoModelForImageTextToText as AutoModelForVision2Seq

# With this package imported the Auto classes know its checkpoints, and run no code of theirs.
AutoConfig.register(QGSAConfig.model_type, QGSAConfig)
AutoModel.register(QGSAConfig, QGSASmolVLMModel)
AutoModelForImageTextToText.register(QGSAConfig, QGSASmolVLMForConditionalGeneration)
AutoProcessor.register(QGSAConfig, QGSAProcessor)

__all__ = [
    "AutoModelForVision2Seq",
    "QGSAConfig",
    "QGSAProcessor",
    "QGSASelection",
    "QGSASmolVLMForConditionalGeneration",
    "QGSASmolVLMModel",
    "VisualCache",
]
