"""The harnesses give our own evaluation's answers and scores, question by question."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
from PIL import Image
from torch.utils.data import Subset

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.data.cards import Cards
from training.evaluation.answers import answer
from training.evaluation.grading import score_rows
from training.evaluation.systems import System
from training.harness import documents


ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "hub_cards" / "tiny-qgsa"
REAL = ROOT.parent / "shared" / "data" / "vqa_rad"
TASKS = ROOT / "training" / "harness"

COUNT = 24
FEW = 8  # of VQA-RAD in lm-eval, which encodes the large images at length for its log
GLANCE = {"max_tiles": 0, "max_visual_tokens": 8}  # too little for most cards

needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="VQA-RAD is not at ../shared/data/vqa_rad")

# In a process of its own, as the code of the checkpoint is imported.
LM_EVAL = """
import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager

folders, runs, written = json.loads(sys.argv[1])
report = {}
for name, (tasks, model, limit) in runs.items():
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=model)
    report[name] = lm_eval.simple_evaluate(
        "hf-multimodal",
        model,
        tasks,
        task_manager=manager,
        apply_chat_template=True,
        batch_size=16,
        device="cpu",
        limit=limit,
        bootstrap_iters=0,
    )
with open(written, "w") as file:
    json.dump(report, file, default=str)
"""

BLANK_TASK = """
include: {cards}
task: qgsa_cards_blank
doc_to_image: !function blank.images
"""
BLANK_CODE = """
from PIL import Image


def images(document):
    return [Image.new("RGB", document["image"].size, (128,) * 3)]
"""


@dataclass
class Run:
    """What a harness wrote of a task: the answers in the order of the questions, their scores and the means."""

    answers: list[str]
    accuracies: list[float]
    means: dict[str, float]


def read_run(rows: list[dict], means: dict) -> Run:
    """A run from the logged samples and the results of a task, which both harnesses write in much the same form."""
    rows = sorted(rows, key=lambda row: row["doc_id"])
    said = [row["filtered_resps"] for row in rows]
    return Run(
        [(text[0] if isinstance(text, list) else text).strip() for text in said],
        [row["accuracy"] for row in rows],
        {name.removesuffix(",none"): value for name, value in means.items()},
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tiny trained checkpoint as it is uploaded, with its code."""
    folder = tmp_path_factory.mktemp("checkpoint")
    QGSASmolVLMForConditionalGeneration.from_pretrained(SHIPPED).save_pretrained(folder)
    QGSAProcessor.from_pretrained(SHIPPED).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(checkpoint):
    """With the pixels that lm-eval's `AutoProcessor` makes: those of torchvision, where that is installed."""
    return QGSAProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def aokvqa(tmp_path_factory):
    """A folder in A-OKVQA's schema, about pictures that the tiny model knows."""
    rows = []
    for sample in Cards("test", 150):
        if sample["family"] == "choice":
            rows.append(
                {
                    "image": sample["image"],
                    "question_id": str(sample["question_id"]),
                    "question": sample["question"].partition(" choose from")[0],
                    "choices": sample["choices"],
                    "correct_choice_idx": sample["choices"].index(sample["answer"]),
                    "direct_answers": str([sample["answer"]] * 10),
                    "difficult_direct_answer": False,
                }
            )
    folder = tmp_path_factory.mktemp("aokvqa")
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "validation.parquet")
    return folder


@pytest.fixture(scope="module")
def environment(aokvqa, tmp_path_factory):
    variables = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "QGSA_AOKVQA_DIR": str(aokvqa),
        "OMP_NUM_THREADS": "1",
    }
    return os.environ | variables | ({"QGSA_VQA_RAD_DIR": str(REAL)} if REAL.is_dir() else {})


@pytest.fixture(scope="module")
def lm_eval_run(checkpoint, environment, tmp_path_factory):
    """Gives the `Run` of a task in lm-eval: "plain" has cards, also with a blank image, and A-OKVQA, "few" VQA-RAD."""
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "blank.yaml").write_text(BLANK_TASK.format(cards=TASKS / "lm_eval_tasks" / "qgsa_cards.yaml"))
    (folder / "blank.py").write_text(BLANK_CODE)
    model = {"pretrained": str(checkpoint), "trust_remote_code": True}
    runs = {
        "plain": (["qgsa_cards", "qgsa_cards_blank", "qgsa_aokvqa"], model, COUNT),
        "glance": (["qgsa_cards"], model | GLANCE, COUNT),
    }
    if REAL.is_dir():
        runs["few"] = (["qgsa_vqa_rad"], model, FEW)
    written = folder / "report.json"
    arguments = json.dumps([[str(TASKS / "lm_eval_tasks"), str(folder)], runs, str(written)])
    subprocess.run([sys.executable, "-c", LM_EVAL, arguments], cwd=ROOT, env=environment, check=True)
    report = json.loads(written.read_text())
    return lambda run, task: read_run(report[run]["samples"][task], report[run]["results"][task])


def our_answers(processor, dataset: str, count: int, max_new_tokens: int, options: dict):
    """What our evaluation says to the first `count` questions of a data set, and the score of each, both in lists."""
    system = System("qgsa", QGSASmolVLMForConditionalGeneration.from_pretrained(SHIPPED), options)
    samples = documents.LOADERS[dataset]()
    (answers,), told = answer([system], Subset(samples, range(min(count, len(samples)))), processor, 7, max_new_tokens)
    return answers.predictions, score_rows(dataset, answers.predictions, told).tolist()


