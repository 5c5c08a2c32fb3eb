"""Arguments of the scripts, from dataclasses."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter

from transformers import HfArgumentParser


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help texts that keep the lines of a docstring, and tell the defaults."""


def parse(kind, description: str):
    """The command line as one dataclass of `kind`; `description` is for `--help`."""
    return HfArgumentParser(kind, description=description, formatter_class=Help).parse_args_into_dataclasses()[0]
