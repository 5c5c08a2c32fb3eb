"""Make a complete folder for the Hub: weights, code, tokenizer and preprocessor files, card, licence, figures.

    python hub_cards/export.py --base_model outputs/demo --output outputs/hub/qgsa-smolvlm-tiny
    python hub_cards/export.py --base_model outputs/vqa_rad_256m --output outputs/hub/qgsa-smolvlm-256m

`--base_model` is a run's outputs folder, or a dense checkpoint, which gets a fresh selector. The way back, for what
knows only the published architectures (llama.cpp, OpenVINO and others): the adapted weights without the selector.

    python hub_cards/export.py --base_model outputs/vqa_rad_256m --format idefics3 --output outputs/hub/plain-256m

The folder appears when it is complete, and one that is there already is left as it is.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PretrainedConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from modeling_qgsa import QGSAConfig, QGSAProcessor, QGSASmolVLMForConditionalGeneration
from modeling_qgsa.configuration_qgsa import AUTO_MAP
from modeling_qgsa.conversion_qgsa import OWN
from training.cli.arguments import check_source, parse
from training.evaluation.card import CardContent, budgets_in_words, selector_share, write_card


HERE = Path(__file__).resolve().parent
PLAIN = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}
# Tokenizer, chat template and preprocessor, as published; saved by transformers 5 they do not load on 4.
VERBATIM = (
    "added_tokens.json",
    "chat_template.*",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
PLAIN_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- smolvlm
---

# {repo_id}

The weights of a QGSA-SmolVLM without its selector: a plain SmolVLM, which encodes every tile and keeps every visual
token, for whatever does not know QGSA. Load it with `AutoModelForImageTextToText.from_pretrained("{repo_id}")`.
Nothing was measured of it apart from QGSA's own `selection="dense"`, whose logits it has.
"""
SIZES = {576: "256m", 960: "500m"}  # by the width of the text model
RESULTS = HERE / "results"
CODE = HERE.parent / "modeling_qgsa"


@dataclass
class ExportArguments:
    """What to export, as what, and where to."""

    base_model: str = field(metadata={"help": "A run's outputs folder, or a dense checkpoint: Hub id or folder."})
    output: str = field(metadata={"help": "Folder to make; it must not be there, or be empty."})
    format: str = field(
        default="qgsa", metadata={"help": "qgsa; or idefics3 or smolvlm: the plain architecture, without selector."}
    )
    files: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the published processor; by default what base_model was made from."},
    )
    results: str | None = field(
        default=None, metadata={"help": "results.json of its evaluation; that of base_model by default, if there."}
    )
    repo_id: str | None = field(
        default=None, metadata={"help": "Hub id that the card loads; the folder's by default."}
    )
    random_weights: bool = field(default=False, metadata={"help": "Build base_model from its config, untrained."})


def main():
    run = parse(ExportArguments, __doc__)
    try:
        export(run)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{run.format} checkpoint: {run.output}")


def export(run: ExportArguments):
    """Make the folder `run.output`. Raises ValueError where it is not empty, or for an unknown format."""
    if run.format not in ("qgsa", *PLAIN):
        raise ValueError(f"format is {run.format!r}: choose from qgsa, {', '.join(PLAIN)}")
    output = Path(run.output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output {output} holds {len(list(output.iterdir()))} files: choose another folder")
    check_source(run.base_model)
    made_from = dense_base_of(run.base_model)
    files = files_of(run.files or made_from)
    model = load(run)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        staged = Path(folder) / output.name
        if run.format == "qgsa":
            model.save_pretrained(staged)
            for path in CODE.glob("*_qgsa.py"):
                shutil.copyfile(path, staged / path.name)
            add_evidence(run, staged)
            write_card(staged, describe(run, model, made_from, staged))
        else:
            to_plain(model, run.format).save_pretrained(staged)
            (staged / "README.md").write_text(PLAIN_CARD.format(repo_id=run.repo_id or run.output))
        copy_processor(files, staged, run.format)
        write_generation_config(files, staged, model)
        name_for_other_readers(staged)
        shutil.copyfile(HERE.parent / "LICENSE", staged / "LICENSE")
        if output.exists():
            output.rmdir()
        staged.rename(output)


def dense_base_of(base_model: str) -> str:
    """The dense checkpoint that a run's folder was made from, as its `run.json` says; `base_model` itself else."""
    path = Path(base_model) / "run.json"
    return json.loads(path.read_text())["base_model"] if path.exists() else base_model


def files_of(source: str) -> Path:
    """Folder with the processor's files of a Hub id or a folder. Raises ValueError where there is no tokenizer."""
    names = [*VERBATIM, "processor_config.json", "generation_config.json"]
    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, allow_patterns=names))
    if not (folder / "tokenizer_config.json").exists():
        raise ValueError(f"files {source}: there is no tokenizer_config.json, give the folder or id that has one")
    return folder


