"""The harnesses reproduce the answers and grades of our own evaluation, question by question."""

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
from training.data.cards import CARDS, Cards
from training.data.sets import DATASETS, get_dataset
from training.evaluation.answers import answer
from training.evaluation.systems import System
from training.harness import documents


ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "hub_cards" / "tiny-qgsa"
REAL = ROOT.parent / "shared" / "data" / "vqa_rad"
TASKS = ROOT / "training" / "harness"

COUNT = 24
FEW = 8  # VQA-RAD questions in lm-eval, which takes long to encode the large images for its log
GLANCE = {"max_tiles": 0, "max_visual_tokens": 8}  # too little for most cards
MAX_NEW_TOKENS = {"cards": 8, "vqa_rad": 16, "aokvqa": 8, "refcoco": 20}

needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="VQA-RAD is not at ../shared/data/vqa_rad")

# In a separate process, because the code of the checkpoint is imported.
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
    """The log of a harness for one task: answers in the order of the questions, their grades, and the means."""

    answers: list[str]
    accuracies: list[float]
    means: dict[str, float]


def read_run(rows: list[dict], means: dict) -> Run:
    """A run from the logged samples and the results of a task, which both harnesses write in a similar format."""
    rows = sorted(rows, key=lambda row: row["doc_id"])
    responses = [row["filtered_resps"] for row in rows]
    return Run(
        [(text[0] if isinstance(text, list) else text).strip() for text in responses],
        [row["accuracy"] for row in rows],
        {name.removesuffix(",none"): value for name, value in means.items()},
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tiny trained checkpoint as uploaded, with its code."""
    folder = tmp_path_factory.mktemp("checkpoint")
    QGSASmolVLMForConditionalGeneration.from_pretrained(SHIPPED).save_pretrained(folder)
    QGSAProcessor.from_pretrained(SHIPPED).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(checkpoint):
    """The default image backend, as in lm-eval's `AutoProcessor`: torchvision if it is installed."""
    return QGSAProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def aokvqa(tmp_path_factory):
    """A folder with A-OKVQA's schema, about pictures that the tiny model knows."""
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
def refcoco(tmp_path_factory):
    """A folder with RefCOCO's schema, about pictures that the tiny model knows; it cannot answer with boxes."""
    rows = []
    for sample in Cards("test", 150):
        if sample["family"] == "open":
            ((x0, y0, x1, y1),) = sample["boxes"]
            rows.append(
                {
                    "image": sample["image"],
                    "question_id": str(sample["question_id"]),
                    "answer": [sample["question"].removeprefix("what shape is on ").removesuffix("?")],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                }
            )
    folder = tmp_path_factory.mktemp("refcoco")
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "test.parquet")
    return folder


@pytest.fixture
def folders(aokvqa, refcoco, monkeypatch):
    """The folders of `environment`, in this process."""
    for name, folder in (("AOKVQA", aokvqa), ("REFCOCO", refcoco), ("VQA_RAD", REAL)):
        monkeypatch.setenv(f"QGSA_{name}_DIR", str(folder))


@pytest.fixture(scope="module")
def environment(aokvqa, refcoco, tmp_path_factory):
    variables = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "QGSA_AOKVQA_DIR": str(aokvqa),
        "QGSA_REFCOCO_DIR": str(refcoco),
        "OMP_NUM_THREADS": "1",
    }
    return os.environ | variables | ({"QGSA_VQA_RAD_DIR": str(REAL)} if REAL.is_dir() else {})


@pytest.fixture(scope="module")
def lm_eval_run(checkpoint, environment, tmp_path_factory):
    """Function from a group and a task to its `Run` in lm-eval.

    Groups: "plain" has cards, cards with blank images, A-OKVQA and RefCOCO, "glance" has cards, "few" has VQA-RAD.
    """
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "blank.yaml").write_text(BLANK_TASK.format(cards=TASKS / "lm_eval_tasks" / "qgsa_cards.yaml"))
    (folder / "blank.py").write_text(BLANK_CODE)
    model = {"pretrained": str(checkpoint), "trust_remote_code": True}
    runs = {
        "plain": (["qgsa_cards", "qgsa_cards_blank", "qgsa_aokvqa", "qgsa_refcoco"], model, COUNT),
        "glance": (["qgsa_cards"], model | GLANCE, COUNT),
    }
    if REAL.is_dir():
        runs["few"] = (["qgsa_vqa_rad"], model, FEW)
    written = folder / "report.json"
    arguments = json.dumps([[str(TASKS / "lm_eval_tasks"), str(folder)], runs, str(written)])
    subprocess.run([sys.executable, "-c", LM_EVAL, arguments], cwd=ROOT, env=environment, check=True)
    report = json.loads(written.read_text())
    return lambda run, task: read_run(report[run]["samples"][task], report[run]["results"][task])


def our_answers(processor, name: str, count: int, options: dict):
    """Our evaluation's answers to the first `count` questions of a data set, and their grades, both as lists."""
    system = System("qgsa", QGSASmolVLMForConditionalGeneration.from_pretrained(SHIPPED), options)
    samples = documents.load_samples(name)
    asked = Subset(samples, range(min(count, len(samples))))
    (answers,), asked = answer([system], asked, processor, 7, MAX_NEW_TOKENS[name])
    return answers.predictions, get_dataset(name).grade_all(answers.predictions, asked).tolist()


