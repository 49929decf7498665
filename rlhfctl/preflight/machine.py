"""What the run asks of this machine: packages, devices, number format, memory, disk, ports (X...)."""

import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlhfctl.errors import RlhfctlError
from rlhfctl.install import install_line
from rlhfctl.preflight.deepspeed import deepspeed_findings
from rlhfctl.preflight.engine import runs_vllm
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.hostfile import expanded, read_hosts, unreachable
from rlhfctl.preflight.inputs import Inputs, NotThere, locate
from rlhfctl.preflight.nodes import port_is_free, split_endpoint, this_node
from rlhfctl.preflight.quantized import saved_bytes
from rlhfctl.preflight.shards import shards_of
from rlhfctl.preflight.weights import parameters_of_config
from rlhfctl.recipe.sections import VerifierSource
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.recipe.tracking import wandb_mode

GIB = 1 << 30
MOMENTS = 8  # bytes per trained parameter: AdamW's two moments in float32
MASTER = 4  # bytes per trained parameter: the float32 copy of a bfloat16 weight
BF16_CAPABILITY = (8, 0)


def check(inputs: Inputs) -> Iterator[Finding]:
    yield from package_findings(inputs)
    yield from tracking_findings(inputs)
    yield from device_findings(inputs)
    yield from network_findings(inputs)
    yield from deepspeed_findings(inputs, uses_bfloat16(inputs))
    yield from size_findings(inputs)


def world_size(inputs: Inputs) -> int:
    return processes(inputs) * expanded(inputs.recipe.launch).nnodes


def processes(inputs: Inputs) -> int:
    """Processes on this node, as launch/plan.py counts them."""
    launch = expanded(inputs.recipe.launch)
    if launch.nproc_per_node != "auto":
        return launch.nproc_per_node
    return 1 if launch.launcher == "inline" else max(1, len(inputs.machine.usable_gpus))


def package_findings(inputs: Inputs) -> list[Finding]:
    """X001: optional packages that this recipe needs."""
    recipe = inputs.recipe
    wanted = {"torch": "training", "transformers": "training"}
    if recipe.policy.lora is not None:
        wanted["peft"] = "policy.lora"
    if recipe.policy.quantization != "none":
        wanted["bitsandbytes"] = f"policy.quantization {recipe.policy.quantization}"
    sources = [*recipe.data.train, *recipe.data.eval]
    if any(source.path.endswith(".parquet") for source in sources):
        wanted["pyarrow"] = "parquet files"
    if any(isinstance(s, VerifierSource) and s.name == "math_answer" for s in inputs.verifiers):
        wanted["math_verify"] = "the verifier math_answer"
    if isinstance(recipe, PpoRecipe) and runs_vllm(recipe.rollout):
        wanted["vllm"] = f"rollout.engine {recipe.rollout.engine}"
    if recipe.tracking.tensorboard:
        wanted["tensorboard"] = "tracking.tensorboard"
    if recipe.tracking.wandb is not None and wandb_mode(recipe.tracking.wandb) != "disabled":
        wanted["wandb"] = "tracking.wandb"
    if recipe.deepspeed is not None or recipe.launch.launcher == "deepspeed":
        wanted["deepspeed"] = "the section deepspeed" if recipe.deepspeed else "launch.launcher deepspeed"
    missing = {name: why for name, why in wanted.items() if importlib.util.find_spec(name) is None}
    if not missing:
        return []
    return [
        Finding(
            "X001",
            "error",
            f"packages are missing: {', '.join(missing)}",
            "; ".join(f"{name} for {why}" for name, why in missing.items()),
            how_to_install(missing),
            "machine",
            {"missing": sorted(missing)},
            exit_code=4,
        )
    ]


def extras_of(missing: Iterable[str]) -> str:
    """The extras of pyproject.toml that bring these packages."""
    others = {"tensorboard": "tracking", "wandb": "tracking", "bitsandbytes": "quant"}
    return ",".join(sorted({others.get(name, "train") for name in missing}, reverse=True))


def tracking_findings(inputs: Inputs) -> list[Finding]:
    """X020: W&B online, and nothing that it could log in with; asked for in the middle of a launch it would hang."""
    wandb = inputs.recipe.tracking.wandb
    keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    netrc = Path(os.path.expanduser(os.environ.get("NETRC", "~/.netrc")))
    if wandb is None or wandb_mode(wandb) != "online" or netrc.is_file() or any(map(os.environ.get, keys)):
        return []
    return [
        Finding(
            "X020",
            "error",
            "tracking.wandb is online, and there is no W&B API key on this machine",
            fix="set WANDB_API_KEY, run `wandb login`, or set tracking.wandb.mode: offline",
            side="machine",
            exit_code=4,
        )
    ]


