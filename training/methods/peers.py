"""Former table of published methods, for `training/benchmark.py` until it runs the list of `training/methods`."""

from training.methods import METHODS


PEERS = {name: METHODS[name].options for name in ("fastv", "visionzip", "divprune", "cdpruner")}
