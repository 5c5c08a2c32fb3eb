"""Options, former names, and errors in one line."""

import sys
from dataclasses import dataclass, field

import pytest

from modeling_qgsa import QGSAConfig
from training.cli.arguments import check_source, errors_in_one_line, parse


@dataclass
class Options:
    """Options of a script."""

    max_tiles: int = field(default=4, metadata={"help": "Most tiles."})
    systems: list[str] = field(default_factory=lambda: ["dense", "qgsa"], metadata={"help": "Systems."})


def test_former_names_work_with_a_warning(monkeypatch, capsys):
    for former in (["--most_tiles", "3"], ["--most_tiles=3"], ["--most-tiles", "3"]):
        monkeypatch.setattr(sys, "argv", ["script.py", *former])
        assert parse(Options, "", renamed={"--most_tiles": "--max_tiles"}).max_tiles == 3
        name = former[0].partition("=")[0]
        assert f"warning: {name} is now called --max_tiles" in capsys.readouterr().err


def test_help_shows_one_name_and_the_default_of_each_option(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(Options, "What it does.\n\n    An example")
    shown = capsys.readouterr().out
    assert "\n    An example\n" in shown
    assert "  --max_tiles  Most tiles. (default: 4)\n" in shown
    assert "  --systems    Systems. (default: dense qgsa)\n" in shown


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--max_tilez", "unknown option --max_tilez: did you mean --max_tiles?"),
        ("--x", "unknown option --x: see --help"),
    ],
)
def test_unknown_options(option, complaint, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", option, "3"])
    with pytest.raises(SystemExit) as end:
        parse(Options, "")
    assert str(end.value) == f"error: {complaint}"


def refuse(error):
    raise error


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: refuse(ValueError("two\n  lines")), "error: two lines"),
        (lambda: refuse(FileNotFoundError("nowhere")), "error: nowhere"),
        (lambda: refuse(OSError()), "error: OSError"),
    ],
)
def test_user_errors_are_one_line(mistake, message):
    with pytest.raises(SystemExit) as end:
        with errors_in_one_line():
            mistake()
    assert str(end.value) == message


def test_values_that_the_options_refuse_are_one_line(monkeypatch):
    @dataclass
    class Strict:
        size: int = field(default=1, metadata={"help": "Size."})

        def __post_init__(self):
            if self.size < 1:
                raise ValueError(f"size ({self.size}) must be at least 1")

    monkeypatch.setattr(sys, "argv", ["script.py", "--size", "0"])
    with pytest.raises(SystemExit, match=r"^error: size \(0\) must be at least 1$"):
        parse(Strict, "A script.")


def test_values_that_a_config_refuses_are_one_line():
    with pytest.raises(SystemExit, match=r"^error: [^\n]*max_tiles[^\n]*$") as end:
        with errors_in_one_line():
            QGSAConfig(min_tiles=3, max_tiles=2)
    assert "validator" not in str(end.value)


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        with errors_in_one_line():
            refuse(ZeroDivisionError())


@pytest.mark.parametrize("name", ["outputs/nope", "hub_cards/nope", "./nope", "../a/b", "/nope", "a/b/c", "nope"])
def test_folders_that_are_not_there_are_named(name, tmp_path, monkeypatch):
    for folder in ("outputs", "hub_cards"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{name} is neither a local folder nor a Hub id"):
        check_source(name)


def test_folders_and_hub_ids_are_taken(tmp_path, monkeypatch):
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("outputs/demo", "outputs", str(tmp_path), "HuggingFaceTB/SmolVLM-256M-Instruct"):
        check_source(name)