def assert_same(run: Run, answers: list[str], accuracies: list[float]):
    assert run.answers == answers
    assert run.accuracies == accuracies
    assert run.means["accuracy"] == pytest.approx(sum(accuracies) / len(accuracies))


@pytest.mark.parametrize(
    ("dataset", "group", "count", "max_new_tokens"),
    [
        ("cards", "plain", COUNT, 8),
        ("aokvqa", "plain", COUNT, 8),
        pytest.param("vqa_rad", "few", FEW, 16, marks=needs_real_data),
    ],
)
def test_lm_eval_scores_as_we_do(dataset, group, count, max_new_tokens, lm_eval_run, processor, aokvqa, monkeypatch):
    monkeypatch.setenv("QGSA_AOKVQA_DIR", str(aokvqa))
    monkeypatch.setenv("QGSA_VQA_RAD_DIR", str(REAL))
    run = lm_eval_run(group, f"qgsa_{dataset}")
    assert_same(run, *our_answers(processor, dataset, count, max_new_tokens, {}))
    assert len(set(run.answers)) > 3
    assert ("closed" in run.means) == (dataset == "vqa_rad")


def test_budgets_reach_the_model_through_lm_eval(lm_eval_run, processor):
    run = lm_eval_run("glance", "qgsa_cards")
    assert_same(run, *our_answers(processor, "cards", COUNT, 8, GLANCE))
    assert run.means["accuracy"] < lm_eval_run("plain", "qgsa_cards").means["accuracy"] - 0.3


def test_the_image_reaches_the_model_through_lm_eval(lm_eval_run):
    seen, blank = (lm_eval_run("plain", task).means["accuracy"] for task in ("qgsa_cards", "qgsa_cards_blank"))
    assert seen > 0.75 and blank < seen - 0.4


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms_eval is not installed: pip install -e '.[harness]'")
def test_lmms_eval_scores_as_we_do(environment, aokvqa, tmp_path, monkeypatch):
    monkeypatch.setenv("QGSA_AOKVQA_DIR", str(aokvqa))
    monkeypatch.setenv("QGSA_VQA_RAD_DIR", str(REAL))
    answer_lengths = {"cards": 8, "aokvqa": 8} | ({"vqa_rad": 16} if REAL.is_dir() else {})
    budget = ",".join(f"{name}={value}" for name, value in GLANCE.items())
    command = (
        f"-m lmms_eval --model qgsa_smolvlm --model_args pretrained={SHIPPED},{budget} --batch_size 16 "
        f"--tasks {','.join(f'qgsa_{name}' for name in answer_lengths)} --include_path {TASKS / 'lmms_eval_tasks'} "
        f"--limit {COUNT} --log_samples --output_path {tmp_path}"
    )
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=environment, check=True)
    (results,) = tmp_path.rglob("*_results.json")
    processor = QGSAProcessor.from_pretrained(SHIPPED, backend="pil")
    for name, max_new_tokens in answer_lengths.items():
        (samples,) = tmp_path.rglob(f"*_samples_qgsa_{name}.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        run = read_run(rows, json.loads(results.read_text())["results"][f"qgsa_{name}"])
        assert_same(run, *our_answers(processor, name, COUNT, max_new_tokens, GLANCE))


# What a harness is given


def test_documents_are_made_when_they_are_asked_for():
    table = documents.load("cards", pretrained="of the model arguments", version=1.0)["test"]
    assert len(table) == documents.CARDS
    sample = Cards("test", documents.CARDS)[1999]
    assert table[1999] == {**sample, "dataset": "cards"}
    assert documents.images(table[1999]) == [sample["image"]]
    assert isinstance(documents.images(next(iter(table)))[0], Image.Image)


@pytest.mark.parametrize(
    ("document", "said", "scores"),
    [
        ({"dataset": "cards", "answer": "star"}, " Star\n", {"accuracy": 1}),
        ({"dataset": "cards", "answer": "star"}, "a star", {"accuracy": 0}),
        (
            {"dataset": "vqa_rad", "answer": "Yes", "family": "closed"},
            "yes, it is",
            {"accuracy": 1, "closed": 1},
        ),
        (
            {"dataset": "vqa_rad", "answer": "left lung", "family": "open"},
            "the left side",
            {"accuracy": 0, "open_exact_match": 0, "open_recall": 0.5},
        ),
        (
            {
                "dataset": "aokvqa",
                "choices": ["dog", "cat", "cow", "hen"],
                "correct_choice": 1,
                "direct_answers": [],
                "difficult": False,
            },
            "B.",
            {"accuracy": 1},
        ),
    ],
)
def test_scores_of_a_document(document, said, scores):
    assert documents.results(document, [said]) == scores


@pytest.mark.parametrize(("dataset", "variable"), [("vqa_rad", "QGSA_VQA_RAD_DIR"), ("aokvqa", "QGSA_AOKVQA_DIR")])
def test_folders_come_from_the_environment(dataset, variable, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(documents, f"load_{dataset}", lambda folder, split: asked.append(folder))
    monkeypatch.delenv(variable, raising=False)
    documents.LOADERS[dataset]()
    monkeypatch.setenv(variable, str(tmp_path))
    documents.LOADERS[dataset]()
    assert asked == [None, str(tmp_path)]
