"""The output folder of a run: one run at a time, and never another one's."""

import json
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainingArguments

from training.learning.store import replace_file


# What may differ when a run goes on: how it is evaluated, and what only costs time or space.
FREE = {"eval_split", "test_size", "test_batch_size", "max_new_tokens", "systems", "feature_cache", "feature_cache_gb"}
OF_TRAINER = ("seed", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")


def identity(run, args) -> dict:
    """What makes a run this one: the fields that decide what is trained, on what."""
    stock = {each.name for each in fields(TrainingArguments)}
    own = {each.name: getattr(args, each.name) for each in fields(args) if each.name not in stock}
    chosen = {name: value for name, value in asdict(run).items() if name not in FREE | {"preset", "task"}}
    return chosen | own | {name: getattr(args, name) for name in OF_TRAINER}


@contextmanager
def claimed(folder: str | Path, wanted: dict, main_process: bool = True):
    """Hold an output folder for one run, the one that started it, if any.

    Args:
        wanted: the run's `identity`.
        main_process: the others of a run rely on their first.

    A run that fails before it has saved anything leaves the folder to others.

    Raises ValueError, before anything is written, for a folder that a process is writing to, and for one of a run that
    differs, naming the field and both values.
    """
    if not main_process:
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, lock = folder / "run.json", FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"another run is writing to output_dir {folder}: choose another one, or wait") from error
    with lock:
        wanted = json.loads(json.dumps(wanted))
        found = json.loads(path.read_text()) if path.exists() else wanted
        for field in sorted(found | wanted):
            if found.get(field) != wanted.get(field):
                raise ValueError(
                    f"output_dir {folder} is of a run with {field} {found.get(field)!r}, this one has "
                    f"{wanted.get(field)!r}: choose another folder, or remove this one"
                )
        new = not path.exists()
        replace_file(path, json.dumps(wanted, indent=2).encode())
        try:
            yield
        except BaseException:
            if new and not (any(folder.glob("checkpoint-*")) or any(folder.glob("*.safetensors"))):
                path.unlink()  # nothing came of it: the folder is free for another run
            raise
