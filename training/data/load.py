"""The data sets by name: training questions, and those to evaluate."""

import torch

from training.data.aokvqa import load_aokvqa
from training.data.cards import Cards
from training.data.refcoco import load_refcoco
from training.data.vqa_rad import load_vqa_rad


DATASETS = ("cards", "vqa_rad", "aokvqa", "refcoco")


def load_split(run, split: str, seed: int):
    """One split of `run.dataset`; see the loaders for the errors they raise."""
    if run.dataset == "cards":
        return Cards(split, run.train_size, seed) if split == "train" else Cards(split, run.test_size)
    if run.dataset == "vqa_rad":
        return load_vqa_rad(run.data_dir, split, run.split_by)
    if run.dataset == "aokvqa":
        return load_aokvqa(run.data_dir, split, run.form)
    return load_refcoco(run.data_dir, split)


def load_data(run, seed: int):
    """Questions to train on and `run.test_size` questions to evaluate.

    A-OKVQA's direct answers that are marked difficult are not asked, as the benchmark has it.
    Raises ValueError for an unknown data set, and what its loader raises.
    """
    if run.dataset not in DATASETS:
        raise ValueError(f"dataset is {run.dataset!r}: choose from {', '.join(DATASETS)}")
    train, test = (load_split(run, split, seed) for split in (run.train_split, run.eval_split))
    asked = range(len(test))
    if run.dataset == "aokvqa" and run.form == "direct_answer":
        asked = [index for index, row in enumerate(test.rows) if not row["difficult"]]
    return train, torch.utils.data.Subset(test, list(asked)[: run.test_size])
