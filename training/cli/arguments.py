"""Command-line options from dataclasses, and errors that fit on one line."""

import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help that keeps the line breaks of a docstring and shows the defaults, with one name per option."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"max_help_position": 28} | kwargs)

    def _format_action_invocation(self, action):
        # HfArgumentParser accepts every option in two spellings: `--max_tiles, --max-tiles`.
        first, *others = action.option_strings
        return ", ".join([first, *(name for name in others if name != first.replace("_", "-"))])

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(HfArgumentParser):
    """HfArgumentParser that ends with one line on stderr and exit status 1, without the usage of every option."""

    def __init__(self, kinds, **kwargs):
        super().__init__(kinds, formatter_class=Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        end_with_error(message)

    def parse(self, arguments: list[str]) -> tuple:
        """Parse a command line into one dataclass per kind; ends the script at an unknown option."""
        *parsed, unknown = self.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings[:1]]
            close = get_close_matches(unknown[0].partition("=")[0], known, n=1)
            self.error(f"unknown option {unknown[0]}: {f'did you mean {close[0]}?' if close else 'see --help'}")
        return tuple(parsed)


def parse(kind, description: str, renamed: dict[str, str] | None = None):
    """Parse the command line into the dataclass `kind`.

    Args:
        description: text for `--help`, usually the script's docstring.
        renamed: former option names, mapped to their present ones; they still work, with a warning.

    Ends the script with one line for values that the dataclass refuses, too.
    """
    with errors_in_one_line():
        return Parser(kind, description=description).parse(use_present_names(sys.argv[1:], renamed or {}))[0]


def use_present_names(arguments: list[str], renamed: dict[str, str]) -> list[str]:
    """Replace former option names, as `--old value` or `--old=value`, and warn about each on stderr."""
    present = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        former = "--" + name.removeprefix("--").replace("-", "_")  # argparse accepts both spellings
        if name.startswith("--") and former in renamed:
            said, name = name, renamed[former]
            print(
                f"warning: {said} is now called {name}; the former name will be removed in the next version",
                file=sys.stderr,
            )
        present.append(name + equals + value)
    return present


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn user errors (ValueError, OSError, values that a config refuses) into one line on stderr and exit status 1.

    `python -X dev` shows the traceback instead.
    """
    try:
        yield
    except (OSError, ValueError, StrictDataclassError) as error:
        if sys.flags.dev_mode:
            raise
        if isinstance(error, StrictDataclassError):
            error = error.__cause__ or error  # without the name of the validator
        end_with_error(str(error) or type(error).__name__)


def end_with_error(message: str) -> NoReturn:
    """End the script with `message` on one line of stderr and exit status 1; all processes but the first are named."""
    process = os.environ.get("RANK", "0")
    label = "error" if process == "0" else f"error in process {process}"
    sys.exit(f"{label}: {' '.join(message.split())}")


def check_source(name: str):
    """Raise ValueError if `name` can only be a local folder and does not exist; a Hub id is `org/name`.

    Without this check the libraries report that the Hub cannot be reached.
    """
    path = Path(name)
    local = name.count("/") != 1 or name[0] in "./~" or path.parent.is_dir()
    if local and not path.is_dir():
        raise ValueError(f"{name} is neither a local folder nor a Hub id (org/name)")
