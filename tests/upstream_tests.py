"""transformers' own tests, as `make upstream` fetches them: a package made of the files of its source distribution."""

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest


FOLDER = Path(__file__).parents[1] / ".upstream" / "tests"
IMAGE = FOLDER.parents[1] / "hub_cards" / "space" / "examples" / "cards_0.png"  # for all of their addresses
PACKAGE = "transformers_tests"
# Modules that the tests import and the source distribution lacks, each with what is imported from it.
ABSENT = {
    "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: str(IMAGE)},
    "transformers_tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "transformers_tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
}


def load(name: str):
    """The module `name` of transformers' tests. Skips the tests that ask for it if it is not there."""
    if not FOLDER.is_dir():
        pytest.skip("transformers' own tests are not there: run make upstream", allow_module_level=True)
    pytest.importorskip("parameterized", reason="transformers' own tests need parameterized")
    if PACKAGE not in sys.modules:
        add_package(PACKAGE, FOLDER)
        for path, contents in ABSENT.items():
            *parent, _ = path.rpartition(".")
            if parent[0]:
                add_package(parent[0], FOLDER / parent[0].rpartition(".")[2])
            module = ModuleType(path)
            vars(module).update(contents)
            sys.modules[path] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # markers of their own configuration
        return importlib.import_module(f"{PACKAGE}.{name}")


def add_package(name: str, folder: Path):
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
