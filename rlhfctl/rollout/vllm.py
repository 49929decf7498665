"""vLLM in the trainer's process: continuous batching and a prefix cache beside the policy, weights updated in place.

The engine starts from random weights of the policy's config, so that nothing but a sync can give it the right ones.
"""

import copy
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhfctl.errors import RunFailed, Unable
from rlhfctl.install import install_line
from rlhfctl.models.in_parts import shape_of
from rlhfctl.models.load import config_of, head_weight
from rlhfctl.models.merged import exhaust, merged_weights
from rlhfctl.models.vllm_start import cache_bytes, first_line, set_environment
from rlhfctl.rollout.canary import Run, canary_ids, compare, directly
from rlhfctl.rollout.sampling import stream_key
from rlhfctl.rollout.types import Request, Rollout, Sampling, refuse_too_long


class VllmEngine:
    """max_length: longest prompt and response together; cache_tokens: room for that many tokens of keys and values.

    Raises Unable where vLLM cannot run the model.
    """

    def __init__(
        self, policy: nn.Module, max_length: int, cache_tokens: int, trust_remote_code: bool
    ) -> None:
        weight = head_weight(policy)
        self.on_cpu = weight.device.type == "cpu"
        self.max_length = max_length
        self.canary = canary_ids(shape_of(weight)[0])
        config = copy.deepcopy(config_of(policy))
        config.architectures = [type(policy).__name__]
        self.tied = bool(getattr(config, "tie_word_embeddings", False))
        length = max(max_length, len(self.canary) + 1)
        affinity = os.sched_getaffinity(0)
        set_environment(self.on_cpu, sorted(affinity))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # vLLM's own, about torch
                from vllm import LLM
            dtype: Any = str(weight.dtype).removeprefix("torch.")
            with tempfile.TemporaryDirectory() as directory:
                config.save_pretrained(directory)
                self.llm: Any = LLM(
                    str(Path(directory)),
                    skip_tokenizer_init=True,
                    load_format="dummy",
                    dtype=dtype,
                    max_model_len=length,
                    enforce_eager=True,
                    kv_cache_memory_bytes=cache_bytes(config, weight.dtype, max(cache_tokens, length)),
                    # vLLM's default is the distribution before the temperature.
                    logprobs_mode="processed_logprobs",
                    enable_prefix_caching=True,
                    # A prompt prefilled in parts rewinds its request's generator, which CPU generators cannot.
                    enable_chunked_prefill=not self.on_cpu,
                    max_num_batched_tokens=max(4096, length),
                    trust_remote_code=trust_remote_code,
                )
        except ModuleNotFoundError as error:
            raise Unable(
                f"the engine vllm needs {error.name}: {install_line('vllm')} (a GPU), make install-full (a CPU)"
            ) from error
        except Exception as error:
            raise Unable(f"the engine vllm cannot run this model: {first_line(error)}") from error
        finally:
            os.sched_setaffinity(0, affinity)  # vLLM binds the calling thread, which trains as well

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        from vllm import SamplingParams

        refuse_too_long(requests, sampling, self.max_length)
        params = [
            SamplingParams(
                max_tokens=request.room(sampling.max_new_tokens),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=stream_key(sampling.seed, sampling.step, request.index),
                stop_token_ids=list(sampling.stop_ids),
                ignore_eos=True,  # the recipe's stop ids decide
                logprobs=0,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        try:
            answers = self.llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:
            raise RunFailed(f"vLLM failed in the rollout: {first_line(error)}") from error
        return [
            rollout(request, answer.outputs[0]) for request, answer in zip(requests, answers, strict=True)
        ]

    def sync(self, policy: nn.Module, step: int, run: Run = directly) -> dict[str, float]:
        try:
            self.update(policy)
            found = self.canary_logprobs()
        except Exception as error:
            raise RunFailed(f"stopped at step {step}: the weight sync failed: {first_line(error)}") from error
        return {"sync/canary": compare(policy, self.canary, found, step, run)}

    def update(self, policy: nn.Module) -> None:
        """Every weight anew, then what vLLM derived from the old ones."""
        weights = merged_weights(policy)
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        finally:
            exhaust(weights)
        if self.tied and self.on_cpu:
            # The CPU build packs the matrix of the head; a reload leaves the packed copy of a tied one as it was.
            self.llm.apply_model(pack_head)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, which belongs to the old weights")

    def canary_logprobs(self) -> list[float]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        answer = self.llm.generate([{"prompt_token_ids": self.canary}], params, use_tqdm=False)[0]
        return [
            answer.prompt_logprobs[place][self.canary[place]].logprob for place in range(1, len(self.canary))
        ]

    def close(self) -> None:
        """Also ends torch.distributed's default group, the trainer's if it has one: hence last of all."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm


def rollout(request: Request, output: Any) -> Rollout:
    ids = list(output.token_ids)
    logprobs = [found[token].logprob for token, found in zip(ids, output.logprobs, strict=True)]
    if output.finish_reason not in ("stop", "length"):
        raise RunFailed(f"vLLM ended sample {request.index} with {output.finish_reason}, not stop or length")
    return Rollout(request.index, request.prompt_ids, ids, torch.tensor(logprobs), output.finish_reason)


def pack_head(model: Any) -> None:
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
