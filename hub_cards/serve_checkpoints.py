"""Checkpoints from anyone: only safetensors are opened, and all is checked before anything is built.

`from_pretrained` of a folder would follow an index to pickles and to other folders, and `config.json` to adapters.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from modeling_qgsa import GuidedVLM, QGSAConfig, QGSAProcessor, QGSASmolVLMForConditionalGeneration
from modeling_qgsa.guidance_qgsa import PARTS
from modeling_qgsa.selector_qgsa import FORMER_NAMES
from training.cli.arguments import check_source


@contextmanager
def errors_named(name: str) -> Iterator[None]:
    """Turn whatever a broken checkpoint raises into a ValueError that names it."""
    try:
        yield
    except (OSError, ValueError, StrictDataclassError):
        raise
    except RecursionError as error:
        raise ValueError(f"model ({name}): a JSON file is nested too deeply") from error
    except Exception as error:  # of safetensors, tokenizers, jinja and torch, which have no common type
        raise ValueError(f"model ({name}) cannot be loaded: {type(error).__name__}: {error}") from error


def load(name: str, device: str = "cpu"):
    """Load `(model, processor)` from a Hub id or folder.

    Raises ValueError or OSError if the model type is not QGSA's, or files are missing, broken or do not match.
    """
    check_source(name)
    with errors_named(name):
        given = PreTrainedConfig.get_config_dict(name)[0]
        if given.get("model_type") != QGSAConfig.model_type:
            raise ValueError(
                f"model ({name}) must have model type {QGSAConfig.model_type!r}, not {given.get('model_type')!r}: "
                "convert it with hub_cards/export.py"
            )
        files = weight_files(name)
        shapes = read_shapes(files)
        check_layers(given, len(shapes))
        config = QGSAConfig.from_pretrained(name, trust_remote_code=False)
        check_shapes(name, config, shapes)
        processor = QGSAProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        weights = {key: tensor for file in files for key, tensor in load_file(file).items()}
        model = QGSASmolVLMForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights)
        model.name_or_path = model.config.name_or_path = name
        if cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False):
            model.generation_config = GenerationConfig.from_pretrained(name)
    return model.to(device).eval(), processor


def load_pair(folder: str, device: str = "cpu") -> GuidedVLM:
    """Load a saved pair, each model as `load` does."""
    (guide, first), (target, second) = (load(str(Path(folder) / name), device) for name in PARTS)
    with errors_named(folder):
        return GuidedVLM(guide, target, (first, second), **json.loads((Path(folder) / "guidance.json").read_text()))


def weight_files(name: str) -> list[str]:
    """The safetensors files of a checkpoint. Raises OSError if there are none, ValueError for a file elsewhere."""
    single, index = (
        cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if single:
        return [single]
    if not index:
        raise OSError(f"model ({name}) has no {SAFE_WEIGHTS_NAME}: other formats than safetensors are not loaded")
    shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    for shard in shards:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise ValueError(
                f"model ({name}): {SAFE_WEIGHTS_INDEX_NAME} names {shard!r}: must be a .safetensors file beside it"
            )
    return [cached_file(name, shard) for shard in shards]


def read_shapes(files: list[str]) -> dict[str, list[int]]:
    """Shapes of all weights, by their present names."""
    shapes = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            shapes |= {key: weights.get_slice(key).get_shape() for key in weights.keys()}
    for former, present in FORMER_NAMES.items():
        shapes = {re.sub(former, present, key): shape for key, shape in shapes.items()}
    return shapes


def check_layers(config: dict, tensors: int):
    """Raise ValueError if a configuration, with those inside it, has more layers than there are weights for.

    Even without memory for its weights, a model of a million layers takes hours to build.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_layers(value, tensors)
        elif "layers" in name and type(value) is int and value > tensors:
            raise ValueError(f"{name} ({value}) of config.json exceeds the {tensors} tensors of the weights")


def check_shapes(name: str, config: QGSAConfig, shapes: dict[str, list[int]]):
    """Raise ValueError, naming the first weight that is missing or has another shape than the configuration says."""
    with torch.device("meta"):
        model = QGSASmolVLMForConditionalGeneration(config)
    tied = model.all_tied_weights_keys
    for key, weight in model.state_dict().items():
        if key not in shapes and key not in tied:
            raise ValueError(f"model ({name}): {key} is missing in the weights")
        if key in shapes and shapes[key] != list(weight.shape):
            raise ValueError(
                f"model ({name}): {key} has the shape {shapes[key]} in the weights, but {list(weight.shape)} by "
                "config.json"
            )
