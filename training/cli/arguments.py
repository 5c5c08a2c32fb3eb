"""Arguments of the scripts, from dataclasses."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from pathlib import Path

from transformers import HfArgumentParser


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help texts that keep the lines of a docstring, and tell the defaults."""


def parse(kind, description: str):
    """The command line as one dataclass of `kind`; `description` is for `--help`."""
    return HfArgumentParser(kind, description=description, formatter_class=Help).parse_args_into_dataclasses()[0]


def check_source(name: str):
    """Raise ValueError for a name that can only be meant as a folder, and is none; a Hub id is `org/name`.

    Without it the libraries say that they cannot reach the Hub.
    """
    path = Path(name)
    meant = name.count("/") != 1 or name[0] in "./~" or path.parent.is_dir()
    if meant and not path.is_dir():
        raise ValueError(f"{name} is no folder here, nor a Hub id (org/name)")
