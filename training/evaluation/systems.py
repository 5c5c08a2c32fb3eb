"""The systems of a table: dense, the controls, question-guided selection, and every method of the list."""

from dataclasses import dataclass, field, fields

from modeling_qgsa.configuration_qgsa import Budget
from training.costs.systems import present_names
from training.methods import METHODS
from training.methods.method import Method


@dataclass(frozen=True)
class System:
    """One way to answer: a model, its view of the sample, and how it selects.

    Args:
        name: as in `results.json`.
        model: a QGSA model, finetuned or with the dense checkpoint's own weights.
        options: passed to `generate`.
        method: chooses the visual tokens; None leaves them to the model's selector.
        image_kwargs: image processor options.
        blank: whether the image is replaced by a grey one.
    """

    name: str
    model: object
    options: dict = field(default_factory=dict)
    method: Method | None = None
    image_kwargs: dict | None = None
    blank: bool = False

    @property
    def budget(self) -> Budget:
        """The selection and the budgets in force: the model's own with `options` on top."""
        names = {each.name for each in fields(Budget)}
        return Budget.of(self.model.config, **{name: self.options[name] for name in names & self.options.keys()})


DENSE = {"selection": "dense"}
ATTENTION_TILES = 4  # tiles that qgsa-attention looks at, without calibration
FORMER_NAMES = {"dense-tuned": "dense-finetuned"}


def whole_tiles(config, tiles: int) -> dict[str, int]:
    """Options that spend a number of tiles on every question, and keep them and the glance whole."""
    tokens = config.tokens_per_tile * (1 + tiles)
    return {"min_tiles": tiles, "max_tiles": tiles, "min_visual_tokens": tokens, "max_visual_tokens": tokens}


def standard_systems(dense, finetuned) -> list[System]:
    """All systems that `--systems` can name, in the order of the table; the first eight are evaluated by default.

    Methods run at the budgets of the `finetuned` checkpoint, and controls with its selection too; methods that need
    every tile encoded select after the encoder.
    """
    after_encoder = {"selection": "after_encoder"}
    attention = {"selection": "before_encoder", "pointer": "attention"}
    if dense is not None:  # None if only the names are to be checked
        attention |= whole_tiles(dense.config, ATTENTION_TILES)
    systems = [
        System("dense", dense, DENSE),
        System("dense-finetuned", finetuned, DENSE),
        System("dense-global-only", dense, DENSE, image_kwargs={"do_image_splitting": False}),
        System("blank-image", dense, DENSE, blank=True),
        System("random", finetuned, method=METHODS["random"]),
        System("centre", finetuned, method=METHODS["centre"]),
        System("qgsa", finetuned),
        System("qgsa-after-encoder", finetuned, after_encoder),
    ]
    systems.append(System("qgsa-attention", dense, attention))
    named = {system.name for system in systems}
    for name, method in METHODS.items():
        if name not in named:
            options = after_encoder if method.selection == "after_encoder" else {}
            systems.append(System(name, finetuned, options, method))
    return systems


def choose_systems(names: list[str], dense, finetuned) -> list[System]:
    """The systems with these names, in the order of the table; `--systems` as a list.

    Former names still work, with a warning on stderr. The models may be None if only the names are to be checked.

    Raises ValueError for an unknown name, and if dense or qgsa is missing, which every report compares.
    """
    wanted = set(present_names(names, FORMER_NAMES))
    systems = {system.name: system for system in standard_systems(dense, finetuned)}
    if wanted - set(systems):
        unknown = ", ".join(sorted(wanted - set(systems)))
        raise ValueError(f"systems ({unknown}): unknown; choose from {', '.join(systems)}")
    if not {"dense", "qgsa"} <= wanted:
        raise ValueError(f"systems ({', '.join(names)}): must include dense and qgsa, which the report compares")
    return [system for name, system in systems.items() if name in wanted]
