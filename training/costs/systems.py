"""The systems that the benchmark times, and the models behind them."""

import sys
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from modeling_qgsa import QGSAConfig, QGSASmolVLMForConditionalGeneration
from training.cli.arguments import check_source
from training.methods import METHODS
from training.methods.schedules import evenly


@dataclass(frozen=True)
class Timed:
    """A system of the benchmark.

    Args:
        model: model to run: "stock" (float32), "bfloat16" (stock in bfloat16), "plain" (QGSA in float32), "fast"
            (QGSA in the precision and steps that are fastest on this machine) or "half" (the same with a glance at
            half of its resolution).
        selection: "dense", or a selection of QGSA.
        edge: size of the longest edge of an image: "full", "half", or "native", which never scales an image up
            beyond the next whole tile.
        split: whether high-resolution tiles are cut in addition to the global view.
        method: selection method of `training/methods`; None leaves the scores to the pointer.
        pointer: pointer of QGSA, "selector" or "attention".
        full_layers: share of the text model's layers that update visual tokens, evenly spaced; the others only look at
            them (VISOR). None for all.
        keeps_all: whether every tile is encoded and every token kept, in place of the budget of the workload.
    """

    model: str
    selection: str = "dense"
    edge: str = "full"
    split: bool = True
    method: str | None = None
    pointer: str = "selector"
    full_layers: float | None = None
    keeps_all: bool = False

    def schedule(self, layers: int) -> str:
        """How vision takes part in `layers` layers of the text model, in letters."""
        return evenly(layers if self.full_layers is None else max(1, round(self.full_layers * layers)), layers)

    @property
    def lazy(self) -> bool:
        """Whether tiles are cut only when the model encodes them."""
        return self.selection in ("before_encoder", "blocks")


TUNED = ("fast", "half")  # models in the precision and steps that are fastest on this machine
VISOR_LAYERS = 1 / 15  # an eighth of the work on visual tokens, with what cross layers do

SYSTEMS = {
    "dense": Timed("stock"),
    "dense-bfloat16": Timed("bfloat16"),
    "dense-fast": Timed("fast"),
    "dense-native-size": Timed("stock", edge="native"),
    "dense-half-resolution": Timed("stock", edge="half"),
    "dense-global-only": Timed("stock", split=False),
    "dense-global-only-fast": Timed("fast", split=False),
    **{name: Timed("fast", method.selection, method=name) for name, method in METHODS.items()},
    "qgsa-after-encoder": Timed("fast", "after_encoder"),
    "qgsa-float32": Timed("plain", "before_encoder"),
    "qgsa": Timed("fast", "before_encoder"),
    "qgsa-attention": Timed("fast", "before_encoder", pointer="attention"),
    "qgsa-attention-half-glance": Timed("half", "before_encoder", pointer="attention"),
    "qgsa-attention-blocks": Timed("fast", "blocks", pointer="attention"),
    "qgsa-attention-blocks-half-glance": Timed("half", "blocks", pointer="attention"),
    "qgsa-native-size": Timed("plain", "before_encoder", edge="native"),
    "qgsa-half-glance": Timed("half", "before_encoder"),
    "qgsa-blocks": Timed("fast", "blocks"),
    "qgsa-blocks-half-glance": Timed("half", "blocks"),
    "visor": Timed("fast", "after_encoder", full_layers=VISOR_LAYERS, keeps_all=True),
    "qgsa+visor": Timed("fast", "before_encoder", full_layers=VISOR_LAYERS),
}
FORMER_NAMES = {"dense-tuned": "dense-fast"}


def present_names(names: list[str], former: dict[str, str]) -> list[str]:
    """The present names of systems, given the `former` ones, which still work, with a warning on stderr."""
    for name in sorted(former.keys() & set(names)):
        print(f"warning: system {name} is now called {former[name]}", file=sys.stderr)
    return [former.get(name, name) for name in names]


def present_systems(names: list[str]) -> list[str]:
    """The present names of these systems, see `present_names`.

    Raises ValueError if a name is not in `SYSTEMS`.
    """
    present = present_names(names, FORMER_NAMES)
    unknown = [name for name in present if name not in SYSTEMS]
    if unknown:
        raise ValueError(f"systems ({', '.join(unknown)}): unknown; choose from {', '.join(SYSTEMS)}")
    return present


def check_checkpoint(model: str):
    """Raises ValueError if the Hub id or folder `model` is not a QGSA checkpoint."""
    check_source(model)
    found = PretrainedConfig.get_config_dict(model)[0].get("model_type")
    if found != QGSAConfig.model_type:
        raise ValueError(
            f"model ({model}): must be a QGSA checkpoint, but its model type is {found!r}; give a dense checkpoint as "
            "base_model"
        )


def build_models(
    systems: list[str], base_model: str, model: str | None, tokenizer, device: torch.device
) -> dict[str, torch.nn.Module]:
    """Build the models of some systems, by the names that [`Timed`] gives them.

    They share no weights, because each has a precision of its own. On a GPU all of them are in bfloat16.

    Args:
        systems: names in `SYSTEMS`.
        base_model: Hub id or folder whose config gives the architecture of random weights.
        model: QGSA checkpoint that runs all systems, the dense ones with `selection="dense"`; random weights without
            it.
        tokenizer: tokenizer of `base_model`.
    """
    models = {}
    for name in dict.fromkeys(SYSTEMS[system].model for system in systems):  # one order in every run
        if model is not None:
            built = QGSASmolVLMForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
        else:
            torch.manual_seed(0)
            config = AutoConfig.from_pretrained(base_model)
            built = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
            if name in ("plain", *TUNED):
                built = QGSASmolVLMForConditionalGeneration.from_dense(built, tokenizer)
                torch.nn.init.normal_(built.model.selector.cell_position, std=0.02)  # stands in for a trained one
        if name == "half":
            built.config.glance_downscale = 2
        reduced = name == "bfloat16" or device.type == "cuda"
        built = built.to(device, torch.bfloat16 if reduced else torch.float32).eval()
        built.generation_config.eos_token_id = None  # all answers must have the same length
        built.generation_config.use_cache = True  # training may have turned it off in the config
        models[name] = built
    return models
