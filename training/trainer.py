"""HF Trainer for question-guided selection: the answer loss through the relaxed selection, and the teachers."""

from dataclasses import dataclass, field

import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.selection_qgsa import Prompt, tile_relevance
from training.losses import quantile_loss, utility_loss
from training.teachers import answer_log_likelihood, cheapest_sufficient, hard_positions, tile_utility


@dataclass
class QGSATrainingArguments(TrainingArguments):
    """Arguments of Trainer and of the losses of selection."""

    start_temperature: float = field(default=1.0, metadata={"help": "Gumbel temperature at the first step."})
    end_temperature: float = field(default=0.1, metadata={"help": "Gumbel temperature at the last step."})
    answer_weight: float = field(
        default=0.1, metadata={"help": "Weight of the answer loss through the relaxed selection."}
    )
    reading_weight: float = field(
        default=0.3, metadata={"help": "Weight of the answer loss over what a hard selection keeps; 0 leaves it out."}
    )
    utility_weight: float = field(default=1.0, metadata={"help": "Weight of the utility teacher; 0 leaves it out."})
    utility_temperature: float = field(default=0.5, metadata={"help": "Softmax temperature over a tile's utility."})
    complexity_weight: float = field(default=0.1, metadata={"help": "Weight of the budget; 0 leaves it out."})
    complexity_learning_rate: float = field(
        default=3e-3, metadata={"help": "Learning rate of the complexity estimator, which has few steps to learn."}
    )
    complexity_quantile: float = field(
        default=0.9, metadata={"help": "The budget is to suffice for this share of the questions."}
    )
    complexity_start: float = field(
        default=0.4,
        metadata={"help": "Share of the steps after which the budget is taught: it needs a selector first."},
    )
    complexity_tolerance: float = field(
        default=0.05, metadata={"help": "A budget suffices when the answer's log p is at most this far below dense."}
    )


class QGSATrainer(Trainer):
    """Trainer whose loss is the answer's, the utility teacher's (where) and the cheapest budget's (how much).

    The answer is asked for twice: through the relaxed selection, for the selector, and over what a hard selection of a
    random budget keeps, for the adapters, which the relaxed one never shows as little as inference does.

    The temperature of the relaxed selection falls geometrically from `start_temperature` to `end_temperature`.
    Raises ValueError for a model without a selection to train, and as soon as a loss is not finite.
    """

    def __init__(self, model, args: QGSATrainingArguments, **kwargs):
        if model.config.selection == "dense":
            raise ValueError('selection is "dense": the trainer has no selection to train')
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the losses are means: accumulated steps are to be averaged

    def create_optimizer(self, *args, **kwargs):
        """Trainer's optimizer, with a learning rate of its own for the complexity estimator."""
        optimizer = super().create_optimizer(*args, **kwargs)
        own = {weight for name, weight in self.model.named_parameters() if ".complexity_estimator." in name}
        for group in list(optimizer.param_groups):
            moved = [weight for weight in group["params"] if weight in own]
            if moved:
                group["params"] = [weight for weight in group["params"] if weight not in own]
                optimizer.add_param_group({**group, "params": moved, "lr": self.args.complexity_learning_rate})
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
        losses = {"answer_loss": self.args.answer_weight * outputs.loss}
        base = self.accelerator.unwrap_model(model)
        base = base.get_base_model() if isinstance(base, PeftModel) else base
        glance, features = outputs.glance, outputs.image_hidden_states
        losses |= self.selection_losses(base, inputs, glance, features)
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {self.state.global_step}: {losses}")
        if self.state.global_step % self.args.logging_steps == 0:
            tiles, tokens = Budget.of(base.config).resolve(glance.complexity.detach())
            budget = {"tiles": tiles.float().mean(), "visual_tokens": tokens.float().mean()}
            self.log({name: round(value.item(), 4) for name, value in (losses | budget).items()})
        return (loss, outputs) if return_outputs else loss

    def selection_losses(self, model, inputs, glance, features) -> dict[str, torch.Tensor]:
        """The teachers' losses of a batch, by name; `features` `(T, P, D)` are those of every tile."""
        args, losses = self.args, {}
        prompt = Prompt.of(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
        if args.utility_weight:
            utility = tile_utility(model, glance.layout, features, prompt)
            mass = tile_relevance(glance.relevance.exp(), glance.layout)
            losses["utility_loss"] = args.utility_weight * utility_loss(
                mass, utility, glance.layout, args.utility_temperature
            )
        every, budget = torch.ones_like(glance.layout.is_global), Budget.of(model.config)
        with torch.no_grad():
            scores = model.model.score_tokens(glance, features, every)
        if args.reading_weight:
            complexity = torch.rand_like(glance.complexity)
            keep = hard_positions(model, glance, scores, prompt, budget, complexity)
            embeds = model.model.embed(prompt.input_ids, glance.layout, features, every)
            rows = torch.arange(len(keep), device=keep.device)
            likelihood = answer_log_likelihood(model, rows, keep, embeds, prompt)
            losses["reading_loss"] = -args.reading_weight * likelihood.sum() / (prompt.labels[:, 1:] != -100).sum()
        if args.complexity_weight and self.progress() >= args.complexity_start:
            target = cheapest_sufficient(model, glance, features, scores, prompt, budget, args.complexity_tolerance)
            losses["complexity_loss"] = args.complexity_weight * quantile_loss(
                glance.complexity, target, args.complexity_quantile
            )
        return losses