def how_to_install(missing: Iterable[str]) -> str:
    for extra in ("vllm", "deepspeed"):
        if extra in missing:
            return f"{install_line(extra)} (a GPU), make install-full (a CPU)"
    return install_line(extras_of(missing))


def device_findings(inputs: Inputs) -> list[Finding]:
    """X002 too few GPUs, X003 a torch that cannot use them, X004 no bfloat16, X005 more processes than cores."""
    machine, launch, findings = inputs.machine, inputs.recipe.launch, []
    gpus = machine.usable_gpus
    if machine.gpus and machine.torch_cuda is False:
        findings.append(
            Finding(
                "X003",
                "warning",
                f"this machine has {len(machine.gpus)} GPU(s), but the installed torch is a CPU build",
                "the run would use the CPU",
                "install a CUDA build of torch, or set CUDA_VISIBLE_DEVICES= to say that the CPU is meant",
                "machine",
            )
        )
    if gpus and processes(inputs) > len(gpus):
        findings.append(
            Finding(
                "X002",
                "error",
                f"launch.nproc_per_node is {processes(inputs)}, this machine has {len(gpus)} usable GPU(s)",
                "one process per GPU at most",
                "lower launch.nproc_per_node; CUDA_VISIBLE_DEVICES= runs on the CPU",
                "machine",
                exit_code=4,
            )
        )
    old = [gpu.name for gpu in gpus if gpu.capability < BF16_CAPABILITY]
    if old and inputs.recipe.policy.dtype in ("auto", "bfloat16"):
        findings.append(
            Finding(
                "X004",
                "error",
                f"{old[0]} has no bfloat16, which policy.dtype {inputs.recipe.policy.dtype} means on a GPU",
                fix="set policy.dtype: float32",
                side="machine",
                exit_code=4,
            )
        )
    if not gpus and processes(inputs) * (launch.threads if launch.threads != "auto" else 1) > machine.cores:
        findings.append(
            Finding(
                "X005",
                "warning",
                f"{processes(inputs)} processes on {machine.cores} CPU cores",
                "they will slow each other down",
                "lower launch.nproc_per_node or launch.threads",
                "machine",
            )
        )
    return findings


def network_findings(inputs: Inputs) -> list[Finding]:
    """X006: several nodes, and the endpoint cannot be reached or its port is taken on the node that hosts it."""
    launch = expanded(inputs.recipe.launch)
    if launch.nnodes == 1 or launch.rdzv_endpoint is None:
        return []
    if inputs.recipe.launch.hostfile is not None:
        port = split_endpoint(launch.rdzv_endpoint)[1]
        hosts = {
            host.name: unreachable(host.name, port) for host in read_hosts(inputs.recipe.launch.hostfile)
        }
        lost = [
            Finding(
                "X032",
                "error",
                f"launch.hostfile: {host} cannot be reached: {reason}",
                fix="start that machine, correct the name, or take its line out",
                side="machine",
                exit_code=4,
            )
            for host, reason in hosts.items()
            if reason is not None
        ]
        if lost:
            return lost
    try:
        node = this_node(launch.rdzv_endpoint)
    except RlhfctlError as error:
        return [
            Finding(
                "X006",
                "error",
                "the rendezvous endpoint is no use",
                error.message,
                side="machine",
                exit_code=error.exit_code,
            )
        ]
    port = split_endpoint(launch.rdzv_endpoint)[1]
    if not node.leader or port_is_free(node.address, port):
        return []
    return [
        Finding(
            "X006",
            "error",
            f"launch.rdzv_endpoint: port {port} is in use on this machine",
            "another run may still be alive",
            "end it, or choose another port on all nodes",
            "machine",
            exit_code=4,
        )
    ]


# Memory and disk: lower bounds, so that what they refuse could not have run


def size_findings(inputs: Inputs) -> list[Finding]:
    """X007 memory, X008 disk, X009 what was estimated."""
    try:
        parameters = parameter_count(inputs, inputs.policy_path)
    except NotThere:
        return []
    if parameters is None:
        return []
    trained = trained_parameters(inputs, parameters)
    width = 2 if uses_bfloat16(inputs) else 4
    critic = critic_parameters(inputs, parameters)
    needed = least_memory(inputs, parameters, trained, critic, width)
    findings = memory_findings(inputs, needed)
    whole = trained if inputs.recipe.policy.lora is not None else parameters
    checkpoint = (
        whole * width + critic * width + (trained + critic) * (MOMENTS + (MASTER if width == 2 else 0))
    )
    findings += disk_findings(inputs, checkpoint, parameters * width)
    findings.append(
        Finding(
            "X009",
            "info",
            f"{parameters / 1e6:.3g} M parameters, {trained / 1e6:.3g} M trained; at least "
            f"{gib(needed)} of memory per process, {gib(checkpoint)} of disk per checkpoint",
            side="machine",
            evidence={
                "parameters": parameters,
                "trained": trained,
                "memory": needed,
                "disk": checkpoint,
            },
        )
    )
    return findings


