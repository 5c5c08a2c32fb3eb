"""The output folder of a run: used by one run at a time, and never by a different one."""

import json
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainingArguments

from training.learning.store import replace_file


# May differ when a run continues: the evaluation, the quantile by which inference sets the budget, and options that
# only affect time or disk space.
MAY_DIFFER = {"eval_split", "test_size", "complexity_quantile", "feature_cache", "feature_cache_gb"}
TRAINER_FIELDS = ("seed", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")


def identity(groups: list, args: TrainingArguments) -> dict:
    """The fields that decide what is trained, and on which data.

    Args:
        groups: dataclasses of options; those of the evaluation are not part of the identity.
        args: Trainer's arguments; of those that transformers defines, only `TRAINER_FIELDS` count.
    """
    chosen = {name: value for group in groups for name, value in asdict(group).items() if name not in MAY_DIFFER}
    stock = field_names(TrainingArguments)
    own = {each.name: getattr(args, each.name) for each in fields(args) if each.name not in stock}
    return chosen | own | {name: getattr(args, name) for name in TRAINER_FIELDS}


def field_names(*kinds: type) -> set[str]:
    """The names of the fields of dataclasses."""
    return {each.name for kind in kinds for each in fields(kind)}


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint of a folder: Trainer writes its state last, so one without it was interrupted."""
    complete = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


@contextmanager
def claimed(
    folder: str | Path,
    wanted: dict,
    main_process: bool = True,
    former: Collection[str] = (),
    added: dict | None = None,
):
    """Hold an output folder for one run: a new one, or the one that the folder belongs to.

    Args:
        wanted: the run's `identity`.
        main_process: False in the other processes of a run, which rely on the first.
        former: fields that the `run.json` of an earlier version has in addition; they are not compared.
        added: fields that it lacks, with the values that were the only ones then.

    If a run fails before it has saved anything, the folder is free for another run.

    Raises ValueError, before anything is written, if a process is writing to the folder, or if it belongs to a
    different run, naming the field and both values.
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
        raise ValueError(
            f"output_dir ({folder}): another run is writing to it. Choose another folder, or wait"
        ) from error
    with lock:
        wanted = json.loads(json.dumps(wanted))
        new = not path.exists()
        if not new:
            check_same_run(folder, (added or {}) | json.loads(path.read_text()), wanted, former)
        replace_file(path, json.dumps(wanted, indent=2).encode())
        try:
            yield
        except BaseException:
            saved = ("checkpoint-*", "*/checkpoint-*", "*.safetensors", "*.jsonl")  # also those of earlier stages
            if new and not any(any(folder.glob(each)) for each in saved):
                path.unlink()  # nothing was saved: the folder is free for another run
            raise


def check_same_run(folder: Path, found: dict, wanted: dict, former: Collection[str] = ()):
    """Raise ValueError if the identities `found` and `wanted` differ; those of `former` may be absent in `wanted`."""
    for field in sorted((found.keys() - set(former)) | wanted.keys()):
        if found.get(field) != wanted.get(field):
            raise ValueError(
                f"output_dir ({folder}): it belongs to a run with {field} {found.get(field)!r}, but this run has "
                f"{wanted.get(field)!r}. Choose another folder, or remove this one"
            )
