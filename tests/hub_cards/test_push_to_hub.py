"""Publishing through the real huggingface_hub client to a local Hub server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub


ROOT = Path(__file__).parents[2]
REPO = "org/qgsa-smolvlm-tiny"


@pytest.fixture
def folder(tmp_path):
    """A complete exported folder with very small weights."""
    folder = tmp_path / "exported"
    folder.mkdir()
    config = {"model_type": "qgsa_smolvlm", "auto_map": {"AutoConfig": "configuration_qgsa.QGSAConfig"}}
    contents = {
        "config.json": json.dumps(config),
        "processor_config.json": "{}",
        "generation_config.json": "{}",
        "configuration_qgsa.py": "# code",
        "README.md": f'---\nlicense: apache-2.0\n---\n# card\nfrom_pretrained("{REPO}")\n',
        "model.safetensors": "weights" * 100,
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    (folder / "figures").mkdir()
    (folder / "figures" / "selections.png").write_bytes(b"png")
    return folder


def push(hub, folder, *options):
    """Run the script as a user would. Returns its exit status and its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_test",
        "HF_HOME": str(folder.parent / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, ROOT / "hub_cards" / "push_to_hub.py", "--model", folder, "--repo_id", REPO, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_all_files_are_uploaded_the_card_last(folder):
    with Hub() as hub:
        status, said = push(hub, folder, "--tag", "v0.1.0")
    assert status == 0, said
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.repos[REPO] == files
    (_, first), (_, last) = hub.commits
    assert last == ["README.md"] and "README.md" not in first and set(first) == set(files) - {"README.md"}
    assert hub.tags[REPO] == {"v0.1.0": f"{2:040d}"}


def test_pushing_again_replaces_earlier_files(folder):
    with Hub() as hub:
        assert push(hub, folder)[0] == 0
        left = {"pytorch_model.bin": b"", "model-00001-of-00002.safetensors": b"", "old_qgsa.py": b"", "notes.md": b""}
        left |= {"onnx/vision_encoder.onnx": b"", "qgsa_onnx/old.py": b""}
        hub.repos[REPO] |= left
        (folder / "configuration_qgsa.py").write_text("# better code")
        status, said = push(hub, folder)
    assert status == 0, said
    assert hub.repos[REPO]["configuration_qgsa.py"] == b"# better code"
    assert set(left) & set(hub.repos[REPO]) == {"notes.md"} and "model.safetensors" in hub.repos[REPO]


def test_an_existing_tag_is_not_moved(folder):
    with Hub() as hub:
        assert push(hub, folder, "--tag", "v1")[0] == 0
        commits = len(hub.commits)
        status, said = push(hub, folder, "--tag", "v1")
        assert status == 1 and "tag (v1) already exists" in said and len(hub.commits) == commits


def test_network_errors_are_retried_and_end_in_one_line(folder):
    with Hub() as hub:
        pass  # stopped: nothing listens on that port any more
    status, said = push(hub, folder, "--attempts", "2")
    assert status == 1 and "attempt 1 of 2 failed" in said and "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("error: ")


def test_a_dry_run_writes_nothing(folder):
    with Hub() as hub:
        status, said = push(hub, folder, "--dry_run")
    assert status == 0 and "nothing was written" in said and "model.safetensors" in said and "(new)" in said
    assert hub.repos == {} and not any(call.startswith(("POST", "PUT")) for call in hub.calls)


@pytest.mark.parametrize("options", [[], ["--dry_run"]])
def test_a_model_of_another_type_is_not_overwritten(options, folder):
    with Hub() as hub:
        hub.repos[REPO] = {"config.json": b'{"model_type": "llama"}'}
        status, said = push(hub, folder, *options)
        assert status == 1 and "holds a 'llama' model" in said and "'qgsa_smolvlm'" in said and "Traceback" not in said
        assert hub.repos[REPO] == {"config.json": b'{"model_type": "llama"}'} and not hub.commits
        if not options:
            assert push(hub, folder, "--force")[0] == 0
            assert json.loads(hub.repos[REPO]["config.json"])["model_type"] == "qgsa_smolvlm"


def test_a_repository_without_a_config_is_accepted(folder):
    with Hub() as hub:
        hub.repos[REPO] = {".gitattributes": b""}
        status, said = push(hub, folder)
    assert status == 0 and "no config" in said and "model.safetensors" in hub.repos[REPO]


def test_temporary_failures_are_retried(folder):
    failures = {"/api/repos/create": 1, "/commit/main": 1, "/tag/": 1}
    with Hub(failures) as hub:
        status, said = push(hub, folder, "--tag", "v1")
    assert status == 0, said
    assert "attempt 1 of 5 failed" in said and set(hub.failures.values()) == {0}
    assert "README.md" in hub.repos[REPO] and set(hub.tags[REPO]) == {"v1"}


def test_permanent_failures_publish_no_card(folder):
    with Hub({"/commit/main": 99}) as hub:
        status, said = push(hub, folder, "--attempts", "1")
    assert status == 1 and "\nerror: " in said
    assert "README.md" not in hub.repos[REPO] and "Traceback" not in said


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda folder: (folder / "README.md").unlink(), "lacks README.md"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"lacks *.safetensors"),
        (lambda folder: (folder / "configuration_qgsa.py").unlink(), "lacks configuration_qgsa.py"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "remove pytorch_model.bin"),
        (lambda folder: (folder / "notes.txt").symlink_to("/etc/hostname"), "remove notes.txt"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / "README.md").write_text("# another"), "export it with --repo_id org/"),
    ],
)
def test_incomplete_or_unsafe_folders_are_not_published(change, complaint, folder):
    change(folder)
    with Hub() as hub:
        status, said = push(hub, folder)
    assert status == 1 and complaint in said and "Traceback" not in said
    assert hub.repos == {} and hub.calls == []


def test_the_former_option_still_works_with_a_warning(folder):
    command = [sys.executable, ROOT / "hub_cards" / "push_to_hub.py", "--folder", folder / "nope", "--repo_id", REPO]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 1 and "--folder is now called --model" in done.stderr and "lacks" in done.stderr
    assert "Traceback" not in done.stderr
