"""FLOPs of one answer by formula: the measure used in the QGSA paper, and the cost of the whole answer.

    python training/flops.py HuggingFaceTB/SmolVLM-256M-Instruct HuggingFaceTB/SmolVLM-500M-Instruct

The paper counts cross-modal attention alone (here at k = 17). The second table adds encoder, prefill and decode.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoConfig

from modeling_qgsa.conversion_qgsa import config_of_dense
from training.cli.arguments import check_source, errors_in_one_line
from training.costs.formula import answer_table, format_tables, paper_table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_model", nargs="+", help="Dense checkpoint: Hub id or folder with a config.json.")
    parser.add_argument("--output", help="JSON file to write, such as hub_cards/results/flops.json.")
    run = parser.parse_args()
    configs = {}
    for source in run.base_model:
        check_source(source)
        configs[Path(source).name] = config_of_dense(AutoConfig.from_pretrained(source))
    if run.output:
        tables = {"paper": paper_table(), "answers": {name: answer_table(config) for name, config in configs.items()}}
        Path(run.output).write_text(json.dumps(tables, indent=2) + "\n")
    print(format_tables(configs))


if __name__ == "__main__":
    with errors_in_one_line():
        main()
