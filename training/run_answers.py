"""Answer many questions about images from a file: a batch job that goes on where it was interrupted.

    python training/run_qgsa.py --task answer --model hub_cards/tiny-qgsa --data questions.jsonl --output answers.jsonl
    accelerate launch training/run_qgsa.py --task answer --model ... --data ... --output ...

Each line of `--data` is a JSON object with `question` and `image`, a path relative to the file; other fields are
copied. `--output` has the same lines in the same order, each with `answer`, `visual_tokens` and `tiles`, or with
`error` if its image cannot be read or its question cannot be answered. It appears when the job is complete; until then
the answers so far are in a folder beside it.

Processes share the rows through `accelerate`, which trains already: a scheduler such as Ray would add nothing to rows
that are independent, of one file, and answered at most once.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm
from transformers import BatchFeature

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.schedule_qgsa import schedule_of
from training.cli.arguments import check_source, errors_in_one_line, parse
from training.data.collator import QuestionCollator
from training.data.rows import IMAGE_ERRORS
from training.learning.output import claimed
from training.learning.store import replace_file


OWN_FIELDS = ("answer", "visual_tokens", "tiles", "error")  # of a line of the output
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class AnswersArguments:
    """The model, the questions, and how they are answered."""

    task: str = field(default="answer", metadata={"help": "answer; other tasks have options of their own."})
    model: str = field(default="", metadata={"help": "QGSA checkpoint: Hub id or folder; required."})
    data: str = field(default="", metadata={"help": "File of questions, one JSON object per line; required."})
    output: str = field(default="", metadata={"help": "File to write, one JSON object per line; required."})
    batch_size: int = field(default=8, metadata={"help": "Questions at once, in each process."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer, in tokens."})
    max_image_tokens: int | None = field(
        default=None, metadata={"help": "Most visual tokens per image; as configured by default."}
    )
    vision_budget: float | None = field(
        default=None, metadata={"help": "Share of the layers' work on visual tokens; as configured by default."}
    )
    dtype: str = field(default="float32", metadata={"help": f"Precision of the model: {', '.join(DTYPES)}."})

    def __post_init__(self):
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} (''): required. Give it with --{name}")
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype ({self.dtype!r}): choose from {', '.join(DTYPES)}")


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of questions. Raises ValueError, naming the line, for one that is no row, and for no rows."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"data ({path}), line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"data ({path}), line {number}: must be a JSON object, not {type(row).__name__}")
        for name in ("question", "image"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f"data ({path}), line {number}: {name} ({row.get(name)!r}) must be a text")
        taken = sorted(set(OWN_FIELDS) & row.keys())
        if taken:
            raise ValueError(f"data ({path}), line {number}: {', '.join(taken)} would be overwritten; rename it")
        rows.append(row)
    if not rows:
        raise ValueError(f"data ({path}) has 0 rows")
    return rows


def read_part(path: Path) -> dict[int, dict]:
    """What one process has answered, by row. An incomplete last line, of a process that was killed, is removed."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        replace_file(path, whole)
    lines = map(json.loads, whole.decode().splitlines())
    return {line["row"]: line["found"] for line in lines}


def load_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


@torch.no_grad()
def answer_batch(model, processor, samples: list[dict], options: dict[str, Any]) -> list[dict]:
    """The answers to samples with `image` and `question`, greedy: `answer`, `visual_tokens` and `tiles` of each."""
    lazy = {} if model.config.selection == "dense" else {"lazy_tiles": True}
    inputs = QuestionCollator(processor, with_answer=False, image_kwargs=lazy)(samples)
    inputs = BatchFeature(inputs).to(model.device)
    output = model.generate(**inputs, **options, do_sample=False, return_dict_in_generate=True)
    texts = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if lazy:
        tokens, tiles = output.selection.visual_tokens, output.selection.tiles
    else:
        tokens = (inputs["input_ids"] == model.config.image_token_id).sum(1)
        tiles = tokens // model.config.tokens_per_tile - 1
    counts = zip(texts, tokens.tolist(), tiles.tolist())
    return [{"answer": text.strip(), "visual_tokens": kept, "tiles": looked} for text, kept, looked in counts]


