"""Muon: momentum whose matrices are made orthogonal before each step.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". A short training gets further
with it than with AdamW. torch's own takes two-dimensional parameters only and computes in bfloat16, which processors
without matrix units do slowly; this one takes convolutions too, as matrices of one row an output channel.
"""
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # drives singular values to about 1
ITERATIONS = 5
ADAM_NAMES = ("embedding", "input_blocks.0.", "mask_predict", "diffusion_model.out.")


class Muon(torch.optim.Optimizer):
    """For weights of two dimensions or more; the others need another optimiser."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step down the gradients; matrices of one shape are made orthogonal together."""
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    same_shape[weight.shape[0], weight[0].numel()].append(weight)
            for weights in same_shape.values():
                directions = torch.stack([self._momentum(weight, group["momentum"]).flatten(1) for weight in weights])
                for weight, change in zip(weights, orthogonal(directions), strict=True):
                    scale = max(1.0, change.shape[0] / change.shape[1]) ** 0.5
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(change.view_as(weight), alpha=-group["lr"] * scale)

    def _momentum(self, weight: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's direction."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["momentum"], momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """(k, m, n): nearly the orthogonal factor of each matrix's polar decomposition, by a Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = QUINTIC[0] * x + (QUINTIC[1] * gram + QUINTIC[2] * gram @ gram) @ x
    return x.mT if tall else x


def optimizers(model: nn.Module, rate: float, muon_rate: float,
               outer: tuple[str, ...] = ()) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices; AdamW for embeddings, biases, norms and the first and last layers.

    `outer` names those layers' weights where the model is not the miniature.
    """
    named = list(model.named_parameters())
    hidden = {name for name, weight in named
              if weight.ndim > 1 and name not in outer and not any(part in name for part in ADAM_NAMES)}
    return [Muon([weight for name, weight in named if name in hidden], muon_rate),
            torch.optim.AdamW([weight for name, weight in named if name not in hidden], rate, betas=(0.9, 0.99),
                              weight_decay=0.01)]
