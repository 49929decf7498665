"""The two ways to train, behind the same few calls: the plain engine (optimizer.py) and DeepSpeed (zero.py).

A trainer's loop says `optimizer.run(forward)`, `optimizer.backward(loss)` and `clip_and_step`, walks `passes`, stands
inside `whole` while it samples, scores or evaluates, and inside `whole_on_rank_zero` while it exports.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from rlhfctl.errors import Unable
from rlhfctl.install import install_line
from rlhfctl.recipe.sections import Optim
from rlhfctl.recipe.tasks import Recipe
from rlhfctl.trainers.distributed import any_rank
from rlhfctl.trainers.optimizer import Learner, Optimizer, Passes


def build_optimizer(
    recipe: Recipe,
    modules: Sequence[nn.Module],
    named: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    total_steps: int,
    max_grad_norm: float | None,
    optim: Optim | None = None,
) -> Learner:
    """One optimizer over `named`, the parameters of `modules`. With DeepSpeed: one engine, clipped by max_grad_norm."""
    optim = optim or recipe.optim
    if recipe.deepspeed is None:
        return Optimizer(named, optim, lr, total_steps)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        from rlhfctl.trainers.zero import ZeroOptimizer
    except ModuleNotFoundError as error:
        raise Unable(f"the section deepspeed needs {error.name}: {install_line('deepspeed')}") from error
    return ZeroOptimizer(recipe.deepspeed, modules, named, optim, lr, total_steps, max_grad_norm)


def passes(learners: Sequence[Passes], packs: list[list[int]]) -> Iterator[tuple[list[int], bool]]:
    """(rows of one forward and backward pass, whether it counts), this rank's share of an optimizer step.

    With DeepSpeed all ranks make equally many, at least one: a rank with fewer packs takes row 0, whose loss must
    be multiplied by zero and whose sums are left out.
    """
    if not any(learner.collective for learner in learners):
        yield from ((members, True) for members in packs)
        return
    count = max(1, any_rank(len(packs)))
    for place in range(count):
        for learner in learners:
            learner.last = place == count - 1
        yield (packs[place], True) if place < len(packs) else ([0], False)


@contextmanager
def whole(learners: Iterable[Learner]) -> Iterator[None]:
    """Inside: all parameters are there on every rank, and ranks may make different numbers of passes."""
    with ExitStack() as stack:
        for learner in learners:
            stack.enter_context(learner.whole())
        yield


@contextmanager
def whole_on_rank_zero(learners: Iterable[Learner]) -> Iterator[None]:
    """Inside: all parameters are there on rank 0, in its CPU memory where they are kept in parts; it exports them."""
    with ExitStack() as stack:
        for learner in learners:
            stack.enter_context(learner.whole_on_rank_zero())
        yield
