"""Command-line options from dataclasses, and errors that fit on one line."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import HfArgumentParser


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help that keeps the line breaks of a docstring and shows the defaults."""


def parse(kind, description: str, renamed: dict[str, str] | None = None):
    """Parse the command line into the dataclass `kind`.

    Args:
        description: text for `--help`, usually the script's docstring.
        renamed: former option names and their present ones; the former still work, with a warning.
    """
    parser = HfArgumentParser(kind, description=description, formatter_class=Help)
    return parser.parse_args_into_dataclasses(use_present_names(sys.argv[1:], renamed or {}))[0]


def use_present_names(arguments: list[str], renamed: dict[str, str]) -> list[str]:
    """Replace former option names, as `--old value` or `--old=value`, and warn about each on stderr."""
    present = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in renamed:
            print(f"warning: {name} is now called {renamed[name]}; it will go in the next version", file=sys.stderr)
            name = renamed[name]
        present.append(name + equals + value)
    return present


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn the errors that a user can mend (ValueError, OSError) into one line on stderr and exit status 1."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def check_source(name: str):
    """Raise ValueError if `name` can only be a local folder and does not exist; a Hub id is `org/name`.

    Without this check the libraries report that the Hub cannot be reached.
    """
    path = Path(name)
    local = name.count("/") != 1 or name[0] in "./~" or path.parent.is_dir()
    if local and not path.is_dir():
        raise ValueError(f"{name} is neither a local folder nor a Hub id (org/name)")
