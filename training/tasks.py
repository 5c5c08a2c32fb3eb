"""The two tasks of `run_qgsa.py`: train the tiny dense model; train, evaluate and report question-guided selection."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.data.cards import FAMILIES, Cards
from training.data.collator import QuestionCollator
from training.data.vqa_rad import load_vqa_rad
from training.dense import train_dense
from training.evaluation import DENSE, System, add_flops, evaluate_systems, standard_systems
from training.report import (
    format_families,
    format_table,
    plot_accuracy,
    plot_selections,
    write_card,
    write_dense_card,
    write_results,
)
from training.tiny import build_model, build_processor
from training.trainer import QGSATrainer


LORA_TARGETS = r".*text_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
SMOKE_QUESTIONS = 2  # with random weights the accuracies say nothing: as many questions as show that the path works


def load_base(base_model: str, random_weights: bool):
    """The dense model and a QGSA processor for it, on PIL so that figures do not depend on what is installed.

    `tiny` builds the stand-in afresh; `random_weights` builds a checkpoint's architecture from its config.
    """
    if base_model == "tiny":
        stock = build_processor()
        parts = {"image_seq_len": stock.image_seq_len, "chat_template": stock.chat_template}
        return build_model(stock), QGSAProcessor(stock.image_processor, stock.tokenizer, **parts)
    processor = QGSAProcessor.from_pretrained(base_model, backend="pil")
    if random_weights:
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base_model)).float(), processor
    # In float32 whatever the checkpoint is in: small steps are lost on bfloat16 weights; --bf16 gives the speed.
    return AutoModelForImageTextToText.from_pretrained(base_model, dtype="float32"), processor


def load_data(run, seed: int):
    """Training and test questions of `run.dataset`. Raises ValueError for an unknown one."""
    if run.dataset == "cards":
        return Cards("train", run.train_size, seed), Cards("test", run.test_size)
    if run.dataset == "vqa_rad":
        train, test = (load_vqa_rad(run.data_dir, split, run.split_by) for split in ("train", "test"))
        return train, torch.utils.data.Subset(test, range(min(run.test_size, len(test))))
    raise ValueError(f"dataset is {run.dataset!r}: choose from cards, vqa_rad")


def run_dense(preset: str, run, args, command: str):
    """Train the tiny dense stand-in; save it as a complete checkpoint with its test results and card."""
    model, processor = load_base(run.base_model, run.random_weights)
    model = train_dense(model, processor, args, run.words, run.tower_samples, run.pictures, run.validation_size)

    output = Path(args.output_dir)
    model.save_pretrained(output)
    stock = build_processor() if run.base_model == "tiny" else processor
    stock.save_pretrained(output)
    test = Cards("test", run.test_size)
    system = System("dense", QGSASmolVLMForConditionalGeneration.from_dense(model, processor.tokenizer), DENSE)
    rows = evaluate_systems([system], test, processor, run.test_batch_size, run.max_new_tokens)
    write_results(output / "results.json", preset, "cards", len(test), args.seed, rows)
    needed = {family: tiles for family, (tiles, _) in FAMILIES.items()}
    print(write_dense_card(output, output.name, model.num_parameters(), len(test), rows[0], needed, command))


def run_qgsa(preset: str, run, args, command: str):
    """Train selector and adapters on a frozen dense model, evaluate all systems, write the outputs folder."""
    check_systems(run.systems)
    dense, processor = load_base(run.base_model, run.random_weights)
    train, test = load_data(run, args.seed)
    if run.random_weights:
        test = torch.utils.data.Subset(test, range(SMOKE_QUESTIONS))
    budget = {
        name: getattr(run, name) for name in ("min_visual_tokens", "max_visual_tokens", "min_tiles", "max_tiles")
    }
    tuned = QGSASmolVLMForConditionalGeneration.from_dense(dense, processor.tokenizer, **budget)
    dense = QGSASmolVLMForConditionalGeneration.from_dense(dense, processor.tokenizer, **budget)

    trainer = QGSATrainer(
        model=add_adapters(tuned, run.lora_rank),
        args=args,
        train_dataset=train,
        data_collator=QuestionCollator(processor),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    tuned = trainer.model.merge_and_unload() if run.lora_rank else trainer.model

    output = Path(args.output_dir)
    tuned.save_pretrained(output)
    processor.save_pretrained(output)
    evaluate_and_report(preset, run, args, command, dense.to(tuned.device), tuned, processor, test)


def check_systems(systems: str):
    """Raise ValueError, before anything is trained, for an unknown system, or where dense or qgsa is left out."""
    wanted, known = set(systems.split()), [system.name for system in standard_systems(None, None)]
    if wanted - set(known) or not {"dense", "qgsa"} <= wanted:
        raise ValueError(
            f"systems is {systems!r}: choose from {', '.join(known)}; dense and qgsa have to be among them"
        )


def add_adapters(model, rank: int):
    """Freeze all but the selector and LoRA adapters of `rank` on the text model's attention; 0 adds none."""
    own = ["selector", "complexity_estimator"]
    if rank:
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, modules_to_save=own)
        return get_peft_model(model, lora)
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(f".{part}." in name for part in own))
    return model


def evaluate_and_report(preset, run, args, command, dense, tuned, processor, test):
    """Evaluate the systems of `run` and write `results.json`, figures and card; print the tables."""
    output = Path(args.output_dir)
    (output / "figures").mkdir(parents=True, exist_ok=True)
    wanted = run.systems.split()
    systems = [system for system in standard_systems(dense, tuned) if system.name in wanted]
    rows = evaluate_systems(systems, test, processor, run.test_batch_size, run.max_new_tokens, args.seed)
    add_flops(rows, systems, test, processor, run.max_new_tokens, questions=1 if run.random_weights else 8)
    write_results(output / "results.json", preset, run.dataset, len(test), args.seed, rows)
    plot_accuracy(rows, output / "figures" / "accuracy.png")
    samples = one_of_each_family(test)
    collate = QuestionCollator(processor, with_answer=False)
    plot_selections(tuned, processor, samples, collate, output / "figures" / "selections.png")
    write_card(output, f"qgsa-{preset}", run.base_model, run.dataset, len(test), rows, command)
    print(f"\n{format_table(rows)}\n\n{format_families(rows)}\n\nCheckpoint, card and figures: {output}")


def one_of_each_family(dataset, most: int = 6) -> list[dict]:
    """The first question of each family, `most` at the most."""
    found = {}
    for index in range(min(len(dataset), 200)):
        sample = dataset[index]
        found.setdefault(sample["family"], sample)
    return list(found.values())[:most]
