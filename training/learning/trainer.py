"""Trainer for question-guided selection: the answer loss through the relaxed selection, and the teachers' losses."""

import math

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import Trainer

from modeling_qgsa.compat_qgsa import features_in
from modeling_qgsa.configuration_qgsa import Budget
from modeling_qgsa.layout_qgsa import tile_relevance
from modeling_qgsa.pointer_qgsa import PointedScores
from modeling_qgsa.prompt_qgsa import Prompt
from modeling_qgsa.selection_qgsa import splice
from modeling_qgsa.utility_qgsa import tile_utility
from training.learning.feature_cache import with_features
from training.learning.losses import attention_loss, budget_loss, contrastive_loss, patch_word_loss, utility_loss
from training.learning.store import TensorStore
from training.learning.teachers import cheapest_sufficient, visual_attention
from training.learning.training_arguments import QGSATrainingArguments


class QGSATrainer(Trainer):
    """Trainer that adds the teachers' losses to the answer loss through the relaxed selection of a random budget.

    The utility teacher says which tiles to look at, the attention teacher which tokens to keep (and which tiles, if
    there is no utility teacher), and the cheapest sufficient budget how much to look at. The contrastive loss and CLIP
    also teach where to look. The temperature of the relaxed selection falls geometrically from `start_temperature` to
    `end_temperature`.

    Args:
        feature_cache: see `open_feature_cache`; without one, every image is encoded in every epoch.
        neutral_ids: token ids of `args.neutral_question`.
        kwargs: passed to `transformers.Trainer`.

    Raises ValueError if the model's selection is "dense", if `attention_share` is not in (0, 1], if
    `target_visual_tokens` is outside the budget, if one process has several GPUs, and as soon as the loss is not
    finite.
    """

    def __init__(
        self,
        model,
        args: QGSATrainingArguments,
        feature_cache: TensorStore | None = None,
        neutral_ids: tuple[int, ...] = (),
        **kwargs,
    ):
        if model.config.selection == "dense":
            raise ValueError("selection ('dense'): nothing to train. Choose before_encoder, after_encoder or blocks")
        if not 0 < args.attention_share <= 1:
            raise ValueError(f"attention_share ({args.attention_share}): must be above 0 and at most 1")
        if args.n_gpu > 1:
            raise ValueError(
                f"n_gpu ({args.n_gpu}): one process can use only one GPU. Start one process per GPU with torchrun, or "
                "set CUDA_VISIBLE_DEVICES"
            )
        config, target = model.config, args.target_visual_tokens
        if target is not None and not config.min_visual_tokens <= target <= config.max_visual_tokens:
            raise ValueError(
                f"target_visual_tokens ({target}): must be between min_visual_tokens ({config.min_visual_tokens}) and "
                f"max_visual_tokens ({config.max_visual_tokens})"
            )
        super().__init__(model=model, args=args, **kwargs)
        self.feature_cache, self.neutral_ids = feature_cache, neutral_ids
        self.model_accepts_loss_kwargs = False  # the losses are means, so accumulated steps must be averaged

    def create_optimizer(self, *args, **kwargs):
        """Trainer's optimizer, with separate learning rates for the complexity estimator and the adapters."""
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
        """Share of the steps done so far, 0 to 1."""
        return self.state.global_step / max(1, self.state.max_steps)

    def temperature(self) -> float:
        """Gumbel temperature of the current step."""
        fall = self.args.end_temperature / self.args.start_temperature
        return self.args.start_temperature * fall ** self.progress()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        base = self.accelerator.unwrap_model(model)
        base = base.get_base_model() if isinstance(base, PeftModel) else base
        inputs = dict(inputs)
        patch_words = inputs.pop("patch_words", None)
        if self.feature_cache is not None and "pixel_values" in inputs:
            inputs = with_features(self.feature_cache, base, inputs)
        outputs = model(**inputs, gumbel_temperature=self.temperature(), logits_to_keep=1)
        if outputs.glance is None:  # the batch has no images
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        glance, features = outputs.glance, features_in(outputs)
        prompt = Prompt.of(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
        losses = {"answer_loss": self.args.answer_weight * outputs.loss}
        losses |= self.teacher_losses(base, glance, features, prompt)
        losses |= self.grounding_losses(base.model.selector, glance, prompt, patch_words)
        losses |= self.budget_losses(base, glance, features, prompt)
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            raise ValueError(
                f"loss ({loss.item()} at step {self.state.global_step}): must be finite. Its parts: {losses}"
            )
        if self.state.global_step % self.args.logging_steps == 0:
            self.log_losses(losses, Budget.of(base.config), glance)
        return (loss, outputs) if return_outputs else loss

    def log_losses(self, losses: dict[str, torch.Tensor], budget: Budget, glance):
        """Log each loss and the budget that inference would use now, as means over all processes."""
        tiles, tokens = budget.resolve(glance.complexity)
        values = losses | {"tiles": tiles.float().mean(), "visual_tokens": tokens.float().mean()}
        means = self.accelerator.reduce(torch.stack([value.detach() for value in values.values()]), "mean")
        self.log(dict(zip(values, (round(mean, 4) for mean in means.tolist()))))

    def teacher_losses(self, model, glance, features, prompt: Prompt) -> dict[str, torch.Tensor]:
        """Losses for where to look, from answers: utility and attention. `features` `(T, P, D)` covers every tile."""
        args, losses, layout = self.args, {}, glance.layout
        mass = tile_relevance(glance.relevance.exp(), layout)
        if args.utility_weight:
            utility = tile_utility(model, layout, features, prompt)
            losses["utility_loss"] = args.utility_weight * utility_loss(
                mass, utility, layout, args.utility_temperature
            )
        if args.attention_weight:
            asked = math.ceil(args.attention_share * len(prompt.input_ids))
            match = model.model.selector.match_tokens(
                glance.question_state[layout.tile_image], features, layout.is_global
            )
            attention = visual_attention(model, glance, features, prompt, asked, self.neutral_ids)
            loss = attention_loss(match, attention, layout)
            if not args.utility_weight:
                tile_attention = attention.sum(1).log().masked_fill(layout.is_global, float("-inf"))
                loss = loss + utility_loss(mass, tile_attention, layout, temperature=1.0)
            losses["attention_loss"] = args.attention_weight * loss
        return losses

    def grounding_losses(self, selector, glance, prompt: Prompt, patch_words) -> dict[str, torch.Tensor]:
        """Losses for where to look, from images and words alone (QGSA's self-supervised grounding)."""
        args, losses = self.args, {}
        if args.contrastive_weight:
            query = selector.query(glance.question_state).chunk(2, dim=-1)[1]
            keys = selector.glance_key(selector.glance_norm(glance.features))
            words = prompt.input_ids[glance.layout.image_sample].masked_fill(~glance.question_mask, -1)
            (words,), _ = splice(glance.question_mask, (words, -1))
            same = (words[:, None] == words[None]).all(-1)
            losses["contrastive_loss"] = args.contrastive_weight * contrastive_loss(
                query, keys, glance.relevance, same
            )
        if args.patch_word_weight:
            similarity = patch_words[glance.layout.image_sample]
            losses["patch_word_loss"] = args.patch_word_weight * patch_word_loss(
                glance.relevance, similarity, args.patch_word_temperature
            )
        return losses

    def budget_losses(self, model, glance, features, prompt: Prompt) -> dict[str, torch.Tensor]:
        """Losses for how much to look at: the cheapest sufficient budget, and the target for the mean."""
        args, losses, config = self.args, {}, model.config
        if self.progress() < args.complexity_start:
            return losses
        logits = glance.complexity_logits
        if args.complexity_weight:
            with torch.no_grad():
                every = torch.ones_like(glance.layout.is_global)
                scores = PointedScores(glance).of_tokens(features, every)
            level = cheapest_sufficient(
                model, glance, features, scores, prompt, Budget.of(config), args.complexity_tolerance
            )
            losses["complexity_loss"] = args.complexity_weight * cross_entropy(logits, level)
        if args.target_visual_tokens is not None:
            losses["budget_loss"] = args.budget_weight * budget_loss(
                logits,
                config.complexity_quantile,
                config.min_visual_tokens,
                config.max_visual_tokens,
                args.target_visual_tokens,
            )
        return losses
