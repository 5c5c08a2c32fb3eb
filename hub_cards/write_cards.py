"""Rewrite the committed model cards from hub_cards/results and the tiny checkpoints.

    python hub_cards/write_cards.py

A test fails if they differ from the results.
"""

import argparse
import json
import math
from pathlib import Path

from safetensors import safe_open

from modeling_qgsa import QGSAConfig
from training.data.cards import FAMILIES
from training.evaluation.card import CardContent, budgets_in_words, pointer_share, render_card, render_dense_card


HERE = Path(__file__).resolve().parent


def published_config(size: str) -> QGSAConfig:
    """The fields that costs depend on, for SmolVLM-256M (`size` "256m") or 500M ("500m"), as `from_dense` sets them.

    Tests compare them with the published configs.
    """
    width, heads, layers = {"256m": (576, 9, 30), "500m": (960, 15, 32)}[size]
    text = {"model_type": "llama", "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    text |= {"num_key_value_heads": heads // 3, "head_dim": 64, "intermediate_size": width * 8 // 3}
    vision = {"image_size": 512, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072}
    vision |= {"num_hidden_layers": 12, "num_attention_heads": 12}
    config = QGSAConfig(text_config=text, vision_config=vision, scale_factor=4, pointer="attention")
    config.keep_whole_tiles()
    return config


def count_parameters(folder: Path) -> int:
    """Number of parameters in the `model.safetensors` of a folder."""
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())


def qgsa_cards() -> dict[Path, CardContent]:
    """Content of the committed cards of QGSA models, by path."""
    results = {path.stem: json.loads(path.read_text()) for path in (HERE / "results").glob("*.json")}
    tiny = QGSAConfig.from_pretrained(HERE / "tiny-qgsa")
    cards = {
        HERE / "tiny-qgsa" / "README.md": CardContent(
            name="qgsa-smolvlm-tiny",
            repo_id="org/qgsa-smolvlm-tiny",
            made_from="hub_cards/tiny-dense",
            base_model=None,
            budgets=budgets_in_words(tiny),
            command="python training/run_qgsa.py --preset demo",
            pointer_cost=pointer_share(tiny),
            trained=True,
            parameters=count_parameters(HERE / "tiny-qgsa"),
            accuracy=results["cards"],
            picture="../results/cards_selections.png",
        )
    }
    for size in ("256m", "500m"):
        base_model, config = f"HuggingFaceTB/SmolVLM-{size.upper()}-Instruct", published_config(size)
        cards[HERE / f"qgsa-smolvlm-{size}.md"] = CardContent(
            name=f"qgsa-smolvlm-{size}",
            repo_id=f"org/qgsa-smolvlm-{size}",
            made_from=base_model,
            base_model=base_model,
            budgets=budgets_in_words(config),
            command=f"python training/run_qgsa.py --preset vqa_rad_{size}",
            pointer_cost=pointer_share(config),
            trained=False,
            picture="results/cards_selections.png",
            speed=results[f"speed_{size}_cpu"],
            depth=results[f"speed_visor_{size}_float32_cpu"],
            flops=results["flops"]["answers"][f"smolvlm-{size}-instruct"],
        )
    return cards


def dense_card() -> str:
    """The card of the tiny dense model."""
    folder = HERE / "tiny-dense"
    results = json.loads((folder / "results.json").read_text())
    return render_dense_card(
        name=folder.name,
        parameters=count_parameters(folder),
        n=results["n"],
        row=results["rows"][0],
        needed={family: tiles for family, (tiles, _) in FAMILIES.items()},
        command="python training/run_stand_in.py --preset tiny_dense",
        measured_in=results["environment"],
    )


def committed_cards() -> dict[Path, str]:
    """Text of all committed cards, by path."""
    cards = {path: f"{render_card(content)}\n" for path, content in qgsa_cards().items()}
    return cards | {HERE / "tiny-dense" / "README.md": dense_card()}


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path, text in committed_cards().items():
        path.write_text(text)
        print(path.relative_to(HERE.parent))


if __name__ == "__main__":
    main()
