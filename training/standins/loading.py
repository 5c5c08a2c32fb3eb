"""Loading a dense model by name, the untrained stand-in included."""

from training.cli.groups import ModelArguments
from training.learning.loading import load_dense
from training.standins.tiny import build_stand_in


def load_base(model: ModelArguments):
    """The dense model of `base_model` and a QGSA processor for it; `tiny` builds the untrained stand-in for cards.

    Raises ValueError as `load_dense` does.
    """
    return build_stand_in() if model.base_model == "tiny" else load_dense(model)
