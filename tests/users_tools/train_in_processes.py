"""Two steps of transformers' Trainer in every scenario, or of TRL's, in one process or several; run with torchrun.

    python train_in_processes.py HUB_CARDS OUTPUT KIND TOOL

Each process writes losses and weights, or the error, of each scenario of TOOL to OUTPUT/RANK.json.
"""

import json
import os
import sys
from pathlib import Path

import datasets
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, Idefics3Processor, Trainer, TrainingArguments

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.data.collator import QuestionCollator


QUESTIONS = {
    "what shape is on the red card?": "moon",
    "how many cards are there?": "seven",
    "what shape is on the blue card?": "moon",
    "what shape is on the green card?": "star",
}


# By default Trainer looks for weights without a gradient, but not under checkpointing, TRL's default.
SCENARIOS = {
    "trainer": {
        "default": {},
        "not looked for": {"ddp_find_unused_parameters": False},
        "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        "non-reentrant": {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
        },
    },
    "sft": {
        "default": {},
        "without checkpointing": {"gradient_checkpointing": False},
    },
}


class Questions(Dataset):
    def __init__(self, image):
        self.samples = [{"image": image, "question": each, "answer": answer} for each, answer in QUESTIONS.items()]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def load(hub: Path, kind: str):
    """The shipped model in the variant `kind`, or the shipped dense model for "stock"."""
    if kind == "stock":
        return AutoModelForImageTextToText.from_pretrained(hub / "tiny-dense")
    model = QGSASmolVLMForConditionalGeneration.from_pretrained(hub / "tiny-qgsa")
    if kind == "scheduled":  # each step draws a schedule
        model.config.vision_schedules = ["CCCCTT", "FFCCCC", "FFFFFF"]
    else:
        model.config.selection = kind
    return model


def trainer_of(model, hub: Path, kind: str, image, **options) -> Trainer:
    """transformers' Trainer on our collator's batches."""
    collate = QuestionCollator(QGSAProcessor.from_pretrained(hub / "tiny-qgsa", backend="pil"))

    def inputs_of(samples):
        inputs = collate(samples)
        if kind == "stock":
            del inputs["question_mask"]
        return inputs

    args = TrainingArguments(remove_unused_columns=False, **options)
    return Trainer(model=model, args=args, train_dataset=Questions(image), data_collator=inputs_of)


def sft_trainer_of(model, hub: Path, kind: str, image, **options) -> Trainer:
    """TRL's SFTTrainer on prompts and completions."""
    import trl  # only this scenario needs it

    processor_class = Idefics3Processor if kind == "stock" else QGSAProcessor
    rows = [
        {
            "image": image,
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in QUESTIONS.items()
    ]
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(bf16=False, max_length=None, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor_class.from_pretrained(hub / "tiny-qgsa", backend="pil"),
    )


TOOLS = {"trainer": trainer_of, "sft": sft_trainer_of}


def train(hub: Path, output: Path, kind: str, tool: str, processes: int, **options) -> dict:
    """Losses and weights after two steps on four questions each."""
    torch.manual_seed(0)
    model = load(hub, kind)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    image = Image.open(hub / "space" / "examples" / "cards_18.png").convert("RGB")
    options |= {
        "output_dir": str(output / "run"),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4 // processes,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-3,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    trainer = TOOLS[tool](model, hub, kind, image, **options)
    trainer.train()
    selector = [name for name in before if name.startswith("model.selector.")]
    after = dict(model.named_parameters())
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": [weight.double().abs().sum().item() for weight in after.values()],
        "selector moved": any(bool((after[name] != before[name]).any()) for name in selector),
    }


def main(hub: Path, output: Path, kind: str, tool: str):
    report, processes = {}, int(os.environ.get("WORLD_SIZE", 1))
    for name, options in SCENARIOS[tool].items():
        try:
            report[name] = train(hub, output, kind, tool, processes, **options)
        except RuntimeError as error:
            report[name] = {"error": str(error)}
    (output / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
