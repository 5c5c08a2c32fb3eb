"""The data sets by name, and the training and evaluation samples that the options ask for.

To add a data set, write a file next to this one that ends in its `VQADataset`, list it in `DATASETS`, and add a preset
to `training/presets` and, if wanted, a task to `training/harness`.
"""

from torch.utils.data import Dataset, Subset

from training.data.aokvqa import AOKVQA
from training.data.arguments import DataArguments
from training.data.cards import CARDS
from training.data.dataset import VQADataset
from training.data.refcoco import REFCOCO
from training.data.vqa_rad import VQA_RAD


DATASETS = {dataset.name: dataset for dataset in (CARDS, VQA_RAD, AOKVQA, REFCOCO)}


def get_dataset(name: str) -> VQADataset:
    """The data set called `name`. Raises ValueError, listing the names, if there is none."""
    if name not in DATASETS:
        raise ValueError(f"dataset ({name!r}): choose from {', '.join(DATASETS)}")
    return DATASETS[name]


def load_eval(arguments: DataArguments, seed: int = 0) -> Subset:
    """The first `test_size` samples of `eval_split` that the data set evaluates.

    Raises ValueError for an unknown data set, and any error of its `load`.
    """
    dataset = get_dataset(arguments.dataset)
    samples = dataset.load(arguments, arguments.eval_split, seed)
    indices = range(len(samples))
    if dataset.is_evaluated is not None:
        indices = [index for index, row in enumerate(samples.rows) if dataset.is_evaluated(row)]
    return Subset(samples, list(indices)[: arguments.test_size])


def load_data(arguments: DataArguments, seed: int) -> tuple[Dataset, Subset]:
    """The samples of `train_split` and the samples to evaluate, see `load_eval`, which has the same errors."""
    train = get_dataset(arguments.dataset).load(arguments, arguments.train_split, seed)
    return train, load_eval(arguments, seed)
