"""Tensors on disk by key, for the outputs of frozen networks: computed once, then read."""

import json
import os
from pathlib import Path

import torch
import xxhash
from filelock import FileLock
from safetensors.torch import load, save


class TensorStore:
    """A folder of tensors from one maker, limited in size and safe to share between processes.

    When the store is full, new tensors are not stored and old ones stay: epochs visit the images in turn, so evicting
    the oldest would drop each tensor just before it is needed again.

    Args:
        folder: created if it does not exist.
        maker: everything that the tensors depend on, such as hashes of the model and the processor.
        max_bytes: size limit of all tensors together.

    Raises ValueError, naming the field and both values, if the folder has another maker; the folder is not modified.
    """

    def __init__(self, folder: str | Path, maker: dict[str, str], max_bytes: int):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".lock")
        with self.lock:
            self._check_maker(maker)
            self._write_size(sum(path.stat().st_size for path in self.folder.glob("*/*.safetensors")))

    def _check_maker(self, maker: dict[str, str]):
        path = self.folder / "maker.json"
        if not path.exists():
            if any(self.folder.glob("*/*")):
                raise ValueError(f"{self.folder}: not a store (no maker.json among its files). Choose another folder")
            replace_file(path, json.dumps(maker, indent=2).encode())
        found = json.loads(path.read_text())
        for field in sorted(set(found) | set(maker)):
            if found.get(field) != maker.get(field):
                raise ValueError(
                    f"{self.folder}: it was made with {field} {found.get(field)}, but this run has "
                    f"{maker.get(field)}. Choose another folder, or remove this one"
                )

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _write_size(self, size: int):
        (self.folder / "size").write_text(str(size))

    def get(self, key: str) -> torch.Tensor | None:
        """The tensor, on the CPU; None if it is not stored."""
        path = self._path(key)
        return load(path.read_bytes())["tensor"] if path.exists() else None

    def put(self, key: str, tensor: torch.Tensor):
        """Store a tensor, if it is new and there is room."""
        content, path = save({"tensor": tensor.detach().cpu().contiguous()}), self._path(key)
        with self.lock:
            size = int((self.folder / "size").read_text()) + len(content)
            if size > self.max_bytes or path.exists():
                return
            path.parent.mkdir(exist_ok=True)
            replace_file(path, content)
            self._write_size(size)


def replace_file(path: Path, content: bytes):
    """Write a file atomically: readers see the old content or the new one, never a part."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)


def digest(*tensors: torch.Tensor) -> str:
    """XXH3 (128 bits) of shapes, dtypes and values: about 20 times faster than SHA-256."""
    seen = xxhash.xxh3_128()
    for tensor in tensors:
        seen.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        seen.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return seen.hexdigest()
