"""Rewrite the model card of a run from its `results.json` and its checkpoint.

    python training/model_card.py --model outputs/demo

The card becomes `README.md` of that folder.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from modeling_qgsa import QGSAConfig
from training.cli.arguments import errors_in_one_line, parse
from training.evaluation.card import run_content, write_card


@dataclass
class CardArguments:
    """The run whose card is written."""

    model: str = field(metadata={"help": "Output folder of the run, with checkpoint and results.json."})
    base_model: str | None = field(
        default=None, metadata={"help": "Dense checkpoint that the run started from; by default as in its run.json."}
    )
    command: str | None = field(
        default=None, metadata={"help": "Command to name in the card; by default run_qgsa.py with the run's preset."}
    )


def read_json(folder: Path, name: str, remedy: str) -> dict:
    """Read a JSON file of a run. Raises ValueError, naming the remedy, if it does not exist."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"model ({folder}): has no {name}; {remedy}")
    return json.loads(path.read_text())


def main():
    with errors_in_one_line():
        run = parse(CardArguments, __doc__)
        folder = Path(run.model)
        results = read_json(folder, "results.json", "evaluate it with training/run_qgsa.py --task evaluate")
        base_model = run.base_model or read_json(folder, "run.json", "give --base_model")["base_model"]
        command = run.command or f"python training/run_qgsa.py --preset {results['preset']}"
        config = QGSAConfig.from_pretrained(folder)
        write_card(folder, run_content(folder, config, results, base_model, command))
        print(folder / "README.md")


if __name__ == "__main__":
    main()
