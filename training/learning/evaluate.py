"""Evaluating a trained selection beside the dense model and the controls."""

import torch

from training.cli.groups import EvaluationArguments
from training.evaluation.systems import System, evaluate_systems, standard_systems


SMOKE_QUESTIONS = 2  # with random weights, accuracies mean nothing: enough questions to show that the code runs


def check_systems(systems: list[str]):
    """Raise ValueError if a system is unknown, or if dense or qgsa is missing: tables compare the two."""
    known = [system.name for system in standard_systems(None, None)]
    unknown = [name for name in systems if name not in known]
    if unknown or not {"dense", "qgsa"} <= set(systems):
        raise ValueError(
            f"systems ({' '.join(systems)}): choose from {', '.join(known)}; dense and qgsa must be among them"
        )


def chosen_systems(evaluation: EvaluationArguments, dense, tuned) -> list[System]:
    """The systems of `evaluation` in the order of the table: the untrained QGSA model `dense`, the trained `tuned`."""
    return [system for system in standard_systems(dense, tuned) if system.name in evaluation.systems]


def smoke_test(test) -> torch.utils.data.Subset:
    """The first questions of `test`, for models with random weights."""
    return torch.utils.data.Subset(test, range(min(SMOKE_QUESTIONS, len(test))))


def evaluate_chosen(
    systems: list[System], test, processor, evaluation: EvaluationArguments, dataset: str, seed: int
) -> list[dict]:
    """Rows of `results.json` for `systems`, graded by the rules of `dataset`; every process gets all of them."""
    return evaluate_systems(
        systems, test, processor, evaluation.test_batch_size, evaluation.max_new_tokens, seed, dataset
    )
