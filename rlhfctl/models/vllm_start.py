"""What every use of vLLM in this process needs before it starts: its environment, and the size of its cache."""

import os
from typing import Any

import torch

BLOCK = 128  # tokens of one cache block on CPU; less on GPUs


def cache_bytes(config: Any, dtype: torch.dtype, tokens: int) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = -(-tokens // BLOCK) + 2
    return int(2 * config.num_hidden_layers * heads * dim * dtype.itemsize * blocks * BLOCK)


def set_environment(on_cpu: bool, cores: list[int]) -> None:
    """Before the first import of vLLM. One process: its weights are updated from this one."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")  # its errors reach us as exceptions
    if on_cpu:
        import torch._dynamo

        # It would compile the sampler's few functions with g++: seconds for nothing.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        torch._dynamo.config.disable = True
        first = int(os.environ.get("LOCAL_RANK", "0")) * torch.get_num_threads()
        mine = [cores[(first + k) % len(cores)] for k in range(min(torch.get_num_threads(), len(cores)))]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(str(core) for core in mine))


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
