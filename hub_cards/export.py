"""Export a complete folder for the Hub: weights, code, tokenizer and preprocessor files, card, licence and figures.

    python hub_cards/export.py --model outputs/demo --output_dir outputs/hub/qgsa-smolvlm-tiny
    python hub_cards/export.py --model outputs/vqa_rad_256m --output_dir outputs/hub/qgsa-smolvlm-256m

`--model` is the outputs folder of a run, a QGSA checkpoint, or a dense one, which then points with its attention.
`--format` exports the adapted weights without the selector, for software that only supports the published
architectures (such as llama.cpp and OpenVINO):

    python hub_cards/export.py --model outputs/vqa_rad_256m --format idefics3 --output_dir outputs/hub/plain-256m

`--format onnx` adds graphs for ONNX Runtime, named as in the published repositories, and the code that runs them
without torch (`qgsa_onnx`):

    python hub_cards/export.py --model outputs/vqa_rad_256m --format onnx --output_dir outputs/hub/onnx-256m

The folder appears only once it is complete; an existing folder is left untouched.
"""

import json
import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
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
from modeling_qgsa.configuration_qgsa import AUTO_MAP, POINTERS
from modeling_qgsa.conversion_qgsa import OWN_WEIGHTS, marker_ids
from training.cli.arguments import check_source, errors_in_one_line, parse
from training.evaluation.card import CardContent, budgets_in_words, pointer_share, write_card


HERE = Path(__file__).resolve().parent
PLAIN = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}
# Tokenizer, chat template and preprocessor as published: transformers 4 cannot load them once 5 has saved them.
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

The weights of a QGSA-SmolVLM without its selector: a plain SmolVLM that encodes every tile and keeps every visual
token, for software that does not support QGSA. Load it with
`AutoModelForImageTextToText.from_pretrained("{repo_id}")`. Its logits equal those of QGSA with `selection="dense"`; it
has not been measured separately.
"""
ONNX_CARD = """
## ONNX Runtime

`onnx/` holds graphs for ONNX Runtime ({variants}), named as in the published SmolVLM repositories. In a copy of this
repository, and with `pip install onnxruntime tokenizers pillow`, `qgsa_onnx` runs them without torch and transformers:

