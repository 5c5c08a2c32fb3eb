"""SmolVLM that looks only where the question points."""

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_qgsa import QGSAConfig, __version__
from .guidance_qgsa import GuidedVLM
from .modeling_qgsa import QGSASmolVLMForConditionalGeneration, QGSASmolVLMModel
from .processing_qgsa import QGSAProcessor
from .selection_qgsa import QGSASelection
from .vision_qgsa import VisualCache


if transformers.__version__.startswith("4."):
    from transformers import AutoModelForVision2Seq  # type: ignore[attr-defined]
else:
    from transformers import AutoModelForImageTextToText as AutoModelForVision2Seq

# Once this package is imported, the Auto classes load its checkpoints without running code that comes with them.
AutoConfig.register(QGSAConfig.model_type, QGSAConfig)
AutoModel.register(QGSAConfig, QGSASmolVLMModel)
AutoModelForImageTextToText.register(QGSAConfig, QGSASmolVLMForConditionalGeneration)
AutoProcessor.register(QGSAConfig, QGSAProcessor)

__all__ = [
    "AutoModelForVision2Seq",
    "GuidedVLM",
    "QGSAConfig",
    "QGSAProcessor",
    "QGSASelection",
    "QGSASmolVLMForConditionalGeneration",
    "QGSASmolVLMModel",
    "VisualCache",
    "__version__",
]
