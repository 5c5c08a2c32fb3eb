"""Checkpoints as earlier versions saved them."""

import re
from pathlib import Path

from safetensors.torch import load_file, save_file


def to_former_names(path: Path):
    """Rename the weights of a safetensors file as version 0.2 named them."""
    weights = load_file(path)
    former = {re.sub(r"(self_attn\.in_proj)\.", r"\1_", name): weight for name, weight in weights.items()}
    assert sum(name.endswith(("in_proj_weight", "in_proj_bias")) for name in former) == 4
    save_file(former, path, metadata={"format": "pt"})
