"""One DeepSpeed engine that steps like trainers/optimizer.py: the same AdamW, clip, schedule and checkpoint tensors.

The unit of a step is the global batch and losses are already divided by its size: DeepSpeed divides gradients by the
number of ranks, so a loss is multiplied by it first. DeepSpeed builds the partitions, reduces, clips and steps; which
micro-batch is the last one, the learning rate and what a checkpoint holds are ours.

Every forward and backward pass is a collective at ZeRO-3, and so is every backward pass at ZeRO-2: all ranks make
equally many (trainers/engine.py: passes).
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import utils as fragments
from torch import Tensor, nn

from rlhfctl.heartbeat import heartbeat
from rlhfctl.models.in_parts import buckets, gathered, in_parts
from rlhfctl.recipe.deepspeed_section import DeepSpeed
from rlhfctl.recipe.sections import Optim
from rlhfctl.trainers.optimizer import parameter_groups, scheduled_lr

Found = TypeVar("Found")
MOMENTS = ("exp_avg", "exp_avg_sq")


class Root(nn.Module):
    """The modules of one engine. forward runs a function of theirs: DeepSpeed's hooks see where a pass begins and ends,
    and a matrix that the function reads outside its own module is gathered for the pass."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class ZeroOptimizer:
    """modules: what the parameters `named` belong to. last: whether the next backward pass is the step's last one.

    DeepSpeed takes the modules over at the first use of `engine`: until then they are whole, so that a checkpoint is
    read into them as without DeepSpeed.
    """

    held: str | None = None
    collective = True

    def __init__(
        self,
        spec: DeepSpeed,
        modules: Iterable[nn.Module],
        named: Iterable[tuple[str, nn.Parameter]],
        optim: Optim,
        lr: float,
        total_steps: int,
        max_grad_norm: float | None,
    ) -> None:
        self.spec, self.optim, self.lr, self.total_steps = spec, optim, lr, total_steps
        self.root = Root(modules)
        self.named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self.max_grad_norm = max_grad_norm
        self.steps = 0
        self.last = True

    @cached_property
    def engine(self) -> Any:
        start_deepspeed()
        self.world = dist.get_world_size()
        bfloat16 = any(parameter.dtype == torch.bfloat16 for parameter in self.root.parameters())
        groups = parameter_groups([parameter for _, parameter in self.named], self.optim.weight_decay)
        engine = deepspeed.initialize(
            model=self.root,
            optimizer=build_adam(self.spec, groups, self.optim, self.lr),
            config=configuration(self.spec, bfloat16, self.max_grad_norm, self.world),
        )[0]
        make_moments(engine, self.spec.zero_stage)
        return engine

    def current_lr(self) -> float:
        return scheduled_lr(self.optim, self.lr, self.steps, self.total_steps)

    def run(self, function: Callable[[], Found]) -> Found:
        """A forward pass of the engine's modules; backward passes start from what it returns."""
        with heartbeat.waiting("a pass"):
            found: Found = self.engine(function)
        return found

    def backward(self, loss: Tensor) -> None:
        self.engine.set_gradient_accumulation_boundary(self.last)
        with heartbeat.waiting("a pass"):
            self.engine.backward(loss * self.world, scale_wrt_gas=False)

    def reduce(self) -> float:
        """The norm of the global gradient before it was clipped: DeepSpeed reduces, clips and steps in one call, and
        does not step where the norm is not finite. While the parameters are held, only the schedule goes on."""
        if self.held is not None:
            self.steps += 1
            return 0.0
        norm = None
        if self.plain_adam:
            norms = torch._foreach_norm([p.grad for _, p in self.named if p.grad is not None])
            norm = float(torch.stack(list(norms)).square().sum().sqrt())
        lr = self.current_lr()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        self.steps += 1
        if norm is None:
            found = self.engine.get_global_grad_norm()
            norm = math.nan if found is None else float(found)
        return norm

    def clip_and_step(self, norm: float, max_grad_norm: float | None) -> None:
        assert max_grad_norm == self.max_grad_norm, "done, with the limit that the engine was built with"

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside: every parameter of the modules is whole on every rank, and a forward pass is no collective.

        For rollouts and scores: ranks make different numbers of passes there. Nothing is trained inside.
        """
        if self.spec.zero_stage < 3:
            yield
            return
        assert self.engine
        with ExitStack() as stack:
            for bucket in buckets(self.root.parameters(), self.spec.bucket_elements):
                stack.enter_context(gathered(bucket))
            stack.enter_context(self.without_hooks())
            yield

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Inside the modules are ordinary ones: no forward pass gathers anything."""
        offload = self.engine.optimizer.parameter_offload
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)

    @contextmanager
    def whole_on_rank_zero(self) -> Iterator[None]:
        """Inside: every parameter is whole in rank 0's CPU memory and in parts everywhere else. For export: one bucket
        is gathered at a time, and rank 0 alone keeps it. No forward pass is made inside."""
        if self.spec.zero_stage < 3:
            yield
            return
        assert self.engine
        first = dist.get_rank() == 0
        copies: list[tuple[Any, Tensor]] = []
        parts: list[Any] = [each for each in self.root.parameters() if in_parts(each)]
        for bucket in buckets(parts, self.spec.bucket_elements):
            with gathered(bucket):
                if first:
                    copies += [(each, each.data.to("cpu", copy=True)) for each in bucket]
        parted = [(each, each.data) for each, _ in copies]
        try:
            for parameter, copy in copies:
                parameter.data = copy
            with self.without_hooks():
                yield
        finally:
            for parameter, part in parted:
                parameter.data = part

    # What a checkpoint holds: the tensors of Optimizer.state

    def state(self) -> dict[str, Tensor]:
        """As Optimizer.state, on rank 0; {} on the others. A collective: one parameter is whole at a time."""
        first = dist.get_rank() == 0
        step = torch.as_tensor(next(iter(self.adam.state.values()))["step"], dtype=torch.float32)
        tensors: dict[str, Tensor] = {"steps": torch.tensor([self.steps])}
        for name, parameter in self.named:
            found = {"step": step} | {key: self.moment(parameter, key) for key in MOMENTS}
            if parameter.dtype != torch.float32:
                found["master"] = fragments.safe_get_full_fp32_param(parameter)
            if first:
                tensors |= {f"{name}|{key}": value.detach().cpu().clone() for key, value in found.items()}
        return tensors if first else {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The modules already hold the weights of the checkpoint; a bfloat16 one's float32 original comes from here."""
        self.steps = int(tensors["steps"].item())
        step = tensors[f"{self.named[0][0]}|step"]
        for state in self.adam.state.values():
            state["step"] = step.clone() if isinstance(state["step"], Tensor) else int(step)
        for name, parameter in self.named:
            if parameter.dtype != torch.float32:
                fragments.safe_set_full_fp32_param(parameter, tensors[f"{name}|master"].to(parameter.device))
            for key in MOMENTS:
                value = tensors[f"{name}|{key}"].to(parameter.device)
                if self.plain_adam:
                    self.adam.state[parameter][key].copy_(value)
                else:
                    fragments.safe_set_full_optimizer_state(parameter, value, key)

    @property
    def plain_adam(self) -> bool:
        """Whether the engine steps torch's AdamW on the parameters themselves: ZeRO-0 in float32."""
        return isinstance(self.engine.optimizer, torch.optim.Optimizer)

    @property
    def adam(self) -> Any:
        """The AdamW whose parameters are this rank's parts."""
        return self.engine.optimizer if self.plain_adam else self.engine.optimizer.optimizer

    def moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        if self.plain_adam:
            return self.adam.state[parameter][key]
        return fragments.safe_get_full_optimizer_state(parameter, key)


def make_moments(engine: Any, stage: int) -> None:
    """AdamW's state before its first step. DeepSpeed links parameters to it after the first step of the first group of
    parameters, when the other groups have none yet: a checkpoint could not read theirs."""
    optimizer = engine.optimizer
    inner = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    parts = [part for group in inner.param_groups for part in group["params"]]
    if stage == 3:
        parts = list(optimizer.fp32_partitioned_groups_flat)
    for part in parts:
        step = torch.zeros(()) if isinstance(inner, torch.optim.AdamW) else 0
        inner.state[part] = {"step": step} | {key: torch.zeros_like(part.data) for key in MOMENTS}
    if stage in (1, 2):
        optimizer._lazy_init_hp_params_optimizer_state()


def start_deepspeed() -> None:
    """The library, quiet, on the process group that the worker joined or on one of this process alone."""
    fragments.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of names that it calls
    # Its all-reduce through shared memory serves inference alone, and would be compiled with g++ here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def build_adam(spec: DeepSpeed, groups: list[dict[str, Any]], optim: Optim, lr: float) -> Any:
    """torch's AdamW as without DeepSpeed; DeepSpeed's own on the CPU where the optimizer is offloaded."""
    if spec.offload == "none":
        return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, eps=optim.eps, fused=True)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(
        groups, lr=lr, betas=optim.betas, eps=optim.eps, adamw_mode=True, fp32_optimizer_states=True
    )


def configuration(spec: DeepSpeed, bfloat16: bool, max_grad_norm: float | None, world: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. The batch sizes are nominal: the trainers say which micro-batch is the last."""
    zero: dict[str, Any] = {
        "stage": spec.zero_stage,
        "reduce_bucket_size": spec.bucket_elements,
        "allgather_bucket_size": spec.bucket_elements,
        "stage3_prefetch_bucket_size": spec.bucket_elements,
        "stage3_param_persistence_threshold": spec.persist_below,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "log_trace_cache_warnings": False,
    }
    if spec.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if spec.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
        "bf16": {"enabled": bfloat16},
        "communication_data_type": "fp32",
        "steps_per_print": 1 << 60,
        "zero_optimization": zero,
    }
