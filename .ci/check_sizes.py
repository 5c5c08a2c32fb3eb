"""Fail if a tracked file exceeds 10 MB, or a Python file of modeling_qgsa/ or training/ 500 lines."""

import subprocess
import sys
from pathlib import Path


MAX_BYTES = 10 * 2**20  # as in .pre-commit-config.yaml
MAX_LINES = 500
SHORT_FILES = ("modeling_qgsa/", "training/")


def oversized(root: Path) -> list[str]:
    """Tracked files of the repository `root` that exceed a limit, one line each."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    complaints = []
    for name in filter(None, listed.split("\0")):
        path = root / name
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_BYTES:
            complaints.append(f"{name} ({path.stat().st_size / 2**20:.1f} MB) must not exceed {MAX_BYTES >> 20} MB")
        if name.startswith(SHORT_FILES) and name.endswith(".py"):
            lines = len(path.read_text().splitlines())
            if lines > MAX_LINES:
                complaints.append(f"{name} ({lines} lines) must not exceed {MAX_LINES} lines: split it")
    return complaints


if __name__ == "__main__":
    sys.exit("\n".join(oversized(Path.cwd())) or None)
