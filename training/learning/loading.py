"""Loading the dense checkpoint that training starts from."""

from transformers import AutoConfig, AutoModelForImageTextToText

from modeling_qgsa import QGSAProcessor
from training.cli.arguments import check_source
from training.cli.groups import ModelArguments


def load_dense(model: ModelArguments):
    """The dense model of `base_model` and a QGSA processor for it: `(model, processor)`.

    The model is in float32, whatever the dtype of the checkpoint: small steps are lost on bfloat16 weights, and
    `--bf16` gives the speed. The processor uses PIL, so that results do not depend on torchvision being installed.

    Raises ValueError if `base_model` is missing, or a local folder that does not exist.
    """
    name = model.base_model
    if not name:
        raise ValueError("base_model (None): required. Name a Hub id or a folder with --base_model")
    check_source(name)
    processor = QGSAProcessor.from_pretrained(name, backend="pil")
    if model.random_weights:
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name)).float(), processor
    return AutoModelForImageTextToText.from_pretrained(name, dtype="float32"), processor
