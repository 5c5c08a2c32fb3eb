"""The two tasks of `run_qgsa.py`: train the tiny dense model; train, evaluate and report question-guided selection."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.cli.arguments import check_source
from training.data.cards import FAMILIES
from training.data.collator import QuestionCollator
from training.data.sets import load_data
from training.evaluation.card import CardContent, budgets_in_words, selector_share, write_card, write_dense_card
from training.evaluation.report import (
    format_families,
    format_table,
    plot_accuracy,
    plot_selections,
    write_results,
)
from training.evaluation.rows import add_flops, evaluate_systems
from training.evaluation.systems import DENSE, System, choose_systems
from training.learning.clip_alignment import PatchWordAlignment
from training.learning.feature_cache import open_feature_cache
from training.learning.store import TensorStore
from training.learning.trainer import QGSATrainer
from training.standins.dense import train_dense, train_on_questions
from training.standins.tiny import build_model, build_processor, save_processor


KEPT_PRECISE = ("vision_model", "connector", "selector", "complexity_estimator")  # where all else is quantized
SMOKE_QUESTIONS = 2  # with random weights the accuracies say nothing: as many questions as show that the path works


def load_base(run, texts=None):
    """The dense model of `run` and a QGSA processor for it, on PIL so that figures do not depend on what is installed.

    `base_model` `tiny` builds the stand-in afresh, with a tokenizer of its own for `texts` if they are given;
    `random_weights` builds a checkpoint's architecture from its config.
    """
    base_model = run.base_model
    if base_model == "tiny":
        stock = build_processor(texts, run.longest_edge)
        parts = {"image_seq_len": stock.image_seq_len, "chat_template": stock.chat_template}
        return build_model(stock), QGSAProcessor(stock.image_processor, stock.tokenizer, **parts)
    check_source(base_model)
    processor = QGSAProcessor.from_pretrained(base_model, backend="pil")
    if run.random_weights:
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base_model)).float(), processor
    # In float32 whatever the checkpoint is in: small steps are lost on bfloat16 weights; --bf16 gives the speed.
    return AutoModelForImageTextToText.from_pretrained(base_model, dtype="float32"), processor


def run_dense(preset: str, run, args, command: str):
    """Train the tiny dense stand-in; save it as a complete checkpoint with its test results and card."""
    train, test = load_data(run, args.seed)
    if run.dataset == "cards":
        model, processor = load_base(run)
        model = train_dense(model, processor, args, run.words, run.tower_samples, run.pictures, run.validation_size)
    else:
        texts = [f"User: {sample['question']}\nAssistant: {sample['answer']}" for sample in tqdm(train, desc="words")]
        model, processor = load_base(run, texts)
        model = train_on_questions(model, processor, args, train)

    output = Path(args.output_dir)
    model.config.use_cache = True  # Trainer turned it off
    model.save_pretrained(output)
    save_processor(processor, output)
    system = System("dense", QGSASmolVLMForConditionalGeneration.from_dense(model, processor.tokenizer), DENSE)
    rows = evaluate_systems([system], test, processor, run.test_batch_size, run.max_new_tokens, args.seed, run.dataset)
    write_results(output / "results.json", preset, run.dataset, len(test), args.seed, rows, run.eval_split)
    needed = {family: FAMILIES[family][0] if run.dataset == "cards" else "unknown" for family in rows[0]["by_family"]}
    print(write_dense_card(output, output.name, model.num_parameters(), len(test), rows[0], needed, command))


def run_qgsa(preset: str, run, args, command: str):
    """Train selector and adapters on a frozen dense model, evaluate all systems, write the outputs folder.

    The task `evaluate` leaves the training out: it takes the checkpoint in the outputs folder.
    """
    choose_systems(run.systems.split(), None, None)  # complains before anything is trained
    if run.selection == "blocks" and run.feature_cache:
        raise ValueError(
            f"selection is 'blocks': it takes pixels, feature_cache {run.feature_cache!r} has whole tiles"
        )
    output = Path(args.output_dir)
    dense, processor = load_base(run)
    train, test = load_data(run, args.seed)
    if run.random_weights:
        test = torch.utils.data.Subset(test, range(min(SMOKE_QUESTIONS, len(test))))
    if run.task == "evaluate":
        tuned = QGSASmolVLMForConditionalGeneration.from_pretrained(output).to(args.device)
    else:
        tuned = train_selection(dense, processor, run, args, train)
        tuned.config.use_cache = True  # Trainer turned it off
        if args.should_save:
            tuned.save_pretrained(output)
            processor.save_pretrained(output)
    dense = QGSASmolVLMForConditionalGeneration.from_dense(dense, processor.tokenizer, **budget_of(run))
    evaluate_and_report(preset, run, args, command, dense.to(tuned.device), tuned, processor, test)


def budget_of(run) -> dict:
    """The fields of the budget, as [`QGSAConfig`] has them."""
    names = ("selection", "min_visual_tokens", "max_visual_tokens", "min_tiles", "max_tiles")
    return {name: getattr(run, name) for name in names}


def train_selection(dense, processor, run, args, train):
    """Train selector and adapters on the frozen weights of `dense`, which is left as it is; the merged QGSA model."""
    base = QGSASmolVLMForConditionalGeneration.from_dense(dense, processor.tokenizer, **budget_of(run))
    frozen = base if run.quantization == "none" else quantize(base, run, args.device)
    cache = alignment = None
    if run.feature_cache:
        cache = open_feature_cache(f"{run.feature_cache}/vision", frozen, processor, int(run.feature_cache_gb * 1e9))
    if args.patch_word_weight:
        alignment = load_alignment(run, args, round(base.config.tokens_per_tile**0.5))
    neutral = processor.tokenizer(args.neutral_question or "", add_special_tokens=False)["input_ids"]
    trainer = QGSATrainer(
        model=add_adapters(frozen, run.lora_rank, run.lora_targets),
        args=args,
        feature_cache=cache,
        neutral_ids=tuple(neutral),
        train_dataset=train,
        data_collator=QuestionCollator(processor, alignment=alignment),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if run.quantization != "none":  # merged into the weights as they were before
        adapter = f"{args.output_dir}/adapter"
        trainer.save_model(adapter)
        trainer.accelerator.wait_for_everyone()
        return PeftModel.from_pretrained(base, adapter).merge_and_unload().to(args.device)
    return trainer.model.merge_and_unload() if run.lora_rank else trainer.model


def quantize(model, run, device):
    """A copy of `model` with its text model in 4 or 8 bits (bitsandbytes); encoder, selector and head stay precise.

    Raises ValueError for another `quantization`, and without adapters: nothing else of such a model can be taught.
    """
    if run.quantization not in ("4bit", "8bit"):
        raise ValueError(f"quantization is {run.quantization!r}: choose from none, 4bit, 8bit")
    if not run.lora_rank:
        raise ValueError(f"quantization is {run.quantization!r} and lora_rank is 0: what is quantized needs adapters")
    config = BitsAndBytesConfig(
        **{f"load_in_{run.quantization}": True},
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["lm_head", *(f"model.{part}" for part in KEPT_PRECISE)],
    )
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, quantization_config=config, device_map={"": device})


def load_alignment(run, args, side: int) -> PatchWordAlignment:
    """The frozen CLIP of patch-word alignment, its patch features kept beside the feature cache where there is one."""
    device = args.device if args.dataloader_num_workers == 0 else "cpu"  # worker processes cannot use a GPU
    alignment = PatchWordAlignment(run.clip_model, run.clip_pretrained, side, device=device)
    if run.feature_cache:
        size = int(run.feature_cache_gb * 1e9)
        alignment.store = TensorStore(f"{run.feature_cache}/clip", alignment.fingerprint(), size)
    return alignment


def add_adapters(model, rank: int, targets: str):
    """Freeze all but the selector and LoRA adapters of `rank` on the modules that the regex `targets` names.

    A rank of 0 adds none. Raises ValueError where `targets` matches no module.
    """
    own = ["selector", "complexity_estimator"]
    names = [name for name, _ in model.named_modules()]
    if rank and not any(re.fullmatch(targets, name) for name in names):
        raise ValueError(f"lora_targets is {targets!r}: it matches 0 of the model's {len(names)} modules")
    if rank:
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=own)
        return get_peft_model(model, lora)
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(f".{part}." in name for part in own))
    return model


def evaluate_and_report(preset, run, args, command, dense, tuned, processor, test):
    """Evaluate the systems of `run` and write `results.json`, figures and card; print the tables."""
    systems = choose_systems(run.systems.split(), dense, tuned)
    rows = evaluate_systems(systems, test, processor, run.test_batch_size, run.max_new_tokens, args.seed, run.dataset)
    if not args.should_save:  # all processes have answered, the first one reports
        return
    output = Path(args.output_dir)
    (output / "figures").mkdir(parents=True, exist_ok=True)
    add_flops(rows, systems, test, processor, run.max_new_tokens, questions=1 if run.random_weights else 8)
    results = write_results(output / "results.json", preset, run.dataset, len(test), args.seed, rows, run.eval_split)
    plot_accuracy(rows, output / "figures" / "accuracy.png")
    samples = one_of_each_family(test)
    collate = QuestionCollator(processor, with_answer=False)
    plot_selections(tuned, processor, samples, collate, output / "figures" / "selections.png")
    content = CardContent(
        name=f"qgsa-{preset}",
        repo_id=str(output),
        made_from=run.base_model,
        base_model=None if Path(run.base_model).exists() else run.base_model,
        budgets=budgets_in_words(tuned.config),
        command=command,
        selector_cost=selector_share(tuned.config),
        trained=True,
        accuracy=results,
        picture="figures/selections.png",
    )
    write_card(output, content)
    print(f"\n{format_table(rows)}\n\n{format_families(rows)}\n\nCheckpoint, card and figures: {output}")


def one_of_each_family(dataset, most: int = 6) -> list[dict]:
    """The first question of each family, `most` at the most."""
    found = {}
    for index in range(min(len(dataset), 200)):
        sample = dataset[index]
        found.setdefault(sample["family"], sample)
    return list(found.values())[:most]
