"""Publish a folder that `hub_cards/export.py` made.

    python hub_cards/push_to_hub.py --folder outputs/hub/qgsa-smolvlm-256m --repo_id org/qgsa-smolvlm-256m --dry_run
    python hub_cards/push_to_hub.py --folder outputs/hub/qgsa-smolvlm-256m --repo_id org/qgsa-smolvlm-256m --tag v0.1.0

Weights and code go first, in one commit, and the card last: who reads the card finds all that it speaks of. A
repository that holds a model of another type is left alone without `--force`. Uploads that fail for reasons of the
network or the server are tried again. Log in first (`hf auth login`), or set HF_TOKEN.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import httpx

from training.cli.arguments import parse


CARD = "README.md"
# What an earlier push may have left, and would be loaded in the place of what is uploaded, or beside it.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.py", "adapter_*"]
TEMPORARY = (httpx.TransportError, ConnectionError, TimeoutError, LocalEntryNotFoundError)
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


@dataclass
class PushArguments:
    """What to publish, and where."""

    folder: str = field(metadata={"help": "Folder to upload, with config, weights, processor and card."})
    repo_id: str = field(metadata={"help": "Repository of the Hub: org/name. It is made if it is not there."})
    tag: str | None = field(default=None, metadata={"help": "New tag for what was uploaded, such as v0.1.0."})
    private: bool = field(default=False, metadata={"help": "Make a new repository a private one."})
    dry_run: bool = field(default=False, metadata={"help": "Say what would be done, and write nothing."})
    force: bool = field(default=False, metadata={"help": "Overwrite a model of another type too."})
    attempts: int = field(default=5, metadata={"help": "How often to try, waiting 1, 2, 4 ... seconds in between."})


def main():
    run = parse(PushArguments, __doc__)
    try:
        push(run)
    except (OSError, ValueError, httpx.TransportError) as error:
        sys.exit(f"error: {error}")


def push(run: PushArguments, api: HfApi | None = None):
    """Publish `run.folder`. Raises ValueError, before anything is written, for a folder or repository it must not."""
    api, folder = api or HfApi(), Path(run.folder)
    files, ours = check_folder(folder, run.repo_id)
    theirs = model_type_of(api, run)
    if theirs not in (None, "", ours) and not run.force:
        raise ValueError(
            f"repo_id {run.repo_id} holds a {theirs!r} model, {folder} a {ours!r} one: --force overwrites it"
        )
    if run.tag and theirs is not None:
        for tag in attempt(run, lambda: api.list_repo_refs(run.repo_id)).tags:
            if tag.name == run.tag:
                raise ValueError(f"tag {run.tag} is there already, at {tag.target_commit[:10]}: choose another one")
    for path in files:
        print(f"{path.stat().st_size / 1e6:10.2f} MB  {path.relative_to(folder)}")
    state = "new" if theirs is None else f"there, {theirs or 'no config'}"
    print(f"{len(files)} files to {api.endpoint}/{run.repo_id} ({state})")
    if run.dry_run:
        print("dry run: nothing was written")
        return
    attempt(run, lambda: api.create_repo(run.repo_id, private=run.private, exist_ok=True))
    upload = {"repo_id": run.repo_id, "folder_path": folder}
    message = f"Upload {ours} checkpoint"
    attempt(
        run,
        lambda: api.upload_folder(**upload, ignore_patterns=[CARD], delete_patterns=REPLACED, commit_message=message),
    )
    card = attempt(run, lambda: api.upload_folder(**upload, allow_patterns=[CARD], commit_message="Model card"))
    if run.tag:
        attempt(run, lambda: api.create_tag(run.repo_id, tag=run.tag, revision=card.oid, exist_ok=True))
    print(f"published: {api.endpoint}/{run.repo_id}")


def check_folder(folder: Path, repo_id: str) -> tuple[list[Path], str]:
    """The files of an exported folder and its model type.

    Raises ValueError where something is missing that a checkpoint needs, where there is something that none of ours
    has (pickled weights, links, hidden files), and for a card that loads another repository.
    """
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    names = {str(path.relative_to(folder)) for path in files}
    lacking = {"config.json", "processor_config.json", "generation_config.json", CARD} - names
    if not any(name.endswith(".safetensors") for name in names):
        lacking.add("*.safetensors")
    config = {} if "config.json" in lacking else read_config(folder / "config.json")
    modules = {reference.split(".")[0] + ".py" for reference in config.get("auto_map", {}).values()}
    lacking |= modules - names
    if lacking:
        raise ValueError(f"folder {folder} lacks {', '.join(sorted(lacking))}: make it with hub_cards/export.py")
    foreign = [path.name for path in files if path.suffix in PICKLES or path.name.startswith(".") or path.is_symlink()]
    if foreign:
        raise ValueError(f"folder {folder} holds {', '.join(foreign)}: no pickles, links or hidden files are uploaded")
    if f'"{repo_id}"' not in (folder / CARD).read_text():
        raise ValueError(f"{folder / CARD} does not load {repo_id}: export it with --repo_id {repo_id}")
    return files, config["model_type"]


def model_type_of(api: HfApi, run: PushArguments) -> str | None:
    """The model type in the repository; "" where it has no config, None where there is no repository."""
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
    """The content of a `config.json`. Raises ValueError, naming it, where it is no JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def attempt(run: PushArguments, action):
    """Do `action`, again where the network or the server failed, `run.attempts` times in all; returns its result."""
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
