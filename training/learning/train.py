"""Training a selection: the selector and LoRA adapters on the frozen weights of a dense model."""

import re
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save
from transformers import BitsAndBytesConfig

from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from modeling_qgsa.selector_qgsa import FORMER_NAMES
from training.cli.groups import FeatureArguments, ModelArguments, SelectionArguments
from training.data.collator import QuestionCollator
from training.learning.clip_alignment import PatchWordAlignment
from training.learning.distillation import distil_glance
from training.learning.feature_cache import open_feature_cache
from training.learning.store import TensorStore, replace_file
from training.learning.trainer import QGSATrainer
from training.learning.training_arguments import QGSATrainingArguments


TRAINED = ("selector", "complexity_estimator")  # in addition to the adapters
NOT_QUANTIZED = ("vision_model", "connector", *TRAINED)


def to_qgsa(dense, processor, selection: SelectionArguments) -> QGSASmolVLMForConditionalGeneration:
    """The QGSA model of a dense one, with a new selector and the budget of `selection`."""
    given = {name: value for name, value in asdict(selection).items() if value is not None}
    return QGSASmolVLMForConditionalGeneration.from_dense(dense, processor, pointer="selector", **given)


def check_training(selection: SelectionArguments, features: FeatureArguments, args: QGSATrainingArguments):
    """Raise ValueError if `distillation_steps` is negative, or if options exclude each other.

    A feature cache holds whole tiles, so `selection` must not be "blocks", and `distillation_steps` teach a smaller
    glance, so there must be one.
    """
    if args.distillation_steps < 0:
        raise ValueError(f"distillation_steps ({args.distillation_steps}): must be at least 0")
    if args.distillation_steps > 0 and selection.glance_downscale == 1:
        raise ValueError(
            f"distillation_steps ({args.distillation_steps}): they teach a smaller glance, but glance_downscale is 1. "
            "Set it to 2, or leave distillation_steps out"
        )
    if selection.selection == "blocks" and features.feature_cache:
        raise ValueError(
            f"feature_cache ({features.feature_cache!r}): it holds whole tiles, but selection is 'blocks' and needs "
            "pixels. Leave feature_cache out"
        )


def train_selection(
    dense,
    processor,
    train,
    model: ModelArguments,
    selection: SelectionArguments,
    features: FeatureArguments,
    args: QGSATrainingArguments,
) -> QGSASmolVLMForConditionalGeneration:
    """Train selector and adapters on the frozen weights of `dense`; returns the QGSA model with the adapters merged.

    Args:
        dense: an Idefics3 or SmolVLM model; it is not modified.
        train: dataset of samples, see `QuestionCollator`.

    Raises ValueError as [`QGSATrainer`], `quantize`, `add_adapters`, `open_feature_cache` and `load_clip` do.
    """
    base = to_qgsa(dense, processor, selection)
    if args.distillation_steps > 0:
        distil_glance(base, processor, train, args)
    frozen = base if model.quantization == "none" else quantize(base, model, args.device)
    cache = alignment = None
    if features.feature_cache:
        cache = open_feature_cache(f"{features.feature_cache}/vision", frozen, processor, max_bytes(features))
    if args.patch_word_weight:
        alignment = load_alignment(features, args, side=round(base.config.tokens_per_tile**0.5))
    neutral = processor.tokenizer(args.neutral_question or "", add_special_tokens=False)["input_ids"]
    trainer = QGSATrainer(
        model=add_adapters(frozen, model.lora_rank, model.lora_targets),
        args=args,
        feature_cache=cache,
        neutral_ids=tuple(neutral),
        train_dataset=train,
        data_collator=QuestionCollator(processor, alignment=alignment),
    )
    if args.resume_from_checkpoint:
        with args.main_process_first():
            rename_former_weights(Path(args.resume_from_checkpoint))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if model.quantization != "none":  # the adapters are merged into the weights from before quantization
        adapter = f"{args.output_dir}/adapter"
        trainer.save_model(adapter)
        trainer.accelerator.wait_for_everyone()
        return PeftModel.from_pretrained(base, adapter).merge_and_unload().to(args.device)
    return trainer.model.merge_and_unload() if model.lora_rank else trainer.model


def rename_former_weights(checkpoint: Path):
    """Give the adapters in a checkpoint of version 0.2 the present names of their weights, in place.

    PEFT does so for `PeftModel.from_pretrained`, and not for `load_adapter`, with which Trainer resumes.
    """
    path = checkpoint / "adapter_model.safetensors"
    weights = load_file(path) if path.is_file() else {}
    present = {}
    for name, weight in weights.items():
        for former, now in FORMER_NAMES.items():
            name = name.replace(former, now)
        present[name] = weight
    if present.keys() != weights.keys():
        replace_file(path, save(present, metadata={"format": "pt"}))


def max_bytes(features: FeatureArguments) -> int:
    """Size limit of a cache, in bytes."""
    return int(features.feature_cache_gb * 1e9)


def quantize(qgsa, model: ModelArguments, device):
    """A copy of `qgsa` with its text model in 4 or 8 bits (bitsandbytes); encoder, selector and head stay as they are.

    Raises ValueError if `quantization` is unknown, or if there are no adapters: quantized weights cannot be trained.
    """
    if model.quantization not in ("4bit", "8bit"):
        raise ValueError(f"quantization ({model.quantization!r}): choose from none, 4bit, 8bit")
    if not model.lora_rank:
        raise ValueError(
            f"lora_rank (0): quantization {model.quantization!r} needs adapters. Set lora_rank to 1 or more"
        )
    config = BitsAndBytesConfig(
        **{f"load_in_{model.quantization}": True},
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["lm_head", *(f"model.{part}" for part in NOT_QUANTIZED)],
    )
    with TemporaryDirectory() as folder:
        qgsa.save_pretrained(folder)
        return type(qgsa).from_pretrained(folder, quantization_config=config, device_map={"": device})


def load_alignment(features: FeatureArguments, args: QGSATrainingArguments, side: int) -> PatchWordAlignment:
    """The frozen CLIP of patch-word alignment over `side` x `side` cells; its patch features go to the feature cache.

    Raises ValueError if `clip_model` is missing.
    """
    if not features.clip_model:
        raise ValueError("clip_model (None): patch_word_weight needs one. Name a model of open_clip with --clip_model")
    device = args.device if args.dataloader_num_workers == 0 else "cpu"  # worker processes cannot use a GPU
    alignment = PatchWordAlignment(features.clip_model, features.clip_pretrained, side, device=device)
    if features.feature_cache:
        alignment.store = TensorStore(f"{features.feature_cache}/clip", alignment.fingerprint(), max_bytes(features))
    return alignment


def add_adapters(qgsa, rank: int, targets: str):
    """Freeze all weights but the selector's and those of LoRA adapters.

    Args:
        rank: rank of the adapters; 0 adds none.
        targets: regular expression for the full names of the modules that get adapters.

    Raises ValueError if `targets` is not a regular expression or matches no module.
    """
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ValueError(f"lora_targets ({targets!r}): not a regular expression, {error}") from error
    names = [name for name, _ in qgsa.named_modules()]
    if rank and not any(pattern.fullmatch(name) for name in names):
        raise ValueError(f"lora_targets ({targets!r}): it must match at least one of the model's {len(names)} modules")
    if rank:
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=list(TRAINED))
        return get_peft_model(qgsa, lora)
    for name, weight in qgsa.named_parameters():
        weight.requires_grad_(any(f".{part}." in name for part in TRAINED))
    return qgsa
