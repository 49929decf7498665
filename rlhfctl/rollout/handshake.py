"""What a rollout server says of itself: asked before launch and once more when the run begins. No torch here."""

from dataclasses import dataclass
from typing import Any

import httpx

from rlhfctl.errors import Refused

EXTENSION = "rlhfctl.rollout.vllm_worker.SyncedWorker"
NEEDS = (
    "start it with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls "
    f"{EXTENSION} --enable-scale-out --logprobs-mode processed_logprobs"
)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """max_length: prompt and response together. workers: processes that hold a part of the model each."""

    url: str
    max_length: int
    vocabulary: int
    dtype: str
    device: str
    workers: int


def ask(url: str, seconds: float) -> ServerInfo:
    """Raises Refused where nobody answers, or the server lacks what weight updates and log-probabilities need."""
    try:
        with httpx.Client(timeout=seconds, trust_env=False) as client:
            models = client.get(f"{url}/v1/models")
            told = client.post(f"{url}/collective_rpc", json={"method": "sync_info"})
            probe = client.post(f"{url}/inference/v1/generate", json={})
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Refused(
            f"the rollout server {url} does not answer: {error or type(error).__name__}; start it, or correct "
            "rollout.server.urls"
        ) from None
    try:
        length = int(models.json()["data"][0]["max_model_len"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise Refused(f"{url} is no vLLM server: its /v1/models holds no max_model_len") from None
    if told.status_code == 404:
        raise Refused(f"the rollout server {url} takes no weight updates: {NEEDS}")
    try:
        workers: list[dict[str, Any]] = told.json()["results"]
        info = workers[0]
        found = ServerInfo(
            url, length, int(info["vocabulary"]), str(info["dtype"]), str(info["device"]), len(workers)
        )
        mode, chunked = info["logprobs_mode"], info["chunked_prefill"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise Refused(
            f"the rollout server {url} takes no weight updates of rlhfctl (HTTP {told.status_code}): {NEEDS}"
        ) from None
    if probe.status_code == 403:
        raise Refused(f"the rollout server {url} takes no token ids: {NEEDS}")
    if mode != "processed_logprobs":
        raise Refused(
            f"the rollout server {url} gives {mode}, not the log-probabilities after the temperature: start it with "
            "--logprobs-mode processed_logprobs"
        )
    if found.device == "cpu" and chunked:
        # A prompt prefilled in parts rewinds its request's generator, which CPU generators cannot.
        raise Refused(
            f"the rollout server {url} prefills prompts in parts, which seeded requests on a CPU do not survive: "
            "start it with --no-enable-chunked-prefill"
        )
    return found


def mismatch(info: ServerInfo, vocabulary: int, longest: int) -> str | None:
    """Why this server cannot sample for a policy with so many token ids and samples of at most `longest` tokens."""
    if info.vocabulary != vocabulary:
        return (
            f"the rollout server {info.url} runs a model of {info.vocabulary} token ids, the policy has {vocabulary}: "
            "start it with the policy's config.json"
        )
    if info.max_length < longest:
        return (
            f"the rollout server {info.url} takes {info.max_length} tokens of prompt and response, this run needs "
            f"{longest}: start it with --max-model-len {longest}, or lower rollout.max_prompt_length"
        )
    return None
