"""Muon for the matrices of a language model, AdamW for everything else (Jordan et al., "Muon", 2024)."""

import torch


MOMENTUM = 0.95
UPDATE_SIZE = 0.3  # root mean square of an update per learning rate; about 0.2 in AdamW (Liu et al., 2502.16982)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices to `(N, rows, columns)`, roughly, by Newton-Schulz iterations."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    found = matrices if wide else matrices.mT
    found = found / (found.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = found @ found.mT
        found = 3.4445 * found + (-4.7750 * gram + 2.0315 * gram @ gram) @ found
    return found if wide else found.mT


class Muon(torch.optim.AdamW):
    """AdamW, except for parameter groups with `muon` True: their matrices are moved along orthogonalized momenta.

    Both kinds take learning rates of the same size.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both kinds; returns the loss of `closure`, if there is one."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                for shape in sorted({weight.shape for weight in group["params"]}):
                    self._move([weight for weight in group["params"] if weight.shape == shape], group)
        return loss

    def _move(self, weights: list[torch.Tensor], group: dict):
        """Update weights of one shape together, with Nesterov momentum."""
        weights = [weight for weight in weights if weight.grad is not None]
        if not weights:
            return
        moved = []
        for weight in weights:
            state = self.state[weight]
            if not state:
                state |= {
                    "step": torch.zeros(()),
                    "momentum": torch.zeros_like(weight),
                }  # AdamW loads states with steps
            state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
            moved.append(weight.grad.lerp(state["momentum"], MOMENTUM))
        size = group["lr"] * UPDATE_SIZE * max(weights[0].shape) ** 0.5
        for weight, update in zip(weights, orthogonalize(torch.stack(moved))):
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)


def make_optimizer(model, args) -> Muon:
    """Muon for the matrices in the layers of the text model, AdamW for its norms, the embeddings and the connector.

    Args:
        args: Trainer's arguments, of which it takes learning rate, weight decay and betas.
    """
    matrices = [
        weight
        for name, weight in model.named_parameters()
        if "text_model.layers" in name and weight.ndim == 2 and weight.requires_grad
    ]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in chosen]
    groups = [
        {"params": matrices, "muon": True, "weight_decay": args.weight_decay},
        {"params": others, "muon": False, "weight_decay": 0.0},
    ]
    return Muon(groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2))
