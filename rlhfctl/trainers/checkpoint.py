"""What a checkpoint holds and how a run continues from one.

checkpoints/step_NNNNNN/  policy/ (Hugging Face layout), policy.optimizer.safetensors, and with a value model
critic.safetensors, critic.optimizer.safetensors (of a reward model the same two under reward_model, no policy);
trainer.json (step, counters, world size). No pickle anywhere.
There is no random state to keep: every random number is a function of seed, step and sample index.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhfctl.base_weights import base_facts, refuse_other_base
from rlhfctl.errors import Interrupted, Refused, RunFailed
from rlhfctl.heartbeat import heartbeat
from rlhfctl.models.export import export_policy, load_trainable
from rlhfctl.models.finite import first_non_finite
from rlhfctl.run_dir import truncate_jsonl
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import any_rank, barrier
from rlhfctl.trainers.engine import whole_on_rank_zero
from rlhfctl.trainers.optimizer import Learner


def due(every: int, step: int, total: int) -> bool:
    """Whether a checkpoint is written after step `step`: every `every` steps, and always at the end."""
    return step == total or (every > 0 and step % every == 0)


def save(
    ctx: RunContext, models: dict[str, nn.Module], optimizers: Mapping[str, Learner], state: dict[str, Any]
) -> None:
    """Write one checkpoint (rank 0), atomically, and drop old ones. state: {"step": ..., counters}.

    Raises RunFailed, and writes nothing, where a trained weight is NaN or infinity."""
    heartbeat.at("the checkpoint", state["step"])
    refuse_non_finite_weights(ctx, models, state["step"])
    states = {name: optimizer.state() for name, optimizer in optimizers.items()}
    with whole_on_rank_zero(optimizers.values()):
        if ctx.rank == 0:
            write_checkpoint(ctx, models, states, state)
        barrier()
    heartbeat.at("train", state["step"] + 1)


def refuse_non_finite_weights(ctx: RunContext, models: Mapping[str, nn.Module], step: int) -> None:
    """All ranks stop where one has a trained weight that is no number: the update of `step` was too large. The losses
    and norms of a step are read before its update, so the last update of a run shows here alone."""
    for model, module in models.items():
        trained = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
        found = first_non_finite(trained)
        if not any_rank(found is not None):
            continue
        newest = ctx.run.newest_checkpoint()
        kept = f"{newest.name} is kept" if newest else "there is no earlier checkpoint"
        raise RunFailed(
            f"{found or 'a parameter on another rank'} of {model} holds NaN or infinity after step {step}: these "
            f"weights are not saved, {kept}; lower optim.lr or look at the batch"
        )


def keep(
    ctx: RunContext, models: dict[str, nn.Module], optimizers: Mapping[str, Learner], state: dict[str, Any]
) -> None:
    """Before a run ends in the middle of a step: the boundary before it, unless that is where this phase began."""
    if state["step"] > ctx.first:
        save(ctx, models, optimizers, state)


def write_checkpoint(
    ctx: RunContext, models: dict[str, nn.Module], states: dict[str, dict[str, Tensor]], state: dict[str, Any]
) -> None:
    def write(directory: Path) -> None:
        for name, model in models.items():
            if name == "policy":
                export_policy(model, ctx.recipe.policy, directory / "policy", merge=False)
            else:
                save_file(named_tensors(model), directory / f"{name}.safetensors")
        for name, tensors in states.items():
            held = {key: value.contiguous() for key, value in tensors.items()}
            save_file(held, directory / f"{name}.optimizer.safetensors")
        policy = ctx.recipe.policy
        base = {}
        if policy.lora is not None and policy.path is not None:
            base = {"base": base_facts(policy.path, policy.quantization, policy.quantization_block)}
        (directory / "trainer.json").write_text(json.dumps({**state, **base, "world": ctx.world}))

    ctx.run.commit_checkpoint(state["step"], write)
    ctx.run.prune_checkpoints(ctx.recipe.train.keep_checkpoints)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters by name, shared ones once: what is frozen comes from where the run started."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def restore(
    ctx: RunContext, models: dict[str, nn.Module], optimizers: Mapping[str, Learner]
) -> dict[str, Any] | None:
    """Load the newest sound checkpoint into the models and optimizers; None when there is none to resume from.

    Raises RunFailed where there are checkpoints and all of them are damaged.
    """
    if not ctx.resume:
        return None
    directory = newest_sound(ctx)
    if directory is None and not ctx.first:
        ctx.say("no checkpoint to resume from: starting at step 0")
        _forget_after(ctx, -1)  # the evaluation before the first step is made again
        return None
    state: dict[str, Any] = {}
    if directory is not None:
        state = json.loads((directory / "trainer.json").read_text())
    if directory is None or 0 < state["step"] <= ctx.first:
        ctx.say(f"resuming from the model of the phase before (step {ctx.first})")
        _forget_after(ctx, ctx.first)
        return None
    if ctx.recipe.policy.path is not None:
        refuse_other_base(state.pop("base", {}), ctx.recipe.policy.path, directory)
    for name, model in models.items():
        if name == "policy":
            load_trainable(model, directory / "policy")
        else:
            load_into(model, load_file(directory / f"{name}.safetensors"), directory)
    for name, optimizer in optimizers.items():
        optimizer.load_state(load_file(directory / f"{name}.optimizer.safetensors"))
    _forget_after(ctx, state["step"])
    ctx.say(f"resuming from {directory.name}")
    return state


def newest_sound(ctx: RunContext) -> Path | None:
    """The checkpoint to resume from; newer ones that are damaged are told and set aside."""
    directory, damaged = ctx.run.sound_checkpoint()
    if damaged and directory is None:
        told = "; ".join(f"{path.name}: {wrong}" for path, wrong in damaged)
        raise RunFailed(
            f"every checkpoint in {ctx.run.checkpoints} is damaged ({told}): put back a copy of one, "
            "or start again in another --run-dir"
        )
    barrier()  # every rank has read what rank 0 renames now
    for path, wrong in damaged:
        ctx.say(f"{path.name} is damaged ({wrong}): it is kept as {path.name}.damaged, an older one is used")
        if ctx.rank == 0:
            ctx.run.set_aside(path)
    return directory


def _forget_after(ctx: RunContext, step: int) -> None:
    """What later steps had logged is written again."""
    if ctx.rank == 0:
        for path in (ctx.run.metrics, ctx.run.samples, ctx.run.quarantine):
            truncate_jsonl(path, step)
    barrier()


def load_into(model: nn.Module, tensors: dict[str, Tensor], origin: Path) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(parameters) != set(tensors):
        odd = sorted(set(parameters) ^ set(tensors))[:3]
        raise Refused(f"{origin} does not fit this model: {', '.join(odd)} on one side only")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def step_boundary(
    ctx: RunContext,
    models: dict[str, nn.Module],
    optimizers: Mapping[str, Learner],
    state: dict[str, Any],
    total: int,
) -> None:
    """After step state["step"] of `total`: the checkpoint where one is due, the end where a signal asked for it."""
    saved = due(ctx.recipe.train.save_every, state["step"], total)
    if saved:
        save(ctx, models, optimizers, state)
    if state["step"] < total:
        stop_if_asked(ctx, saved, models, optimizers, state)


def stop_if_asked(
    ctx: RunContext,
    saved: bool,
    models: dict[str, nn.Module],
    optimizers: Mapping[str, Learner],
    state: dict[str, Any],
) -> None:
    """At a step boundary: when a signal came in on any rank, keep a checkpoint and end the run."""
    signum = any_rank(ctx.stop_signal() or 0)
    if not signum:
        return
    if not saved:
        save(ctx, models, optimizers, state)
    raise Interrupted(signum, f"interrupted at step {state['step']}; checkpoint kept, continue with --resume")


def save_final(ctx: RunContext, model: nn.Module, step: int) -> None:
    """final/: the policy in Hugging Face layout, whole or not at all. Of a phase that is not the last: the model that
    the next one starts from, adapters merged, and the step it stands for."""
    heartbeat.at("the final model", step)
    if ctx.rank == 0:
        lora = ctx.recipe.policy.lora
        early = ctx.phase is not None and ctx.phase.model is not None
        merge = lora is not None and (lora.merge_final or early)

        def write(directory: Path) -> None:
            export_policy(model, ctx.recipe.policy, directory, merge)
            if ctx.phase is not None:
                (directory / "phase.json").write_text(json.dumps({"step": step}))

        if ctx.phase is not None and ctx.phase.model is not None:
            ctx.run.commit_phase(ctx.phase.model, write)
        else:
            ctx.run.commit_final(write)
    barrier()
