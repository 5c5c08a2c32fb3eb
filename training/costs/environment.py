"""Software versions and device, saved with every measurement."""

import platform

import torch
import transformers


def environment() -> dict[str, str]:
    """Versions of Python, torch and transformers, and the device, of this process."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads",
    }


def describe_environment(values: dict[str, str]) -> str:
    """The values of `environment` in one phrase."""
    return ", ".join(f"{key} {value}" for key, value in values.items())
