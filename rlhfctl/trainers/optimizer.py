"""AdamW over the trainable parameters, with float32 master weights for bfloat16 ones, and a stateless schedule.

The unit of a step is the global batch: losses are already divided by its size, so ranks and micro-batches only sum.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rlhfctl.heartbeat import heartbeat
from rlhfctl.models.direct_gradient import allow
from rlhfctl.recipe.sections import Optim
from rlhfctl.trainers.distributed import sum_gradients

Found = TypeVar("Found")

CAST_ELEMENTS = 1 << 22  # float32 copies of bfloat16 gradients at a time: 16 MiB, or one matrix


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


def parameter_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups, empty ones left out. Vectors (norms, biases) carry no weight decay."""
    decayed = [parameter for parameter in parameters if parameter.dim() >= 2]
    plain = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Passes(Protocol):
    """How forward and backward passes of a model are made: Plain, or trainers/zero.py's engine.

    collective: every pass is made by all ranks together. last: whether the next backward pass is the last one before
    the step.
    """

    collective: bool
    last: bool

    def run(self, function: Callable[[], Found]) -> Found: ...
    def backward(self, loss: Tensor) -> None: ...


class Learner(Passes, Protocol):
    """And how the model is stepped. held: parameters whose names start with it stand still."""

    held: str | None

    def current_lr(self) -> float: ...
    def reduce(self) -> float: ...
    def clip_and_step(self, norm: float, max_grad_norm: float | None) -> None: ...
    def whole(self) -> AbstractContextManager[None]: ...
    def whole_on_rank_zero(self) -> AbstractContextManager[None]: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, tensors: dict[str, Tensor]) -> None: ...


class Plain:
    """Passes as torch makes them."""

    collective = False
    last = True

    def run(self, function: Callable[[], Found]) -> Found:
        """A forward pass, whose loss goes to `backward`."""
        return function()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


PLAIN = Plain()


class Optimizer(Plain):
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
            allow(parameter)
            exact = parameter.dtype == torch.float32
            self.masters.append(parameter if exact else nn.Parameter(parameter.detach().float()))
        self.adam = torch.optim.AdamW(
            parameter_groups(self.masters, optim.weight_decay),
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

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    whole_on_rank_zero = whole

    def reduce(self) -> float:
        """Sum gradients over ranks; returns the norm of the global gradient."""
        gradients = self.gradients()
        if not gradients:
            return 0.0
        sum_gradients(gradients)
        norms = torch._foreach_norm(gradients, dtype=torch.float32)
        square = float(torch.stack(list(norms)).square().sum())
        return math.sqrt(square) if square >= 0 else math.nan

    def clip_and_step(self, norm: float, max_grad_norm: float | None) -> None:
        clipped = max_grad_norm is not None and norm > max_grad_norm
        self.step(max_grad_norm / (norm + 1e-6) if clipped and max_grad_norm is not None else 1.0)

    def step(self, scale: float) -> None:
        """Apply the gradients times `scale` (the clip factor), then clear them."""
        gradients = self.gradients()
        if scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, scale)
        lr = self.current_lr()
        for group in self.adam.param_groups:
            group["lr"] = lr
        for part in self.parts():
            self.step_part(part)
        self.steps += 1

    def parts(self) -> list[list[tuple[nn.Parameter, nn.Parameter, Tensor | None]]]:
        """(parameter, master, gradient) in parts of which the float32 copies of the gradients may exist together. The
        gradients are taken from their parameters: AdamW leaves one without a gradient alone."""
        found: list[list[tuple[nn.Parameter, nn.Parameter, Tensor | None]]] = [[]]
        room = CAST_ELEMENTS
        for (_, parameter), master in zip(self.named, self.masters, strict=True):
            size = 0 if master is parameter else parameter.numel()
            if size > room and found[-1]:
                found.append([])
                room = CAST_ELEMENTS
            room -= size
            found[-1].append((parameter, master, parameter.grad))
            parameter.grad = None
        return found

    @torch.no_grad()
    def step_part(self, part: list[tuple[nn.Parameter, nn.Parameter, Tensor | None]]) -> None:
        for _, master, gradient in part:
            master.grad = gradient if gradient is None else gradient.to(master.dtype)
        self.adam.step()
        for parameter, master, _ in part:
            master.grad = None
            if master is not parameter:
                parameter.copy_(master)
        part.clear()

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors under the parameters' names: the optimizer's own, not copies."""
        tensors: dict[str, Tensor] = {"steps": torch.tensor([self.steps])}
        for (name, parameter), master in zip(self.named, self.masters, strict=True):
            state = self.adam.state.get(master, {})
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if key in state:
                    tensors[f"{name}|{key}"] = state[key].detach()
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


def clip_and_step(optimizers: Sequence[Learner], max_grad_norm: float | None) -> list[float]:
    """Reduce, clip each model by its own norm, step. Returns the norms before clipping; a non-finite norm is returned
    without stepping, for the caller to stop the run."""
    with heartbeat.waiting("gradients"):  # also where a GPU's collectives end: the norm is read
        norms = [optimizer.reduce() for optimizer in optimizers]
    if all(math.isfinite(norm) for norm in norms):
        for optimizer, norm in zip(optimizers, norms, strict=True):
            optimizer.clip_and_step(norm, max_grad_norm)
    return norms
