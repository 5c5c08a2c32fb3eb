"""Who may import whom: the diagram of CONTRIBUTING is the code's own, and nothing goes the wrong way."""

import ast
import re
import sys
from pathlib import Path

import pytest

from modeling_qgsa.configuration_qgsa import AUTO_MAP


ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
THIRD_PARTY = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}
SCRIPTS = {path.stem for path in (ROOT / "hub_cards").glob("*.py")}


def code_block(section: str) -> list[str]:
    """The lines of the first code block of a section of CONTRIBUTING."""
    return PAGE.split(f"## {section}\n", 1)[1].split("```\n")[1].strip().splitlines()


DIAGRAM = {line.split(None, 1)[0]: line.split(None, 1)[1] for line in code_block("Who imports whom")}
LAYERS = [line.split()[0] for line in code_block("Where things are")]


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports; those of its own package begin with a dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def place(module: str) -> str | None:
    """The place of the diagram to which an imported module belongs; None for third parties."""
    top, *rest = module.split(".")
    if top == "training":
        return next(name for name in (f"training/{rest[0]}", f"training/{rest[0]}.py") if (ROOT / name).exists())
    return "hub_cards" if top in SCRIPTS else top if top == "modeling_qgsa" else None


def files_of(name: str) -> list[Path]:
    path = ROOT / name
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def test_the_diagram_has_every_place():
    doors = {f"training/{path.name}" for path in (ROOT / "training").glob("*.py") if path.stem != "__init__"}
    rooms = {f"training/{path.parent.name}" for path in (ROOT / "training").glob("*/*.py")}
    assert set(DIAGRAM) == {"modeling_qgsa", "hub_cards"} | doors | rooms


@pytest.mark.parametrize("name", DIAGRAM)
def test_the_diagram_is_that_of_the_code(name):
    found = {place(module) for path in files_of(name) for module in imports(path)} - {None, name}
    assert DIAGRAM[name] == (", ".join(sorted(found)) or "-")


@pytest.mark.parametrize("name", DIAGRAM)
def test_a_place_imports_only_places_above_it(name):
    above = list(DIAGRAM)[: list(DIAGRAM).index(name)]
    assert set(DIAGRAM[name].split(", ")) - {"-"} <= set(above)


@pytest.mark.parametrize("name", LAYERS)
def test_a_file_of_the_model_imports_only_files_above_it(name):
    found = imports(ROOT / "modeling_qgsa" / name)
    assert {f"{module[1:]}.py" for module in found if module.startswith(".")} <= set(LAYERS[: LAYERS.index(name)])
    outside = {module.split(".")[0] for module in found if not module.startswith(".")}
    standard = {
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "functools",
        "hashlib",
        "heapq",
        "inspect",
        "itertools",
        "json",
        "math",
        "numbers",
        "os",
        "pathlib",
        "platform",
    }
    assert outside <= THIRD_PARTY | standard | {"time", "types", "typing", "weakref"}


@pytest.mark.parametrize("name", sorted({each.split(".")[0] for each in AUTO_MAP.values()}))
def test_a_file_of_a_class_imports_all_that_it_reaches(name):
    """Directly: from a local folder, older transformers copy only the files that it imports itself."""
    own = {module[1:] for module in imports(ROOT / "modeling_qgsa" / f"{name}.py") if module.startswith(".")}
    for each in own:
        reached = {module[1:] for module in imports(ROOT / "modeling_qgsa" / f"{each}.py") if module.startswith(".")}
        assert reached <= own, each


def test_every_file_of_the_model_is_listed():
    assert set(LAYERS) == {path.name for path in (ROOT / "modeling_qgsa").glob("*_qgsa.py")}


def test_the_runtime_of_onnx_graphs_imports_neither_torch_nor_transformers():
    found = {module for path in files_of("hub_cards/qgsa_onnx") for module in imports(path)}
    outside = {module.split(".")[0] for module in found if not module.startswith(".")} - set(sys.stdlib_module_names)
    assert outside == {"numpy", "PIL", "tokenizers", "onnxruntime"}


def test_training_names_no_folder_of_hub_cards():
    """Not through a path either. Docstrings and help texts may show a command."""
    for path in (ROOT / "training").rglob("*.py"):
        tree = ast.parse(path.read_text())
        shown = {ast.get_docstring(tree, clean=False)}
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "help":
                shown |= {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not [text for text in strings - shown if isinstance(text, str) and "hub_cards" in text], path


def test_no_script_changes_the_import_path():
    for folder in ("modeling_qgsa", "training", "hub_cards", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path == Path(__file__) or not re.search(r"sys\.path|noqa: E402", path.read_text()), path
