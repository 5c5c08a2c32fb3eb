"""Recording of what a training tool does with a model, and the same loss and gradients computed by hand."""

import copy

import torch
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback


class Recorder(TrainerCallback):
    """Records the calls of a model with gradients, each with its random state, and the gradients of the first step.

    Args:
        model: the model that the tool trains; hooks stay on it.
    """

    def __init__(self, model):
        self.model, self.twin = model, copy.deepcopy(model)
        self.calls: list[tuple[dict, torch.Tensor]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        model.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, module, args, kwargs):
        if torch.is_grad_enabled() and not self.gradients:
            self.calls.append((dict(kwargs), torch.get_rng_state()))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients = self.gradients or gradients_of(self.model)

    def logits(self, inputs, random_state):
        """Logits of the untouched twin in training mode, for the recorded `inputs` of one call."""
        own = ("num_items_in_batch", "fused_lm_head", "use_cache", "output_router_logits")
        inputs = {name: value for name, value in inputs.items() if name not in own}
        if "fused_lm_head" in self.calls[0][0]:  # TRL hands no labels to the model
            inputs.pop("labels", None)
        torch.set_rng_state(random_state)
        return self.twin.train()(**inputs).logits

    def expect(self, loss_of):
        """The loss and the gradients by hand: `loss_of(logits, inputs)` is summed over the recorded calls."""
        self.twin.zero_grad()
        loss = sum(loss_of(self.logits(*call), call[0]) for call in self.calls)
        loss.backward()
        return loss.item(), gradients_of(self.twin)


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_gradients_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-5):
    """The same gradients; weights without one count as 0."""
    for name in found | expected:
        zero = torch.zeros_like((found | expected)[name])
        one, two = found.get(name, zero), expected.get(name, zero)
        scale = max(1.0, two.abs().max().item())
        assert (one - two).abs().max() <= atol * scale, f"{name}: {(one - two).abs().max()} of {scale}"
    assert any(gradient.any() for gradient in expected.values())


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods of the labels, `(B, L - 1)`; 0 where there is none.

    Fails unless logits and labels are counted in the same positions.
    """
    assert logits.shape[:2] == labels.shape, "logits must be counted in prompt positions"
    return cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")


def assert_close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
