"""Software versions, device and processor, saved with every measurement."""

import platform
from pathlib import Path

import torch
import transformers


INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # seconds differ by them, most of all in bfloat16


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the processor and which of `INSTRUCTION_SETS` it has, such as "Intel(R) Xeon(R) Processor (avx2)".

    Args:
        cpuinfo: where Linux describes it; without a name there, it is the one that Python's `platform` knows.
    """
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    entries = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = entries.get("model name") or platform.processor() or platform.machine()
    found = set(entries.get("flags", "").split())
    sets = ", ".join(each for each in INSTRUCTION_SETS if each in found)
    return f"{name} ({sets})" if sets else name


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
