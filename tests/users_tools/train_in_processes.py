"""Two steps of transformers' Trainer, in one process or in several; tests run this script with torchrun.

    python train_in_processes.py HUB_CARDS OUTPUT KIND UNUSED CHECKPOINTING

Each process writes its losses and weights to OUTPUT/RANK.json.
"""

import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from modeling_qgsa import QGSAProcessor, QGSASmolVLMForConditionalGeneration
from training.data.collator import QuestionCollator


QUESTIONS = {
    "what shape is on the red card?": "moon",
    "how many cards are there?": "seven",
    "what shape is on the blue card?": "moon",
    "what shape is on the green card?": "star",
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
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(hub / "tiny-dense")
    model = QGSASmolVLMForConditionalGeneration.from_pretrained(hub / "tiny-qgsa")
    model.config.selection = kind
    return model


def main(hub: Path, output: Path, kind: str, unused: str, checkpointing: str):
    torch.manual_seed(0)
    processes = int(os.environ.get("WORLD_SIZE", 1))
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
        ddp_find_unused_parameters={"default": None, "refused": False}[unused],
        activation_checkpointing=checkpointing != "none",
        activation_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
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
    after = dict(model.named_parameters())
    report = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": [weight.double().abs().sum().item() for weight in after.values()],
        "moved": {
            part: max((after[name] - before[name]).abs().max().item() for name in before if name.startswith(part))
            for part in ("model.selector.", "model.text_model.")
            if any(name.startswith(part) for name in before)
        },
    }
    (output / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