def answer_rows(
    model, processor, rows: list[tuple[int, dict]], folder: Path, size: int, options: dict[str, Any]
) -> Iterator[list[tuple[int, dict]]]:
    """Answer rows batch by batch: pairs of a row's number and what was found.

    A batch that fails is answered one by one, so that an error costs its own row alone.

    Args:
        folder: that the paths of images are relative to.
    """
    for start in range(0, len(rows), size):
        found, samples = [], []
        for number, row in rows[start : start + size]:
            try:
                samples.append((number, {"image": load_image(folder / row["image"]), "question": row["question"]}))
            except IMAGE_ERRORS as error:
                found.append((number, {"error": f"image ({row['image']}): {error}"}))
        try:
            answers = answer_batch(model, processor, [sample for _, sample in samples], options) if samples else []
            found += [(number, each) for (number, _), each in zip(samples, answers)]
        except (ValueError, RuntimeError):  # a prompt that is too long, memory that is too little
            for number, sample in samples:
                try:
                    found += [(number, each) for each in answer_batch(model, processor, [sample], options)]
                except (ValueError, RuntimeError) as error:
                    found.append((number, {"error": str(error)}))
        yield found


def answer_part(run: AnswersArguments, model, processor, rows: list[dict], parts: Path):
    """Answer this process's share of the rows that have no answer yet, and append each batch to its file."""
    state = PartialState()
    known = set().union(*(read_part(path) for path in sorted(parts.glob("*.jsonl"))))
    state.wait_for_everyone()  # all have read before one writes
    left = [(number, row) for number, row in enumerate(rows) if number not in known]
    options = {"max_new_tokens": run.max_new_tokens, "max_image_tokens": run.max_image_tokens}
    options |= {"vision_budget": run.vision_budget}
    mine = left[state.process_index :: state.num_processes]
    with (parts / f"{state.process_index}.jsonl").open("a", encoding="utf-8") as file:
        with tqdm(total=len(mine), desc="answering", disable=not state.is_main_process) as progress:
            for found in answer_rows(model, processor, mine, Path(run.data).parent, run.batch_size, options):
                for number, each in found:
                    file.write(json.dumps({"row": number, "found": each}) + "\n")
                file.flush()
                progress.update(len(found))


def join_parts(rows: list[dict], parts: Path, output: Path) -> int:
    """Write the output, in the order of the rows, and remove the parts; returns the number of errors."""
    found: dict[int, dict] = {}
    for path in sorted(parts.glob("*.jsonl")):
        found |= read_part(path)
    lines = [json.dumps({**row, **found[number]}, ensure_ascii=False) for number, row in enumerate(rows)]
    replace_file(output, ("\n".join(lines) + "\n").encode())
    for path in [*parts.iterdir()]:
        path.unlink()
    parts.rmdir()
    return sum("error" in each for each in found.values())


def answer_file(run: AnswersArguments):
    """Answer all questions of a file. Raises ValueError or OSError, before anything is written, for bad input."""
    state, output = PartialState(), Path(run.output)
    check_source(run.model)
    rows = read_questions(Path(run.data))
    if output.exists():
        raise ValueError(f"output ({output}) exists already; choose another file, or remove it")
    model = QGSASmolVLMForConditionalGeneration.from_pretrained(run.model, dtype=run.dtype).eval().to(state.device)
    processor = QGSAProcessor.from_pretrained(run.model, backend="pil")
    Budget.of(model.config, run.max_image_tokens)
    schedule_of(model.config, run.vision_budget)
    parts = output.with_name(f"{output.name}.parts")
    identity = {name: value for name, value in asdict(run).items() if name not in ("batch_size", "output")}
    with claimed(parts, identity | {"rows": len(rows)}, state.is_main_process):
        state.wait_for_everyone()
        answer_part(run, model, processor, rows, parts)
        gather_object([state.process_index])  # all are done
        if state.is_main_process:
            errors = join_parts(rows, parts, output)
            print(f"{output}: {len(rows) - errors} answers, {errors} errors")


def main():
    run = parse(AnswersArguments, __doc__)
    with errors_in_one_line():
        answer_file(run)


if __name__ == "__main__":
    main()
