"""Distillation of the encoder: a smaller glance learns to give the features of the whole one.

The encoder as it was is the teacher, so that images are enough: no answers, no boxes. This comes before all else.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Trainer

from modeling_qgsa.vision_qgsa import encode_scaled_down
from training.learning.stages import stage_arguments, train_resumable
from training.learning.training_arguments import QGSATrainingArguments


def visual_tokens(vision_model, connector, pixel_values: torch.Tensor) -> torch.Tensor:
    """What a connector makes of whole tiles `(N, 3, H, W)`: visual tokens `(N, P, D)`."""
    side = vision_model.config.image_size // vision_model.config.patch_size
    patches = torch.ones(len(pixel_values), side, side, dtype=torch.bool, device=pixel_values.device)
    return connector(vision_model(pixel_values, patch_attention_mask=patches).last_hidden_state)


def relative_error(features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the mean square of the `target`, a float32 scalar: 0 for equal ones, 1 for zeros."""
    features, target = features.float(), target.float()
    return (features - target).square().mean() / target.square().mean()


class GlanceDistillation(nn.Module):
    """The encoder and connector of a model as student, and a frozen copy of them as teacher.

    Args:
        model: a [`QGSASmolVLMModel`]; its encoder and connector are trained in place, all else is frozen.
    """

    def __init__(self, model):
        super().__init__()
        self.teacher = copy.deepcopy(nn.ModuleList([model.vision_model, model.connector])).requires_grad_(False)
        self.student = model.requires_grad_(False)
        for part in (model.vision_model, model.connector):
            part.requires_grad_(True)

    def forward(self, glances: torch.Tensor, tiles: torch.Tensor) -> dict[str, torch.Tensor]:
        """Errors of the features of global views, scaled down, and of whole tiles, which are to stay as they are.

        Args:
            glances, tiles: `(n, 3, S, S)` each, pixels.

        Returns `loss`, the sum of `glance_error` and `tile_error`, all of them scalars.
        """
        student = self.student
        with torch.no_grad():
            glance_target, tile_target = (visual_tokens(*self.teacher, pixels) for pixels in (glances, tiles))
        glance_error = relative_error(encode_scaled_down(student, glances, None), glance_target)
        tile_error = relative_error(visual_tokens(student.vision_model, student.connector, tiles), tile_target)
        return {"loss": glance_error + tile_error, "glance_error": glance_error, "tile_error": tile_error}


@dataclass
class GlanceCollator:
    """The pixels of a batch of samples with `image`: `glances` and `tiles`, `(B, 3, S, S)` each.

    `tiles` has one of each image at random; an image that is not split has its global view there.
    """

    processor: object

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        glances, tiles = [], []
        for sample in samples:
            pixels = self.processor.image_processor([[sample["image"]]], return_tensors="pt")["pixel_values"][0]
            glances.append(pixels[-1])
            tiles.append(pixels[torch.randint(max(1, len(pixels) - 1), ())])
        return {"glances": torch.stack(glances), "tiles": torch.stack(tiles)}


class DistillationTrainer(Trainer):
    """Trainer that logs both errors."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        if self.state.global_step % self.args.logging_steps == 0:
            self.log({name: round(error.item(), 4) for name, error in outputs.items() if name != "loss"})
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


def distil_glance(qgsa, processor, samples, args: QGSATrainingArguments):
    """Teach the encoder of `qgsa`, in place, to make of a smaller glance what it makes of the whole one.

    Checkpoints go to a subfolder of `args.output_dir`, and a run that was interrupted continues from the last one.

    Args:
        qgsa: a [`QGSASmolVLMForConditionalGeneration`] with `glance_downscale` above 1.
        samples: dataset of samples with `image`.
    """
    was_training = qgsa.training
    stage = stage_arguments(
        args,
        "distillation",
        max_steps=args.distillation_steps,
        learning_rate=args.distillation_learning_rate,
        gradient_checkpointing=False,
    )
    trainer = DistillationTrainer(
        GlanceDistillation(qgsa.model), stage, GlanceCollator(processor), train_dataset=samples
    )
    train_resumable(trainer)
    qgsa.requires_grad_(True).train(was_training)
