"""Two steps of transformers' Trainer in every scenario, in one process or in several; tests run it with torchrun.

    python train_in_processes.py HUB_CARDS OUTPUT KIND

Each process writes losses and weights, or the error, of each scenario to OUTPUT/RANK.json.
"""

import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.data.collator import QuestionCollator


QUESTIONS = {
    "what shape is on the red card?": "moon",
    "how many cards are there?": "seven",
    "what shape is on the blue card?": "moon",
    "what shape is on the green card?": "star",
}


# By default Trainer looks for weights without a gradient, but not under checkpointing.
SCENARIOS = {
    "default": {},
    "not looked for": {"ddp_find_unused_parameters": False},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
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
    model.config.selection = kind
    return model


def train(hub: Path, output: Path, kind: str, processes: int, **options) -> dict:
    """Losses and weights after two steps on four questions each."""
    torch.manual_seed(0)
    model = load(hub, kind)
    processor = QGSAProcessor.from_pretrained(hub / "tiny-qgsa", backend="pil")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    args = TrainingArguments(
        str(output / "run"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        max_steps=2,
        per_device_train_batch_size=4 // processes,
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        **options,
    )
    image = Image.open(hub / "space" / "examples" / "cards_18.png").convert("RGB")
    collate = QuestionCollator(processor)

    def inputs_of(samples):
        inputs = collate(samples)
        if kind == "stock":
            del inputs["question_mask"]
        return inputs

    trainer = Trainer(model=model, args=args, train_dataset=Questions(image), data_collator=inputs_of)
    trainer.train()
    selector = [name for name in before if name.startswith("model.selector.")]
    after = dict(model.named_parameters())
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": [weight.double().abs().sum().item() for weight in after.values()],
        "selector moved": any(bool((after[name] != before[name]).any()) for name in selector),
    }


def main(hub: Path, output: Path, kind: str):
    report, processes = {}, int(os.environ.get("WORLD_SIZE", 1))
    for name, options in SCENARIOS.items():
        try:
            report[name] = train(hub, output, kind, processes, **options)
        except RuntimeError as error:
            report[name] = {"error": str(error)}
    (output / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
