"""The checkpoints that a study compares: a QGSA checkpoint and the dense one it was made from."""

import json
from pathlib import Path

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.cli.arguments import check_source


# Former options of the studies and their present names.
RENAMED = {
    "--checkpoint": "--model",
    "--blocks_checkpoint": "--blocks_model",
    "--split": "--eval_split",
    "--size": "--test_size",
}


def base_model_of(model: str, base_model: str | None = None) -> str:
    """The dense checkpoint that `model` was made from: `base_model` if given, else as its run's `run.json` says.

    Raises ValueError if neither names it.
    """
    if base_model is not None:
        return base_model
    path = Path(model) / "run.json"
    recorded = json.loads(path.read_text()).get("base_model") if path.is_file() else None
    if recorded is None:
        raise ValueError(f"base_model (None): {path} does not name it; give the dense checkpoint with --base_model")
    return recorded


def load_model(source: str) -> QGSASmolVLMForConditionalGeneration:
    """A QGSA checkpoint in float32 and eval mode."""
    check_source(source)
    return QGSASmolVLMForConditionalGeneration.from_pretrained(source, dtype="float32").eval()


def load_dense(source: str, **fields) -> tuple[QGSASmolVLMForConditionalGeneration, QGSAProcessor]:
    """A dense checkpoint as a QGSA model with a fresh selector, and its processor; `fields` of the configuration."""
    check_source(source)
    dense = QGSASmolVLMForConditionalGeneration.from_dense(source, **fields)
    return dense, QGSAProcessor.from_pretrained(source, backend="pil")
