"""Presets: YAML files of option values, which the command line overrides.

A file is one preset, named after it. With a section `sizes`, it is one preset per size (`vqa_rad_256m`): the fields of
the size are added to those of the file.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

import yaml

from training.cli.arguments import Parser, end_with_error


PRESETS = Path(__file__).resolve().parents[1] / "presets"
STAND_IN_PRESETS = PRESETS / "stand_in"
VISOR_PRESETS = PRESETS / "visor"
SCRIPTS = {PRESETS: "run_qgsa.py", STAND_IN_PRESETS: "run_stand_in.py", VISOR_PRESETS: "run_visor.py"}
EPILOG = """\
All arguments of transformers.TrainingArguments are accepted too, among them --output_dir, --max_steps,
--learning_rate, --per_device_train_batch_size, --bf16 and --use_cpu: --help_all lists them.
"""


def load_presets(folder: Path = PRESETS) -> dict[str, dict]:
    """The presets of a folder: the option values of each, by name."""
    presets = {}
    for path in sorted(folder.glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        sizes = values.pop("sizes", None)
        if sizes is None:
            presets[path.stem] = values
        else:
            presets |= {f"{path.stem}_{size}": values | own for size, own in sizes.items()}
    return presets


def as_options(values: dict) -> list[str]:
    """Option values as a command line; a list becomes one option with several values."""
    options = []
    for name, value in values.items():
        options += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return options


def read_preset(arguments: list[str], folder: Path = PRESETS, default: str = "demo") -> tuple[str, list[str]]:
    """Replace `--preset NAME` by the options of that preset, in front of all others: `(NAME, arguments)`.

    Raises SystemExit, listing the presets, if the name is unknown, or naming the script that the preset belongs to.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=default)
    parsed, arguments = parser.parse_known_args(arguments)
    presets = load_presets(folder)
    for other, script in SCRIPTS.items():
        if other != folder and parsed.preset in load_presets(other):
            end_with_error(f"preset {parsed.preset!r} belongs to another script: {script}")
    if parsed.preset not in presets:
        end_with_error(f"unknown preset {parsed.preset!r}: choose from {', '.join(presets)}")
    return parsed.preset, as_options(presets[parsed.preset]) + arguments


def parse_arguments(
    arguments: list[str],
    description: str,
    kinds: tuple,
    shown: tuple | None = None,
    folder: Path = PRESETS,
    default: str = "demo",
) -> tuple:
    """Parse a command line with a preset into dataclasses: the preset's name, then one per kind.

    Args:
        description: text for `--help`, usually the script's docstring.
        kinds: dataclasses, the last of which is a `TrainingArguments`.
        shown: dataclasses that `--help` shows; by default all but the last of `kinds`. `--help_all` shows `kinds`.
        folder, default: the script's presets, and the one that is used if none is named.

    Raises SystemExit with a one-line message for an unknown preset or option, or an invalid value. The training
    arguments are set to keep the columns that only the collator reads, to report to no tracker, and to pin no memory
    without an accelerator.
    """
    if "--help_all" in arguments:
        show_help(kinds, description, folder, default)
    if {"-h", "--help"} & set(arguments):
        show_help(kinds[:-1] if shown is None else shown, f"{description}\n{EPILOG}", folder, default)
    preset, arguments = read_preset(arguments, folder, default)
    *groups, args = Parser(kinds, add_help=False).parse(arguments)
    args.remove_unused_columns, args.report_to = False, []
    args.dataloader_pin_memory &= args.device.type != "cpu"  # DataLoader warns where there is nothing to pin it for
    return preset, *groups, args


def show_help(kinds: tuple, description: str, folder: Path, default: str):
    """Print the options of `kinds` by group, and end the script."""
    parser = Parser(kinds, description=description, usage="%(prog)s [--preset NAME] [options]")
    text = f"Option values to start from (default: {default}). Choose from {', '.join(load_presets(folder))}."
    parser.add_argument("--preset", help=text)
    parser.add_argument("--help_all", action="store_true", default=None, help="Show all options and exit.")
    parser.print_help()
    sys.exit()