def has_selector(base_model: str) -> bool:
    """Whether a checkpoint is one of ours, and not a dense one; without running its code."""
    described, _ = PretrainedConfig.get_config_dict(base_model)
    return described.get("model_type") == QGSAConfig.model_type


def load(run: ExportArguments) -> QGSASmolVLMForConditionalGeneration:
    """The QGSA model of a run's folder, or of a dense checkpoint with a fresh selector."""
    if has_selector(run.base_model):
        return QGSASmolVLMForConditionalGeneration.from_pretrained(run.base_model)
    if not run.random_weights:
        return QGSASmolVLMForConditionalGeneration.from_dense(run.base_model)
    dense = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(run.base_model))
    tokenizer = QGSAProcessor.from_pretrained(run.base_model).tokenizer
    return QGSASmolVLMForConditionalGeneration.from_dense(dense, tokenizer)


def to_plain(model: QGSASmolVLMForConditionalGeneration, architecture: str):
    """The text model, encoder and connector of `model` as a stock model: what it is with `selection="dense"`."""
    config_class, model_class = PLAIN[architecture]
    own = model.config
    vision = {name: value for name, value in own.vision_config.to_dict().items() if name != "model_type"}
    config = config_class(
        text_config=own.text_config.to_dict(),
        vision_config=vision,
        scale_factor=own.scale_factor,
        image_token_id=own.image_token_id,
        tie_word_embeddings=own.tie_word_embeddings,
        pad_token_id=own.text_config.pad_token_id,
    )
    plain = model_class._from_config(config, dtype=model.dtype)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith(OWN)})
    return plain


def copy_processor(files: Path, folder: Path, architecture: str):
    """Copy tokenizer, chat template and preprocessor as they are; the processor's own file names its class."""
    for pattern in VERBATIM:
        for path in sorted(files.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    own = json.loads((files / "processor_config.json").read_text())
    if "image_processor" in own or not (files / "preprocessor_config.json").exists():
        raise ValueError(f"files {files} was saved by transformers 5, which 4 cannot read: give the published files")
    written = {"image_seq_len": own["image_seq_len"], "processor_class": "Idefics3Processor"}
    if architecture == "qgsa":
        written |= {"processor_class": "QGSAProcessor", "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}
    write_json(folder / "processor_config.json", written)


def write_generation_config(files: Path, folder: Path, model):
    """The published generation config, stopping at the end of an utterance, whatever the tokenizer calls its end."""
    path = files / "generation_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    config.pop("_from_model_config", None)  # transformers 4 would take the text model's ids then
    write_json(folder / "generation_config.json", config | {"eos_token_id": model.config.end_of_utterance_token_id})


def name_for_other_readers(folder: Path):
    """Name what others than transformers 5 look for: the base of the rotary positions, and what the text model is."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"]["rope_parameters"]
    if rope["rope_type"] != "default":
        raise ValueError(f"rope_type is {rope['rope_type']!r}: only default can be written for older readers")
    config["text_config"] |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "architectures": ["LlamaForCausalLM"],  # llama.cpp converts it on its own
    }
    write_json(folder / "config.json", config)


def add_evidence(run: ExportArguments, folder: Path):
    """Put the results and figures that the card speaks of beside it; those of a dense checkpoint are none of ours.

    Without figures of its own it gets that of the tiny stand-in, to show how selection works.
    """
    own = Path(run.base_model)
    if run.results or (has_selector(run.base_model) and (own / "results.json").exists()):
        shutil.copyfile(run.results or own / "results.json", folder / "results.json")
    if has_selector(run.base_model) and (own / "figures").is_dir():
        shutil.copytree(own / "figures", folder / "figures")
    else:
        (folder / "figures").mkdir()
        shutil.copyfile(RESULTS / "cards_selections.png", folder / "figures" / "selections.png")


def describe(run: ExportArguments, model, made_from: str, folder: Path) -> CardContent:
    """What the card of the exported `folder` is made of."""
    size = SIZES.get(model.config.text_config.hidden_size)
    base = None if Path(made_from).exists() else made_from
    made_from = base or f"{'random weights of ' * run.random_weights}{Path(made_from).name}"
    results = folder / "results.json"
    return CardContent(
        name=Path(run.output).name,
        repo_id=run.repo_id or run.output,
        made_from=made_from,
        base_model=base,
        budgets=budgets_in_words(model.config),
        command="python training/run_qgsa.py --preset " + (f"vqa_rad_{size}" if size else "demo"),
        selector_cost=selector_share(model.config),
        trained=has_selector(run.base_model),
        parameters=None if size else model.num_parameters(),
        accuracy=read_json(results) if results.exists() else None,
        speed=read_json(RESULTS / f"speed_{size}_cpu.json") if size else None,
        flops=read_json(RESULTS / "flops.json")["answers"][f"smolvlm-{size}-instruct"] if size else None,
        picture="figures/selections.png",
    )


def read_json(path: Path):
    return json.loads(path.read_text())


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
