"""Versions, citation, changelog, continuous integration and the limits of file sizes agree with each other."""

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import modeling_qgsa


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (newest, *_) = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    plugin = tomllib.loads((ROOT / "hub_cards" / "qgsa_vllm" / "pyproject.toml").read_text())["project"]["version"]
    assert modeling_qgsa.__version__ == plugin == citation["version"] == newest


def test_the_changelog_links_every_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\]", text, re.M)
    assert versions and re.findall(r"^\[(.+?)\]: https://\S+$", text, re.M) == versions
    sections = set(re.findall(r"^### (.+)$", text, re.M))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_is_valid():
    """The required fields of CFF 1.2.0, for the software and for each reference."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["message"]
    assert citation["license"] == PROJECT["license"] and citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert [reference["year"] for reference in citation["references"]] == [2026, 2025, 2026, 2025]
    for work in [citation, *citation["references"]]:
        assert work["title"] and all(author.get("name") or author.get("given-names") for author in work["authors"])
    assert all(reference["type"] in ("conference-paper", "article") for reference in citation["references"])


def test_the_workflow_runs_all_checks():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["ci"]["steps"]
    assert {"run": ".ci/run"} in steps
    assert {"python-version": "3.11"} in [step.get("with") for step in steps]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_pre_commit_runs_the_checks_of_make_quality():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: (repo["rev"], hook) for repo in repos for hook in repo["hooks"]}
    assert set(hooks) == {"ruff-check", "ruff-format", "check-added-large-files", "codespell"}
    for hook, package in {"ruff-check": "ruff", "ruff-format": "ruff", "codespell": "codespell"}.items():
        assert hooks[hook][0] == f"v{CONSTRAINTS[package]}"
    assert hooks["check-added-large-files"][1]["args"] == [f"--maxkb={check_sizes().MAX_BYTES // 1024}"]
    make = subprocess.run(["make", "-n", "quality"], cwd=ROOT, capture_output=True, text=True).stdout
    for command in ("ruff check .", "ruff format --check .", "/codespell\n", "/mypy\n", "check_sizes.py\n"):
        assert command in make


def test_make_lets_threads_spin_briefly_unless_told_otherwise(monkeypatch):
    """Beside one busy program, OpenMP's default slows a training step of the demo down from 2 seconds to 7 or more."""

    def setting():
        command = ["make", "--no-print-directory", "--eval", "show: ; @echo $$GOMP_SPINCOUNT", "show"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert setting() == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assert setting() == "5"


@pytest.mark.parametrize("name", ["README.md", "Makefile", "training/run_qgsa.py", "training/presets/demo.yaml"])
def test_the_time_of_the_demo_names_the_processor(name):
    text = (ROOT / name).read_text()
    assert "about 8 minutes on two cores with AVX-512, 10 with AVX2 only" in text and text.count("8 minutes") == 1


def test_tools_are_constrained_and_no_index_is_named():
    dev = {re.split("[>=<\\[]", name)[0] for name in PROJECT["optional-dependencies"]["dev"]} - {"qgsa-smolvlm"}
    assert {name.replace("-", "_") for name in dev} <= {name.replace("-", "_") for name in CONSTRAINTS}
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run", ".github/workflows/ci.yml"):
        assert "index-url" not in (ROOT / name).read_text() and "pypi" not in (ROOT / name).read_text().lower()


def check_sizes():
    spec = importlib.util.spec_from_file_location("check_sizes", ROOT / ".ci" / "check_sizes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name, size, complaint",
    [
        ("weights.bin", 10 * 2**20, None),
        ("weights.bin", 10 * 2**20 + 1, "weights.bin (10.0 MB) must not exceed 10 MB"),
        ("training/data/long.py", 500, None),
        ("training/data/long.py", 501, "training/data/long.py (501 lines) must not exceed 500 lines: split it"),
        ("modeling_qgsa/long.py", 501, "modeling_qgsa/long.py (501 lines) must not exceed 500 lines: split it"),
        ("tests/long.py", 501, None),
    ],
)
def test_file_sizes(name, size, complaint, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"\n" * size)
    (tmp_path / "untracked.bin").write_bytes(b"\n" * (10 * 2**20 + 1))
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", name], cwd=tmp_path, check=True)
    assert check_sizes().oversized(tmp_path) == [complaint] * (complaint is not None)
