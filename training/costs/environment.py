"""Software versions, device and processor, saved with every measurement."""

import platform

import torch
import transformers

from modeling_qgsa.tuning_qgsa import processor


def environment() -> dict[str, str]:
    """Versions of Python, torch and transformers, device and processor of this process."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads",
        "processor": processor(),
    }


def describe_environment(values: dict[str, str]) -> str:
    """The values of `environment` in one phrase."""
    return ", ".join(f"{key} {value}" for key, value in values.items())
