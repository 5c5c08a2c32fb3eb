"""QGSA-SmolVLM in vLLM: the question chooses tiles and visual tokens, vLLM's own text model answers.

vLLM reserves the positions of an image before it is encoded, so that every image takes an exact count of them, see
`positions_per_image` of [`QGSAConfig`]. Installed next to vLLM, this package needs no import:

    vllm serve outputs/hub/my-qgsa --trust-remote-code

selecting.py   from an image and a question to the embeddings of the positions that are kept; knows nothing of vLLM
processing.py  before the model: what is announced for an image, and the question on its way to the model
model.py       the model: our glance, point, look and keep in front of vLLM's text model
"""

from transformers import AutoConfig

from modeling_qgsa import QGSAConfig


ARCHITECTURE = "QGSASmolVLMForConditionalGeneration"


def register():
    """Tell transformers and vLLM about our checkpoints; vLLM calls this in each of its processes."""
    from vllm import ModelRegistry  # vLLM is not needed to import the rest

    AutoConfig.register(QGSAConfig.model_type, QGSAConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "qgsa_vllm.model:QGSAForVllm")
