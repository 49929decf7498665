"""A reward model whose backbone runs in vLLM's pooling runner: continuous batching and its kernels under our own head.

    score = head(h_vllm[places]) as models.reward_model reads it

vLLM gives the hidden state of every token; the head, what it reads and how it is normalised stay ours, so everything
that RewardModel can read can be served. The weights are those of the plain model, adapters merged; before it is let go
both score the same rows.
"""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhfctl.errors import Refused, Unable
from rlhfctl.install import install_line
from rlhfctl.models.load import config_of
from rlhfctl.models.merged import merged_weights
from rlhfctl.models.reward_model import RewardModel, last_read
from rlhfctl.models.vllm_start import cache_bytes, first_line, set_environment

# Largest difference of two scores, in parts of the larger one or of 1: kernels round differently.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
PROOF = (3, 17, 64)  # tokens of the rows that both score


class PooledRewardModel(RewardModel):
    """Takes over from a plain reward model. tokenizer: its directory, which vLLM wants and nothing reads.

    Raises Unable where vLLM is not installed or cannot run the backbone, Refused where the scores differ."""

    def __init__(self, plain: RewardModel, tokenizer: str) -> None:
        super().__init__(
            nn.Module(),
            plain.head.weight.detach(),
            plain.mean,
            plain.std,
            plain.bias,
            plain.read,
            plain.pad,
            plain.separator,
        )
        self.to(plain.head.weight.device).eval()
        config = config_of(plain.trunk)
        self.trunk.config = config
        self.length = int(config.max_position_embeddings)
        self.llm = start(plain.trunk, config, tokenizer, self.length)
        self.llm.collective_rpc(
            "reload_weights",
            kwargs={"weights_iterator": ((f"model.{name}", w) for name, w in merged_weights(plain.trunk))},
        )
        try:
            self.difference = prove(plain, self, config.vocab_size, self.length)
        except RuntimeError as error:  # a kernel that is missing is met by the first rows
            raise cannot(error) from error

    @torch.no_grad()
    def at(
        self, rows: Sequence[list[int]], places: Sequence[Sequence[int]], budget: int
    ) -> list[list[float]]:
        """As RewardModel.at. A row is sent up to the last token that is read; vLLM makes its own batches."""
        asked = [index for index, chosen in enumerate(places) if len(chosen)]
        prompts = [{"prompt_token_ids": rows[index][: max(places[index]) + 1]} for index in asked]
        found: list[list[float]] = [[] for _ in rows]
        if not asked:
            return found
        outputs = self.llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        for index, output in zip(asked, outputs, strict=True):
            hidden = output.outputs.data[list(places[index])].to(self.head.weight.device)
            found[index] = (self.head(hidden) + self.bias).tolist()
        return found


def start(trunk: nn.Module, config: Any, tokenizer: str, length: int) -> Any:
    """vLLM over the backbone's architecture with random weights."""
    weight = next(trunk.parameters())
    on_cpu = weight.device.type == "cpu"
    config = copy.deepcopy(config)
    config.architectures = [f"{type(trunk).__name__.removesuffix('Model')}ForCausalLM"]
    affinity = os.sched_getaffinity(0)
    set_environment(on_cpu, sorted(affinity))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's own, about torch
            from vllm import LLM
            from vllm.config import PoolerConfig
        dtype: Any = str(weight.dtype).removeprefix("torch.")
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(config.to_dict(), default=str))
            return LLM(
                directory,
                tokenizer=tokenizer,
                runner="pooling",
                convert="embed",
                pooler_config=PoolerConfig(task="token_embed", use_activation=False),
                load_format="dummy",
                dtype=dtype,
                max_model_len=length,
                enforce_eager=True,
                kv_cache_memory_bytes=cache_bytes(config, weight.dtype, max(length, 8192)),
                enable_prefix_caching=False,  # it gives no hidden states of what it has kept
                enable_chunked_prefill=False,
                max_num_batched_tokens=max(8192, length),
            )
    except ModuleNotFoundError as error:
        raise Unable(
            f"--engine vllm needs {error.name}: {install_line('vllm')} (a GPU), make install-full (a CPU)"
        ) from error
    except Exception as error:
        raise cannot(error) from error
    finally:
        os.sched_setaffinity(0, affinity)  # vLLM binds the calling thread


def cannot(error: Exception) -> Unable:
    return Unable(f"vLLM cannot run this reward model ({first_line(error)}): serve it without --engine vllm")


def prove(plain: RewardModel, pooled: RewardModel, vocabulary: int, length: int) -> float:
    """The largest difference on rows of ids spread over the vocabulary. Raises Refused past the tolerance."""
    rows = [
        [place * 2654435761 % 2**32 % vocabulary for place in range(1, size + 1)]
        for size in PROOF
        if size <= length
    ]
    places = [sorted({0, last_read(row, plain.pad)}) for row in rows]
    wanted, found = plain.at(rows, places, 8192), pooled.at(rows, places, 8192)
    pairs = [pair for row in zip(wanted, found, strict=True) for pair in zip(*row, strict=True)]
    worst, left, right = max((abs(a - b) / max(1.0, abs(a)), a, b) for a, b in pairs)
    tolerance = TOLERANCES[next(plain.trunk.parameters()).dtype]
    if not worst <= tolerance:
        raise Refused(
            f"vLLM scores {right:.6f} with this reward model where the plain engine scores {left:.6f} (tolerance "
            f"{tolerance:g}): serve it without --engine vllm"
        )
    return worst