def assert_same(run: Run, answers: list[str], accuracies: list[float]):
    assert run.answers == answers
    assert run.accuracies == accuracies
    assert run.means["accuracy"] == pytest.approx(sum(accuracies) / len(accuracies))


@pytest.mark.parametrize(
    ("name", "group", "count", "distinct"),
    [
        ("cards", "plain", COUNT, 4),
        ("aokvqa", "plain", COUNT, 4),
        ("refcoco", "plain", COUNT, 2),  # the tiny model answers yes or no
        pytest.param("vqa_rad", "few", FEW, 4, marks=needs_real_data),
    ],
)
def test_lm_eval_grades_as_we_do(name, group, count, distinct, lm_eval_run, processor, folders):
    run = lm_eval_run(group, f"qgsa_{name}")
    assert_same(run, *our_answers(processor, name, count, {}))
    assert len(set(run.answers)) >= distinct
    assert set(get_dataset(name).extra_metrics) < set(run.means)
    assert ("closed" in run.means) == (name == "vqa_rad")


def test_budgets_reach_the_model_through_lm_eval(lm_eval_run, processor):
    run = lm_eval_run("glance", "qgsa_cards")
    assert_same(run, *our_answers(processor, "cards", COUNT, GLANCE))
    assert run.means["accuracy"] < lm_eval_run("plain", "qgsa_cards").means["accuracy"] - 0.3


def test_the_image_reaches_the_model_through_lm_eval(lm_eval_run):
    seen, blank = (lm_eval_run("plain", task).means["accuracy"] for task in ("qgsa_cards", "qgsa_cards_blank"))
    assert seen > 0.75 and blank < seen - 0.4


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms_eval is installed")
def test_without_lmms_eval_its_script_says_how_to_install_it(environment):
    command = [sys.executable, str(TASKS / "run_lmms_eval.py"), "--tasks", "qgsa_cards"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: lmms-eval is not installed: pip install -e '.[train,harness]'"


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms_eval is not installed: pip install -e '.[harness]'")
def test_lmms_eval_grades_as_we_do(environment, folders, tmp_path):
    names = [name for name in DATASETS if name != "vqa_rad" or REAL.is_dir()]
    budget = ",".join(f"{name}={value}" for name, value in GLANCE.items())
    tasks = ",".join(f"qgsa_{name}" for name in names)
    command = (
        f"{TASKS / 'run_lmms_eval.py'} --model qgsa_smolvlm --model_args pretrained={SHIPPED},{budget} "
        f"--batch_size 16 --tasks {tasks} --include_path {TASKS / 'lmms_eval_tasks'} "
        f"--limit {COUNT} --log_samples --output_path {tmp_path}"
    )
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=environment, check=True)
    (results,) = tmp_path.rglob("*_results.json")
    processor = QGSAProcessor.from_pretrained(SHIPPED, backend="pil")
    for name in names:
        (samples,) = tmp_path.rglob(f"*_samples_qgsa_{name}.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        run = read_run(rows, json.loads(results.read_text())["results"][f"qgsa_{name}"])
        assert_same(run, *our_answers(processor, name, COUNT, GLANCE))


# Documents


def test_documents_are_made_on_demand():
    table = documents.load("cards", pretrained="a model argument", version=1.0)["test"]
    assert len(table) == CARDS.eval_size
    sample = Cards("test", CARDS.eval_size)[1999]
    boxes = [[side / 256 for side in box] for box in sample["boxes"]]
    assert table[1999] == {**sample, "boxes": boxes, "dataset": "cards"}
    assert documents.images(table[1999]) == [sample["image"]]
    assert isinstance(documents.images(next(iter(table)))[0], Image.Image)


@pytest.mark.parametrize(
    ("document", "answer", "grades"),
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
        (
            {"dataset": "refcoco", "boxes": [[0.1, 0.2, 0.5, 0.6]]},
            "[10, 20, 50, 50]",
            {"accuracy": 1, "mean_iou": 0.75, "centre_hit": 1},
        ),
        (
            {"dataset": "refcoco", "boxes": [[0.1, 0.2, 0.5, 0.6]]},
            "on the left",
            {"accuracy": 0, "mean_iou": 0, "centre_hit": 0},
        ),
    ],
)
def test_grades_of_a_document(document, answer, grades):
    assert documents.grade(document, [answer]) == pytest.approx(grades)


def test_refcoco_documents_are_graded_by_the_answer_of_their_own_sample(folders):
    for document in documents.load("refcoco")["test"]:
        assert documents.grade(document, [document["answer"]])["accuracy"] == 1


@pytest.mark.parametrize("name", [name for name, dataset in DATASETS.items() if dataset.hub_id])
def test_folders_come_from_the_environment(name, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(documents, "load_eval", asked.append)
    variable = f"QGSA_{name.upper()}_DIR"
    monkeypatch.delenv(variable, raising=False)
    documents.load_samples(name)
    monkeypatch.setenv(variable, str(tmp_path))
    documents.load_samples(name)
    assert [arguments.data_dir for arguments in asked] == [None, str(tmp_path)]
    assert {(arguments.dataset, arguments.eval_split) for arguments in asked} == {(name, DATASETS[name].eval_split)}


@pytest.mark.parametrize("harness", ["lm_eval_tasks", "lmms_eval_tasks"])
def test_every_data_set_has_a_task(harness):
    assert {path.stem for path in (TASKS / harness).glob("*.yaml")} == {f"qgsa_{name}" for name in DATASETS}
