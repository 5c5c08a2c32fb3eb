"""HF Trainer for question-guided selection: the answer loss through the relaxed selection, and the teachers."""

import math
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.selection_qgsa import Prompt, tile_relevance
from training.losses import attention_loss, utility_loss
from training.teachers import cheapest_sufficient, tile_utility, visual_attention


@dataclass
class QGSATrainingArguments(TrainingArguments):
    """Arguments of Trainer and of the losses of selection."""

    start_temperature: float = field(default=1.0, metadata={"help": "Gumbel temperature at the first step."})
    end_temperature: float = field(default=0.1, metadata={"help": "Gumbel temperature at the last step."})
    answer_weight: float = field(
        default=1.0, metadata={"help": "Weight of the answer loss through the relaxed selection."}
    )
    utility_weight: float = field(default=1.0, metadata={"help": "Weight of the utility teacher; 0 leaves it out."})
    utility_temperature: float = field(default=0.5, metadata={"help": "Softmax temperature over a tile's utility."})
    attention_weight: float = field(
        default=1.0, metadata={"help": "Weight of the attention teacher; 0 leaves it out."}
    )
    attention_share: float = field(
        default=0.25, metadata={"help": "Share of a batch that the attention teacher is asked about: it is costly."}
    )
    complexity_weight: float = field(default=0.1, metadata={"help": "Weight of the budget; 0 leaves it out."})
    complexity_learning_rate: float = field(
        default=3e-3, metadata={"help": "Learning rate of the complexity estimator, which has few steps to learn."}
    )
    adapter_learning_rate: float = field(
        default=3e-4, metadata={"help": "Learning rate of the LoRA adapters; learning_rate is the selector's."}
    )
    complexity_start: float = field(
        default=0.4,
        metadata={"help": "Share of the steps after which the budget is taught: it needs a selector first."},
    )
    complexity_tolerance: float = field(
        default=0.1,
        metadata={"help": "A budget suffices when the mean p of the answer's tokens is at most this far below dense."},
    )


class QGSATrainer(Trainer):
    """Trainer whose loss is the answer's, through the relaxed selection of a random budget, and those of the teachers.

    Utility teaches which tiles to look at, attention which tokens to keep, the cheapest budget how much.

    The temperature of the relaxed selection falls geometrically from `start_temperature` to `end_temperature`.
    Raises ValueError for a model without a selection to train, an `attention_share` that is none, several GPUs in one
    process, and as soon as a loss is not finite.
    """

    def __init__(self, model, args: QGSATrainingArguments, **kwargs):
        if model.config.selection == "dense":
            raise ValueError('selection is "dense": the trainer has no selection to train')
        if not 0 < args.attention_share <= 1:
            raise ValueError(f"attention_share is {args.attention_share}: it has to be above 0 and at most 1")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start one each with torchrun, or set CUDA_VISIBLE_DEVICES"
            )
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the losses are means: accumulated steps are to be averaged

    def create_optimizer(self, *args, **kwargs):
        """Trainer's optimizer, with learning rates of their own for the complexity estimator and the adapters."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = {
            ".complexity_estimator.": self.args.complexity_learning_rate,
            ".lora_": self.args.adapter_learning_rate,
        }
        for part, rate in rates.items():
            own = {weight for name, weight in self.model.named_parameters() if part in name}
            for group in list(optimizer.param_groups):
                moved = [weight for weight in group["params"] if weight in own]
                if moved:
                    group["params"] = [weight for weight in group["params"] if weight not in own]
                    optimizer.add_param_group({**group, "params": moved, "lr": rate})
        return optimizer

    def progress(self) -> float:
        """Share of the steps that are done, 0 to 1."""
        return self.state.global_step / max(1, self.state.max_steps)

    def temperature(self) -> float:
        """Gumbel temperature of the current step."""
        fall = self.args.end_temperature / self.args.start_temperature
        return self.args.start_temperature * fall ** self.progress()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, gumbel_temperature=self.temperature())
        if outputs.glance is None:  # no image in the whole batch
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        losses = {"answer_loss": self.args.answer_weight * outputs.loss}
        base = self.accelerator.unwrap_model(model)
        base = base.get_base_model() if isinstance(base, PeftModel) else base
        glance, features = outputs.glance, outputs.image_hidden_states
        losses |= self.selection_losses(base, inputs, glance, features)
        # The estimator is used before it is taught, and DDP waits for a gradient of all that was used.
        loss = sum(losses.values()) + 0 * glance.complexity_logits.sum()
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {self.state.global_step}: {losses}")
        if self.state.global_step % self.args.logging_steps == 0:
            tiles, tokens = Budget.of(base.config).resolve(glance.complexity)
            budget = {"tiles": tiles.float().mean(), "visual_tokens": tokens.float().mean()}
            self.log({name: round(value.item(), 4) for name, value in (losses | budget).items()})
        return (loss, outputs) if return_outputs else loss

    def selection_losses(self, model, inputs, glance, features) -> dict[str, torch.Tensor]:
        """The teachers' losses of a batch, by name; `features` `(T, P, D)` are those of every tile."""
        args, losses, layout = self.args, {}, glance.layout
        prompt = Prompt.of(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
        if args.utility_weight:
            utility = tile_utility(model, layout, features, prompt)
            mass = tile_relevance(glance.relevance.exp(), layout)
            losses["utility_loss"] = args.utility_weight * utility_loss(
                mass, utility, layout, args.utility_temperature
            )
        if args.attention_weight:
            asked = math.ceil(args.attention_share * len(prompt.input_ids))
            match = model.model.selector.match_tokens(
                glance.question_state[layout.tile_image], features, layout.is_global
            )
            attention = visual_attention(model, glance, features, prompt, asked)
            losses["attention_loss"] = args.attention_weight * attention_loss(match, attention, layout)
        if args.complexity_weight and self.progress() >= args.complexity_start:
            with torch.no_grad():
                scores = model.model.score_tokens(glance, features, torch.ones_like(layout.is_global))
            budget = Budget.of(model.config)
            level = cheapest_sufficient(model, glance, features, scores, prompt, budget, args.complexity_tolerance)
            losses["complexity_loss"] = args.complexity_weight * cross_entropy(glance.complexity_logits, level)
        return losses