```python
from PIL import Image
from qgsa_onnx import OnnxModel, chat_prompt

model = OnnxModel(".", variant="{variant}")
print(model.generate(chat_prompt("what shape is on the red card?"), [Image.open("image.png")]).text)
```
"""
FORMATS = ("qgsa", "onnx", *PLAIN)
VARIANTS = ("fp32", "fp16", "int8", "q4")
SIZES = {576: "256m", 960: "500m"}  # by hidden size of the text model
RENAMED = {"--base_model": "--model", "--output": "--output_dir", "--files": "--processor"}
RESULTS = HERE / "results"
CODE = HERE.parent / "modeling_qgsa"


@dataclass
class ExportArguments:
    """Source, format and destination of an export."""

    model: str = field(
        metadata={"help": "Outputs folder of a run, QGSA checkpoint or dense checkpoint: Hub id or folder."}
    )
    output_dir: str = field(metadata={"help": "Folder to create; must be empty or not exist."})
    format: str = field(
        default="qgsa",
        metadata={
            "help": "qgsa; onnx, the same with graphs for ONNX Runtime; or idefics3 or smolvlm, the plain "
            "architecture without selector."
        },
    )
    onnx_variants: list[str] = field(
        default_factory=lambda: ["fp32", "int8"],
        metadata={"help": f"Precisions of the graphs of --format onnx, some of {', '.join(VARIANTS)}."},
    )
    onnx_pointers: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Pointers that get graphs, some of {', '.join(POINTERS)}; by default the configured one alone."
        },
    )
    glance_downscale: int | None = field(
        default=None,
        metadata={
            "help": "By how much the global view of an image with tiles is scaled down; by default as configured."
        },
    )
    processor: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the published processor files; by default those of the base model."},
    )
    results: str | None = field(
        default=None, metadata={"help": "results.json of the evaluation; by default that of the model, if present."}
    )
    repo_id: str | None = field(default=None, metadata={"help": "Hub id named in the card; output_dir by default."})
    random_weights: bool = field(default=False, metadata={"help": "Initialize the model from its config, untrained."})


def main():
    run = parse(ExportArguments, __doc__, RENAMED)
    with errors_in_one_line():
        export(run)
    print(f"{run.format} checkpoint: {run.output_dir}")


def export(run: ExportArguments):
    """Create the folder `run.output_dir`. Raises ValueError if the folder is not empty or the format is unknown."""
    if run.format not in FORMATS:
        raise ValueError(f"format ({run.format!r}) must be one of {', '.join(FORMATS)}")
    if run.format == "onnx":
        check_onnx(run.onnx_variants, run.onnx_pointers)
    output = Path(run.output_dir)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output_dir ({output}) must be empty or not exist: choose another folder")
    for source in (run.model, run.processor):
        if source:
            check_source(source)
    made_from = dense_base_of(run.model)
    files = processor_files(run.processor or made_from)
    model = load(run)
    # A checkpoint of an earlier version lacks some of these ids.
    model.config.update(marker_ids(QGSAProcessor.from_pretrained(files, backend="pil")))
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        staged = Path(folder) / output.name
        if run.format in PLAIN:
            to_plain(model, run.format).save_pretrained(staged)
            (staged / "README.md").write_text(PLAIN_CARD.format(repo_id=run.repo_id or run.output_dir))
        else:
            model.save_pretrained(staged)
            for path in CODE.glob("*_qgsa.py"):
                shutil.copyfile(path, staged / path.name)
            add_evidence(run, staged)
            write_card(staged, describe(run, model, made_from, staged))
        copy_processor(files, staged, run.format)
        write_generation_config(files, staged, model)
        add_legacy_fields(staged)
        shutil.copyfile(HERE.parent / "LICENSE", staged / "LICENSE")
        if run.format == "onnx":  # last: it changes the model
            add_onnx(run, model, staged)
        if output.exists():
            output.rmdir()
        staged.rename(output)


def check_onnx(variants: list[str], pointers: list[str]):
    """Raise ValueError for an unknown variant or pointer or a missing package, before anything is computed."""
    for name, given, known in (("variants", variants or [""], VARIANTS), ("pointers", pointers, POINTERS)):
        for each in given:
            if each not in known:
                raise ValueError(f"onnx_{name} ({each!r}): choose from {', '.join(known)}")
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"format ('onnx') needs {' and '.join(missing)}: pip install -e '.[onnx]'")


def add_onnx(run: ExportArguments, model: QGSASmolVLMForConditionalGeneration, folder: Path):
    """Add the graphs of the model, the code that runs them, and a section of the card."""
    from export_onnx import export_graphs  # needs packages that the other formats do not

    export_graphs(model, folder / "onnx", run.onnx_variants, run.onnx_pointers)
    (folder / "qgsa_onnx").mkdir()
    for path in (HERE / "qgsa_onnx").glob("*.py"):
        shutil.copyfile(path, folder / "qgsa_onnx" / path.name)
    with (folder / "README.md").open("a") as card:
        card.write(ONNX_CARD.format(variants=", ".join(run.onnx_variants), variant=run.onnx_variants[0]))


def dense_base_of(model: str) -> str:
    """Dense checkpoint of a run's folder, from its `run.json`; without that file, `model` itself."""
    path = Path(model) / "run.json"
    return json.loads(path.read_text())["base_model"] if path.exists() else model


def processor_files(source: str) -> Path:
    """Folder of the processor files of a Hub id or folder. Raises ValueError if it has no tokenizer."""
    names = [*VERBATIM, "processor_config.json", "generation_config.json"]
    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, allow_patterns=names))
    if not (folder / "tokenizer_config.json").exists():
        raise ValueError(f"processor ({source}) has no tokenizer_config.json: give the id or folder of a processor")
    return folder


def has_selector(model: str) -> bool:
    """Whether a checkpoint is a QGSA checkpoint, read from its config alone."""
    config, _ = PretrainedConfig.get_config_dict(model)
    return config.get("model_type") == QGSAConfig.model_type


