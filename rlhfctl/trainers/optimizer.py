"""AdamW over the trainable parameters, with float32 master weights for bfloat16 ones, and a stateless schedule.

The unit of a step is the global batch: losses are already divided by its size, so ranks and micro-batches only sum.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rlhfctl.recipe.sections import Optim
from rlhfctl.trainers.distributed import sum_gradients


def scheduled_lr(optim: Optim, lr: float, step: int, total: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total`: linear warm-up, then the schedule."""
    warmup = math.ceil(optim.warmup_ratio * total)
    if step < warmup:
        return lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return lr
    progress = (step - warmup) / max(1, total - warmup)
    factor = 1.0 - progress if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * factor)


class Optimizer:
    """One AdamW over named parameters. masters: the float32 copies that are stepped where the weights are bfloat16.

    held: parameters whose names start with it stand still, moments and weight decay included; the schedule goes on.
    """

    held: str | None = None

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], optim: Optim, lr: float, total_steps: int
    ) -> None:
        self.optim = optim
        self.lr = lr
        self.total_steps = total_steps
        self.steps = 0
        self.named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self.masters: list[nn.Parameter] = []
        for _, parameter in self.named:
            exact = parameter.dtype == torch.float32
            self.masters.append(parameter if exact else nn.Parameter(parameter.detach().float()))
        # Vectors (norms, biases) carry no weight decay.
        decayed = [m for m in self.masters if m.dim() >= 2]
        plain = [m for m in self.masters if m.dim() < 2]
        groups = [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=True,
        )

    def current_lr(self) -> float:
        return scheduled_lr(self.optim, self.lr, self.steps, self.total_steps)

    def gradients(self) -> list[Tensor]:
        found = []
        for name, parameter in self.named:
            if self.held is not None and name.startswith(self.held):
                parameter.grad = None  # AdamW leaves a parameter without a gradient alone
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
        return found

    def reduce(self) -> Tensor:
        """Sum gradients over ranks; returns the squared norm of the global gradient (float32 scalar)."""
        gradients = self.gradients()
        if not gradients:
            return torch.zeros(())
        sum_gradients(gradients)
        norms = torch._foreach_norm(gradients, dtype=torch.float32)
        return torch.stack(list(norms)).square().sum()

    def step(self, scale: float) -> None:
        """Apply the gradients times `scale` (the clip factor), then clear them."""
        gradients = self.gradients()
        if scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, scale)
        for (_, parameter), master in zip(self.named, self.masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        lr = self.current_lr()
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        with torch.no_grad():
            for (_, parameter), master in zip(self.named, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
                    master.grad = None
                parameter.grad = None
        self.steps += 1

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors under the parameters' names."""
        tensors: dict[str, Tensor] = {"steps": torch.tensor([self.steps])}
        for (name, parameter), master in zip(self.named, self.masters, strict=True):
            state = self.adam.state.get(master, {})
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if key in state:
                    tensors[f"{name}|{key}"] = state[key].detach().clone()
            if master is not parameter:
                tensors[f"{name}|master"] = master.detach()
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.steps = int(tensors["steps"].item())
        for (name, parameter), master in zip(self.named, self.masters, strict=True):
            state = {
                key: tensors[f"{name}|{key}"].to(master.device) if key != "step" else tensors[f"{name}|{key}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}|{key}" in tensors
            }
            if state:
                self.adam.state[master] = state
            if master is not parameter:
                master.data.copy_(tensors[f"{name}|master"])


def clip_and_step(optimizers: list[Optimizer], max_grad_norm: float | None) -> list[float]:
    """Reduce, clip each model by its own norm, step. Returns the norms before clipping; a non-finite norm is returned
    without stepping, for the caller to stop the run."""
    squares = [optimizer.reduce() for optimizer in optimizers]
    norms = [math.sqrt(float(square)) if float(square) >= 0 else math.nan for square in squares]
    if not all(math.isfinite(norm) for norm in norms):
        return norms
    for optimizer, norm in zip(optimizers, norms, strict=True):
        clipped = max_grad_norm is not None and norm > max_grad_norm
        optimizer.step(max_grad_norm / (norm + 1e-6) if clipped and max_grad_norm is not None else 1.0)
    return norms