def least_memory(inputs: Inputs, parameters: int, trained: int, critic: int, width: int) -> int:
    """Bytes per rank: weights, gradients and optimizer as ZeRO divides them, and the frozen copies. What is offloaded
    is not counted where the models are on GPUs."""
    recipe = inputs.recipe
    shards = shards_of(recipe, world_size(inputs))
    away = recipe.deepspeed.offload if recipe.deepspeed is not None and inputs.machine.usable_gpus else "none"
    weights = (parameters + critic) * width - saved_bytes(inputs, width)
    optimizer = (trained + critic) * (MOMENTS + (MASTER if width == 2 else 0))
    return (
        (0 if away == "all" else weights // shards.weights)
        + (trained + critic) * width // shards.gradients
        + (0 if away != "none" else optimizer // shards.optimizer)
        + other_models(inputs, parameters) * width
    )


def parameter_count(inputs: Inputs, path: str) -> int | None:
    if inputs.recipe.policy.path == path or locate(path) is not None:
        checkpoint = inputs.checkpoint(path)
        if checkpoint.tensors:
            return checkpoint.parameters
    return parameters_of_config(inputs.config(path))


def trained_parameters(inputs: Inputs, parameters: int) -> int:
    lora = inputs.recipe.policy.lora
    if lora is None:
        return parameters
    tensors = inputs.checkpoint(inputs.policy_path).tensors if inputs.recipe.policy.path else {}
    matrices = [
        entry.shape for name, entry in tensors.items() if len(entry.shape) == 2 and ".layers." in name
    ]
    return sum(lora.rank * (rows + columns) for rows, columns in matrices)


def other_models(inputs: Inputs, parameters: int) -> int:
    """Parameters of frozen copies: the reference (LoRA needs none) and reward models."""
    recipe = inputs.recipe
    if not isinstance(recipe, PpoRecipe):
        return 0
    total = 0
    if recipe.algorithm.kl_coef > 0 and (recipe.policy.lora is None or recipe.reference is not None):
        total += parameters
    for source in inputs.reward_models:
        if locate(source.path) is not None:
            total += inputs.checkpoint(source.path).parameters
    return total


def critic_parameters(inputs: Inputs, parameters: int) -> int:
    recipe = inputs.recipe
    if not isinstance(recipe, PpoRecipe) or recipe.algorithm.advantage != "gae":
        return 0
    value_model = recipe.value_model
    if value_model is not None and (value_model.shared_trunk or value_model.lora is not None):
        return 0
    return parameters


def uses_bfloat16(inputs: Inputs) -> bool:
    dtype = inputs.recipe.policy.dtype
    return dtype == "bfloat16" or (dtype == "auto" and bool(inputs.machine.usable_gpus))


def memory_findings(inputs: Inputs, needed: int) -> list[Finding]:
    gpus = inputs.machine.usable_gpus
    free = min(gpu.memory for gpu in gpus) if gpus else inputs.machine.memory // processes(inputs)
    where = "the smallest GPU has" if gpus else "this machine has free for each process"
    if needed <= free or not free:
        return []
    return [
        Finding(
            "X007",
            "error",
            f"the weights and the optimizer alone need {gib(needed)}, {where} {gib(free)}",
            "activations come on top",
            "use policy.lora, policy.dtype: bfloat16, a smaller model, or a larger machine",
            "machine",
            {"needed": needed, "free": free},
            exit_code=4,
        )
    ]


def disk_findings(inputs: Inputs, checkpoint: int, final: int) -> list[Finding]:
    """A new checkpoint is written before the oldest goes; final/ comes on top."""
    train = inputs.recipe.train
    kept = train.keep_checkpoints + 1 if train.save_every else 1
    if train.save_every and train.steps is not None:
        kept = min(kept, -(-train.steps // train.save_every))
    needed = kept * checkpoint + final
    place = existing_parent(inputs.run_dir or Path("runs"))
    free = shutil.disk_usage(place).free
    if needed <= free:
        return []
    return [
        Finding(
            "X008",
            "error",
            f"{kept} checkpoint(s) and the final model need {gib(needed)} of disk, {place} has {gib(free)} free",
            fix="free space, lower train.keep_checkpoints, or give --run-dir on a larger disk",
            side="machine",
            evidence={"needed": needed, "free": free},
            exit_code=4,
        )
    ]


def existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"
