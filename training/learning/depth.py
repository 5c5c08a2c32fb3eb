"""Universal training: one checkpoint that serves every schedule of vision in the text model (VISOR, ViCA)."""

from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from modeling_qgsa import QGSASmolVLMForConditionalGeneration
from modeling_qgsa.configuration_qgsa import MAX_BUDGET
from training.data.collator import QuestionCollator
from training.learning.train import add_adapters


def keep_everything(model: QGSASmolVLMForConditionalGeneration):
    """Let `model` encode every tile and keep every visual token: schedules alone decide what vision costs."""
    config = model.config
    config.selection, config.min_visual_tokens, config.max_visual_tokens = "after_encoder", MAX_BUDGET, MAX_BUDGET


def train_schedules(
    model: QGSASmolVLMForConditionalGeneration,
    processor,
    train: Dataset,
    args: TrainingArguments,
    rank: int,
    targets: str,
) -> QGSASmolVLMForConditionalGeneration:
    """Train LoRA adapters of the text model, each step with one of `config.vision_schedules`, and merge them.

    With `vision_cross="block"`, the blocks are trained beside them, with all of their weights. The model draws the
    schedule itself, see `choose_schedules`: any other trainer does the same.

    Args:
        model: of which nothing else is trained.
        train: samples, see `QuestionCollator`.
        rank, targets: rank of the adapters, and a regular expression for the modules that get them.

    Raises ValueError for a rank below 1, and as `add_adapters` does.
    """
    if rank < 1:
        raise ValueError(f"lora_rank ({rank}) must be at least 1")
    add_adapters(model, 0, targets)  # checks the targets, and freezes
    blocks = [f"vision_blocks.{number}" for number in range(len(model.model.vision_blocks or ()))]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=blocks or None)
    adapted = get_peft_model(model, lora)
    trainer = Trainer(adapted, args, QuestionCollator(processor), train)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    merged.config.use_cache = True  # Trainer turned it off
    return merged
