"""A batch job over a file of questions: each row once, in order, whatever happens to it."""

import json
import sys

import pytest

import training.run_answers as run_answers
import training.run_qgsa as run_qgsa
from modeling_qgsa import QGSASmolVLMForConditionalGeneration


@pytest.fixture(scope="module")
def checkpoint(make_model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def job(checkpoint, make_image, tmp_path):
    """Runs the task over seven rows: the image of row 2 is no image, that of row 4 is missing."""
    rows = []
    for number in range(7):
        make_image(number, 128, 128).save(tmp_path / f"{number}.png")
        rows.append({"id": f"row {number}", "image": f"{number}.png", "question": f"what is it, {number}?"})
    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "4.png").unlink()
    data, output = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*arguments):
        given = ["--task", "answer", "--model", checkpoint, "--data", data, "--output", output, "--batch_size", "3"]
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(sys, "argv", ["run_qgsa.py", *map(str, [*given, "--max_new_tokens", "3", *arguments])])
            run_qgsa.main()
        return [json.loads(line) for line in output.read_text().splitlines()]

    run.data, run.output, run.rows = data, output, rows
    return run


def test_each_row_is_answered_once_and_errors_are_kept(job, checkpoint, processor, capsys):
    lines = job()
    assert [{name: line[name] for name in ("id", "image", "question")} for line in lines] == job.rows
    assert [number for number, line in enumerate(lines) if "error" in line] == [2, 4]
    assert "2.png" in lines[2]["error"] and "4.png" in lines[4]["error"]
    assert "5 answers, 2 errors" in capsys.readouterr().out
    assert not job.output.with_name("answers.jsonl.parts").exists()
    model = QGSASmolVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    for number in (0, 6):
        sample = {**job.rows[number], "image": run_answers.load_image(job.data.parent / f"{number}.png")}
        (alone,) = run_answers.answer_batch(model, processor, [sample], {"max_new_tokens": 3})
        assert alone == {name: lines[number][name] for name in alone}


def test_an_interrupted_job_goes_on(job, monkeypatch):
    expected = job()
    job.output.unlink()
    answer, asked = run_answers.answer_batch, []

    def interrupted(model, processor, samples, options):
        if asked:
            raise KeyboardInterrupt
        asked.extend(sample["question"] for sample in samples)
        return answer(model, processor, samples, options)

    monkeypatch.setattr(run_answers, "answer_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job()
    assert not job.output.exists()
    part = job.output.with_name("answers.jsonl.parts") / "0.jsonl"
    assert len(part.read_text().splitlines()) == 3
    with part.open("a") as file:
        file.write('{"row": 3, "fou')  # killed while it wrote
    again = []
    monkeypatch.setattr(
        run_answers,
        "answer_batch",
        lambda *given: again.extend(each["question"] for each in given[2]) or answer(*given),
    )
    assert job() == expected
    assert not set(asked) & set(again) and len(asked) + len(again) == 5


def test_an_interrupted_job_is_not_mixed_with_another(job, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_answers, "answer_batch", fail)
    with pytest.raises(KeyboardInterrupt):
        job()
    with pytest.raises(SystemExit, match="max_image_tokens"):
        job("--max_image_tokens", "16")


def test_a_row_that_fails_costs_no_other(job, monkeypatch):
    expected, answer = job(), run_answers.answer_batch
    job.output.unlink()

    def too_long(model, processor, samples, options):
        if any("5" in sample["question"] for sample in samples):
            raise ValueError("too long")
        return answer(model, processor, samples, options)

    monkeypatch.setattr(run_answers, "answer_batch", too_long)
    lines = job()
    assert lines[5]["error"] == "too long"
    assert lines[:5] == expected[:5] and lines[6] == expected[6]


def test_the_budget_of_a_job(job):
    assert all(line["visual_tokens"] <= 8 for line in job("--max_image_tokens", "8") if "answer" in line)


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("no", r"line 1: not JSON"),
        ("[]", r"line 1: must be a JSON object, not list"),
        ('{"question": "?"}', r"line 1: image \(None\) must be a text"),
        ('{"question": " ", "image": "0.png"}', r"line 1: question \(' '\) must be a text"),
        ('{"question": "?", "image": "0.png", "answer": "x"}', r"line 1: answer would be overwritten"),
        ("", r"has 0 rows"),
    ],
)
def test_bad_files_are_refused_before_anything_is_written(job, line, complaint):
    job.data.write_text(line)
    with pytest.raises(SystemExit, match=complaint):
        job()
    assert not list(job.data.parent.glob("answers*"))


@pytest.mark.parametrize(
    "option, value, complaint",
    [
        ("--batch_size", "0", r"batch_size \(0\) must be at least 1"),
        ("--dtype", "int8", r"dtype \('int8'\): choose from"),
        ("--model", "nowhere/at/all", "neither a local folder nor a Hub id"),
        ("--max_image_tokens", "0", r"max_image_tokens \(0\)"),
        ("--vision_budget", "2", r"vision_budget \(2.0\) must be in 0 .. 1"),
    ],
)
def test_bad_options_are_refused(job, option, value, complaint):
    with pytest.raises(SystemExit, match=complaint):
        job(option, value)
    assert not list(job.data.parent.glob("answers*"))


def test_an_existing_output_stays(job):
    job.output.write_text("mine\n")
    with pytest.raises(SystemExit, match="exists already"):
        job()
    assert job.output.read_text() == "mine\n"