def load(run: ExportArguments) -> QGSASmolVLMForConditionalGeneration:
    """Load the QGSA model; one that is made from a dense checkpoint points with its attention."""
    if has_selector(run.model):
        model = QGSASmolVLMForConditionalGeneration.from_pretrained(run.model)
    elif not run.random_weights:
        model = QGSASmolVLMForConditionalGeneration.from_dense(run.model)
    else:
        dense = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(run.model))
        tokenizer = QGSAProcessor.from_pretrained(run.model).tokenizer
        model = QGSASmolVLMForConditionalGeneration.from_dense(dense, tokenizer)
        torch.nn.init.normal_(model.model.selector.cell_position, std=0.02)  # stands in for a trained one
    if run.glance_downscale is not None:
        model.config.glance_downscale = run.glance_downscale
        model.config.validate_sizes()
    return model


def to_plain(model: QGSASmolVLMForConditionalGeneration, architecture: str):
    """Text model, vision encoder and connector as a stock model, equal to `model` with `selection="dense"`."""
    config_class, model_class = PLAIN[architecture]
    source = model.config
    vision = {name: value for name, value in source.vision_config.to_dict().items() if name != "model_type"}
    config = config_class(
        text_config=source.text_config.to_dict(),
        vision_config=vision,
        scale_factor=source.scale_factor,
        image_token_id=source.image_token_id,
        tie_word_embeddings=source.tie_word_embeddings,
        pad_token_id=source.text_config.pad_token_id,
    )
    plain = model_class._from_config(config, dtype=model.dtype)
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if not name.startswith(OWN_WEIGHTS)}
    )
    return plain


def copy_processor(files: Path, folder: Path, architecture: str):
    """Copy tokenizer, chat template and preprocessor verbatim; write `processor_config.json` with the class name."""
    for pattern in VERBATIM:
        for path in sorted(files.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    published = json.loads((files / "processor_config.json").read_text())
    if "image_processor" in published or not (files / "preprocessor_config.json").exists():
        raise ValueError(
            f"processor ({files}) was saved by transformers 5, which 4 cannot read: give the published files"
        )
    written = {"image_seq_len": published["image_seq_len"], "processor_class": "Idefics3Processor"}
    if architecture not in PLAIN:
        written |= {"processor_class": "QGSAProcessor", "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}
    write_json(folder / "processor_config.json", written)


def write_generation_config(files: Path, folder: Path, model):
    """Write the published generation config with the end-of-utterance token as its only stop token."""
    path = files / "generation_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    config.pop("_from_model_config", None)  # would make transformers 4 use the text model's ids
    write_json(folder / "generation_config.json", config | {"eos_token_id": model.config.end_of_utterance_token_id})


def add_legacy_fields(folder: Path):
    """Add the config fields that other readers need: `rope_theta` and the architecture of the text model."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"]["rope_parameters"]
    if rope["rope_type"] != "default":
        raise ValueError(f"rope_type ({rope['rope_type']!r}) must be 'default' to be readable by transformers 4")
    config["text_config"] |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "architectures": ["LlamaForCausalLM"],  # lets llama.cpp convert the text model alone
    }
    write_json(folder / "config.json", config)


def add_evidence(run: ExportArguments, folder: Path):
    """Copy the results and figures that the card shows; results of a dense checkpoint do not belong to this model.

    Without figures of its own the model gets the selection figure of the tiny stand-in, as an illustration.
    """
    source = Path(run.model)
    if run.results or (has_selector(run.model) and (source / "results.json").exists()):
        shutil.copyfile(run.results or source / "results.json", folder / "results.json")
    if has_selector(run.model) and (source / "figures").is_dir():
        shutil.copytree(source / "figures", folder / "figures")
    else:
        (folder / "figures").mkdir()
        shutil.copyfile(RESULTS / "cards_selections.png", folder / "figures" / "selections.png")


def describe(run: ExportArguments, model, made_from: str, folder: Path) -> CardContent:
    """Content of the card of the exported `folder`."""
    size = SIZES.get(model.config.text_config.hidden_size)
    base_model = None if Path(made_from).exists() else made_from
    made_from = base_model or f"{'random weights of ' * run.random_weights}{Path(made_from).name}"
    results = folder / "results.json"
    return CardContent(
        name=Path(run.output_dir).name,
        repo_id=run.repo_id or run.output_dir,
        made_from=made_from,
        base_model=base_model,
        budgets=budgets_in_words(model.config),
        command="python training/run_qgsa.py --preset " + (f"vqa_rad_{size}" if size else "demo"),
        pointer_cost=pointer_share(model.config),
        trained=model.config.pointer == "selector",
        calibration=model.config.calibration,
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
