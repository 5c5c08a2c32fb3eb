"""The wheel contains `modeling_qgsa` and nothing else, and the first snippet of the README runs with it alone."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

import modeling_qgsa


ROOT = Path(__file__).parents[1]
NOT_CLONED = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A folder with a copy of the repository, as `git clone` leaves it, and the wheel installed in `installed`."""
    folder = tmp_path_factory.mktemp("fresh")
    shutil.copytree(ROOT, folder / "qgsa-smolvlm", ignore=NOT_CLONED)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", "./qgsa-smolvlm"]
    subprocess.run(build, cwd=folder, check=True)
    (wheel,) = (folder / "dist").glob("qgsa_smolvlm-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "installed", wheel], check=True)
    return folder


def test_the_wheel_contains_the_package_only(fresh):
    (wheel,) = (fresh / "dist").glob("*.whl")
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
    modules = {f"modeling_qgsa/{path.name}" for path in (ROOT / "modeling_qgsa").glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == {*modules, "modeling_qgsa/py.typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert f"\nVersion: {modeling_qgsa.__version__}\n" in metadata and "License-Expression: Apache-2.0" in metadata


def test_the_first_snippet_runs_with_the_wheel_alone(fresh):
    """Without `site` Python reads no .pth files, which would add an editable install of this repository."""
    (code, *_) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.S | re.M)
    code = code.replace("HuggingFaceTB/SmolVLM-256M-Instruct", "qgsa-smolvlm/hub_cards/tiny-dense")  # no network here
    (fresh / "snippet.py").write_text(code)
    check = (
        "import importlib.util, runpy; runpy.run_path('snippet.py'); import modeling_qgsa; "
        "print(modeling_qgsa.__file__, importlib.util.find_spec('training'), importlib.util.find_spec('hub_cards'))"
    )
    paths = [str(fresh / "installed"), *{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-S", "-c", check]
    done = subprocess.run(command, cwd=fresh, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, found = done.stdout.strip().splitlines()
    assert answer.strip() == "moon"
    assert found == f"{fresh / 'installed' / 'modeling_qgsa' / '__init__.py'} None None"
