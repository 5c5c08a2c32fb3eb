"""Publish a folder exported by `hub_cards/export.py`.

    python hub_cards/push_to_hub.py --model outputs/hub/qgsa-smolvlm-256m --repo_id org/qgsa-smolvlm-256m --dry_run
    python hub_cards/push_to_hub.py --model outputs/hub/qgsa-smolvlm-256m --repo_id org/qgsa-smolvlm-256m --tag v0.1.0

Weights and code are uploaded first, in one commit, and the card last, so that everything the card mentions is already
there. A repository with a model of another type is only overwritten with `--force`. Uploads that fail because of the
network or the server are retried. Log in first (`hf auth login`), or set HF_TOKEN.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import httpx

from training.cli.arguments import errors_in_one_line, parse


CARD = "README.md"
# Leftovers of earlier uploads.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.onnx", "*.py", "adapter_*"]
TEMPORARY = (httpx.TransportError, ConnectionError, TimeoutError, LocalEntryNotFoundError)
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
RENAMED = {"--folder": "--model"}


@dataclass
class PushArguments:
    """Folder to publish and its repository."""

    model: str = field(metadata={"help": "Exported folder, with config, weights, processor and card."})
    repo_id: str = field(metadata={"help": "Hub repository (org/name); created if it does not exist."})
    tag: str | None = field(default=None, metadata={"help": "New tag for this upload, such as v0.1.0."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    dry_run: bool = field(default=False, metadata={"help": "List what would be uploaded, without writing anything."})
    force: bool = field(default=False, metadata={"help": "Overwrite a model of another type."})
    attempts: int = field(default=5, metadata={"help": "Attempts per request, 1, 2, 4 ... seconds apart."})


def main():
    run = parse(PushArguments, __doc__, RENAMED)
    with errors_in_one_line():
        try:
            push(run)
        except httpx.TransportError as error:  # not an OSError
            raise ConnectionError(error) from error


def push(run: PushArguments, api: HfApi | None = None):
    """Publish `run.model`. Raises ValueError before any upload if folder, repository or tag do not allow it."""
    api, folder = api or HfApi(), Path(run.model)
    files, model_type = check_folder(folder, run.repo_id)
    existing = model_type_of(api, run)
    if existing not in (None, "", model_type) and not run.force:
        raise ValueError(
            f"repo_id ({run.repo_id}) holds a {existing!r} model, not {model_type!r}: --force overwrites it"
        )
    if run.tag and existing is not None:
        for tag in attempt(run, lambda: api.list_repo_refs(run.repo_id)).tags:
            if tag.name == run.tag:
                raise ValueError(f"tag ({run.tag}) already exists at {tag.target_commit[:10]}: choose another name")
    for path in files:
        print(f"{path.stat().st_size / 1e6:10.2f} MB  {path.relative_to(folder)}")
    state = "new" if existing is None else f"existing, {existing or 'no config'}"
    print(f"{len(files)} files to {api.endpoint}/{run.repo_id} ({state})")
    if run.dry_run:
        print("dry run: nothing was written")
        return
    attempt(run, lambda: api.create_repo(run.repo_id, private=run.private, exist_ok=True))
    upload = {"repo_id": run.repo_id, "folder_path": folder}
    message = f"Upload {model_type} checkpoint"
    attempt(
        run,
        lambda: api.upload_folder(**upload, ignore_patterns=[CARD], delete_patterns=REPLACED, commit_message=message),
    )
    card = attempt(run, lambda: api.upload_folder(**upload, allow_patterns=[CARD], commit_message="Model card"))
    if run.tag:
        attempt(run, lambda: api.create_tag(run.repo_id, tag=run.tag, revision=card.oid, exist_ok=True))
    print(f"published: {api.endpoint}/{run.repo_id}")


def check_folder(folder: Path, repo_id: str) -> tuple[list[Path], str]:
    """Check an exported folder. Returns its files and its model type.

    Raises ValueError if a required file is missing, if there are pickled weights, links or hidden files, or if the
    card loads another repository.
    """
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    names = {str(path.relative_to(folder)) for path in files}
    missing = {"config.json", "processor_config.json", "generation_config.json", CARD} - names
    if not any(name.endswith(".safetensors") for name in names):
        missing.add("*.safetensors")
    config = {} if "config.json" in missing else read_config(folder / "config.json")
    modules = {reference.split(".")[0] + ".py" for reference in config.get("auto_map", {}).values()}
    missing |= modules - names
    if missing:
        raise ValueError(f"model ({folder}) lacks {', '.join(sorted(missing))}: export it with hub_cards/export.py")
    unsafe = [path.name for path in files if path.suffix in PICKLES or path.name.startswith(".") or path.is_symlink()]
    if unsafe:
        raise ValueError(
            f"model ({folder}) must not contain pickles, links or hidden files: remove {', '.join(unsafe)}"
        )
    if f'"{repo_id}"' not in (folder / CARD).read_text():
        raise ValueError(f"the card ({folder / CARD}) does not load {repo_id}: export it with --repo_id {repo_id}")
    return files, config["model_type"]


def model_type_of(api: HfApi, run: PushArguments) -> str | None:
    """Model type of the repository; "" if it has no config, None if it does not exist."""
    try:
        files = attempt(run, lambda: api.model_info(run.repo_id)).siblings
    except RepositoryNotFoundError:
        return None
    if "config.json" not in {file.rfilename for file in files}:
        return ""
    with TemporaryDirectory() as folder:
        path = attempt(run, lambda: api.hf_hub_download(run.repo_id, "config.json", cache_dir=folder))
        return read_config(Path(path)).get("model_type", "")


def read_config(path: Path) -> dict:
    """Content of a `config.json`. Raises ValueError if it is not valid JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def attempt(run: PushArguments, action):
    """Return `action()`, retried up to `run.attempts` times after network and server errors."""
    for number in range(run.attempts):
        try:
            return action()
        except (HfHubHTTPError, *TEMPORARY) as error:
            temporary = isinstance(error, TEMPORARY) or error.response.status_code in (408, 429, 500, 502, 503, 504)
            if not temporary or number == run.attempts - 1:
                raise
            print(f"attempt {number + 1} of {run.attempts} failed: {error}")
            time.sleep(2**number)


if __name__ == "__main__":
    main()
