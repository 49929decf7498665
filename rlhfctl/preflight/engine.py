"""What the rollout engine asks for: attention heads that it can run, servers that fit, ports, GPUs (X010 to X013)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhfctl.errors import RlhfctlError
from rlhfctl.preflight.devices import Machine
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs, NotThere
from rlhfctl.preflight.nodes import port_is_free
from rlhfctl.recipe.sections import Rollout
from rlhfctl.recipe.tasks import PpoRecipe

VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM 0.32
ASK_SECONDS = 5.0


def check(inputs: Inputs) -> Iterator[Finding]:
    yield from head_findings(inputs)
    if isinstance(inputs.recipe, PpoRecipe) and inputs.recipe.rollout.engine == "vllm_server":
        yield from port_findings(inputs.recipe.rollout)
        yield from gpu_findings(inputs, inputs.recipe)
        yield from server_findings(inputs, inputs.recipe)


def runs_vllm(rollout: Rollout) -> bool:
    """Whether vLLM runs on this machine, in the trainer's process or in servers that the run starts."""
    return rollout.engine == "vllm" or (rollout.engine == "vllm_server" and rollout.server.urls is None)


def head_findings(inputs: Inputs) -> list[Finding]:
    """X010: vLLM's attention on the CPU is compiled for some head sizes only."""
    rollout = inputs.recipe.rollout
    if rollout is None or not runs_vllm(rollout):
        return []
    try:
        size = unrunnable_heads(inputs.config(inputs.policy_path), inputs.machine)
    except NotThere:
        return []
    if size is None:
        return []
    return [
        Finding(
            "X010",
            "error",
            heads_sentence(size),
            f"sizes it can: {', '.join(str(size) for size in VLLM_CPU_HEAD_SIZES)}",
            "set rollout.engine: hf",
            "machine",
            {"head_size": size},
            exit_code=4,
        )
    ]


def unrunnable_heads(config: dict[str, Any], machine: Machine) -> int | None:
    """The size of attention heads that vLLM has no kernel for on this machine; None: it has, or nobody says."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    size: int | None = config.get("head_dim") or (hidden // heads if hidden and heads else None)
    return None if machine.usable_gpus or size in VLLM_CPU_HEAD_SIZES else size


def heads_sentence(size: int) -> str:
    return f"the policy's attention heads have size {size}, which vLLM cannot run on a CPU"


def port_findings(rollout: Rollout) -> Iterator[Finding]:
    """X012: a port that a server is to listen on is taken."""
    server = rollout.server
    if server.urls is not None or server.port is None:
        return
    for port in range(server.port, server.port + server.count):
        if port > 65535 or not port_is_free("127.0.0.1", port):
            yield Finding(
                "X012",
                "error",
                f"rollout.server.port: port {port} is in use on this machine"
                if port <= 65535
                else f"rollout.server.port {server.port} leaves no port for {server.count} servers",
                "a server of another run may still be alive" if port <= 65535 else "",
                "end it, choose another port, or leave rollout.server.port out: free ones are taken",
                "machine",
                exit_code=4,
            )
            return


def gpu_findings(inputs: Inputs, recipe: PpoRecipe) -> Iterator[Finding]:
    """X013: on GPUs each started server needs one that no trainer process has."""
    gpus, server = inputs.machine.usable_gpus, recipe.rollout.server
    if not gpus or server.urls is not None:
        return
    wished = recipe.launch.nproc_per_node
    trainers = (1 if recipe.launch.launcher == "inline" else len(gpus)) if wished == "auto" else wished
    if trainers + server.count > len(gpus):
        yield Finding(
            "X013",
            "error",
            f"{trainers} trainer process(es) and {server.count} rollout server(s) on {len(gpus)} GPU(s)",
            "each takes one of its own",
            f"set launch.nproc_per_node: {max(1, len(gpus) - server.count)}, or take rollout.engine: vllm",
            "machine",
            exit_code=4,
        )


def server_findings(inputs: Inputs, recipe: PpoRecipe) -> Iterator[Finding]:
    """X011: a given server does not answer, cannot take weights, or runs another model than the policy."""
    from rlhfctl.rollout.handshake import ask, mismatch

    rollout = recipe.rollout
    if rollout.server.sync_dir is not None and not Path(rollout.server.sync_dir).is_dir():
        yield Finding(
            "X011",
            "error",
            f"rollout.server.sync_dir {rollout.server.sync_dir} is no directory on this machine",
            fix="create it, on storage that the servers see under the same path",
            side="machine",
        )
    for url in rollout.server.urls or []:
        try:
            info = ask(url.rstrip("/"), ASK_SECONDS)
        except RlhfctlError as error:
            yield Finding("X011", "error", error.message, side="machine", exit_code=error.exit_code)
            continue
        try:
            config = inputs.config(inputs.policy_path)
        except NotThere:
            continue
        vocabulary, context = config.get("vocab_size"), config.get("max_position_embeddings")
        longest = min(longest_sample(recipe), int(context or longest_sample(recipe)))
        problem = mismatch(info, int(vocabulary), longest) if vocabulary else None
        if problem is not None:
            yield Finding("X011", "error", problem, side="machine")


def longest_sample(recipe: PpoRecipe) -> int:
    """Prompt and response together, as the trainer asks its engine for, which gives at most the model's context."""
    return (recipe.rollout.max_prompt_length or recipe.data.max_length) + recipe.rollout.max_new_tokens
