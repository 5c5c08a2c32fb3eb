"""Models in other processes: pickled, sent to spawned workers, and trained by several processes together."""

import functools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch


TRAIN = Path(__file__).parent / "train_in_processes.py"
HUB = Path(__file__).parents[2] / "hub_cards"


@pytest.fixture(scope="module")
def exported(shipped, make_processor, tmp_path_factory):
    """The shipped checkpoint as saved, with its code."""
    folder = tmp_path_factory.mktemp("exported") / "tiny_qgsa"
    shipped.save_pretrained(folder)
    make_processor("dense").save_pretrained(folder)
    return folder


def test_pickled(tool_model, asked):
    copy = pickle.loads(pickle.dumps(tool_model))
    assert type(copy) is type(tool_model)
    with torch.no_grad():
        assert torch.equal(copy(**asked).logits, tool_model(**asked).logits)


WORKER = """
import multiprocessing
import sys

import torch


def answer(model, inputs, answers):
    torch.set_num_threads(1)
    answers.put(model.generate(**inputs, max_new_tokens=4).tolist())


if __name__ == "__main__":
    from transformers import AutoModelForImageTextToText

    folder, inputs = sys.argv[1:]
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = torch.load(inputs)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=answer, args=(model, inputs, answers))
    worker.start()
    found = answers.get(timeout=120)
    worker.join()
    assert found == model.generate(**inputs, max_new_tokens=4).tolist()
    print("alike")
"""


def environment(**extra):
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | extra


@pytest.mark.parametrize("kind", [pytest.param("stock", marks=pytest.mark.slow), "before_encoder"], indirect=True)
def test_a_spawned_worker(kind, stock, exported, asked, tmp_path):
    """The model goes to the worker by pickle; both have nothing but transformers and the checkpoint's code."""
    folder = exported
    if kind == "stock":
        folder = tmp_path / "stock"
        stock.save_pretrained(folder)
    torch.save(dict(asked), tmp_path / "inputs.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    done = subprocess.run(
        [sys.executable, tmp_path / "worker.py", folder, tmp_path / "inputs.pt"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(HF_HOME=str(tmp_path / "home")),
        timeout=300,
    )
    assert done.returncode == 0 and "alike" in done.stdout, done.stderr[-3000:]


# Two processes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs `train_in_processes.py`, once for each kind, tool and number of processes; the report of each process."""

    @functools.cache
    def train(kind, tool, processes):
        folder = tmp_path_factory.mktemp("trained")
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run(
            [*launcher, TRAIN, HUB, folder, kind, tool],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment(PYTHONPATH=str(HUB.parent)),
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "scenario"),
    [
        ("trainer", "default"),
        ("trainer", "not looked for"),
        ("trainer", "reentrant"),
        ("trainer", "non-reentrant"),
        ("sft", "default"),
        ("sft", "without checkpointing"),
    ],
)
def test_two_processes(kind, tool, scenario, trained):
    """Both processes end with the same weights; without random budgets, with those of one process on both batches."""
    if tool == "sft":
        pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    one, two = (report[scenario] for report in trained(kind, tool, 2))
    assert "error" not in one, one["error"]
    assert one == two and len(one["losses"]) == 2
    if kind in ("stock", "dense"):
        alone = trained(kind, tool, 1)[0][scenario]
        assert one["losses"] == pytest.approx(alone["losses"], abs=1e-3)
        assert one["weights"] == pytest.approx(alone["weights"], rel=1e-4)
    else:
        assert one["selector moved"]
