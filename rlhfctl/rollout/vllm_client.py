"""One rollout server over HTTP: token ids in, token ids and their log-probabilities out, new weights.

Every answer names the version of the weights that made it; one of other weights (a server that was started anew, or
that another run has updated) is no answer.
"""

import math
import time
from typing import Any

import httpx
import torch

from rlhfctl.errors import RunFailed
from rlhfctl.rollout.types import Request, Rollout, Sampling

LOWEST = -9999.0  # what the server writes for a log-probability that is no number


class Lost(Exception):
    """This server cannot be used any more, and why. late: it did not answer in time."""

    def __init__(self, message: str, late: bool = False) -> None:
        super().__init__(message)
        self.late = late


class Client:
    """Thread-safe. Raises Lost for whatever another server might do better, RunFailed for a request that is wrong."""

    def __init__(self, url: str, connections: int) -> None:
        self.url = url
        self._http = httpx.Client(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=connections), trust_env=False
        )

    def close(self) -> None:
        self._http.close()

    def generate(
        self, group: list[Request], sampling: Sampling, seed: int, version: str, seconds: float
    ) -> list[Rollout]:
        """A sample for each request of the group: one prompt, consecutive indices. seed: of the first; the server
        counts on from it."""
        answer = self.post(
            "/inference/v1/generate",
            {
                "token_ids": group[0].prompt_ids,
                "sampling_params": {
                    "n": len(group),
                    "max_tokens": group[0].room(sampling.max_new_tokens),
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "seed": seed,
                    "stop_token_ids": list(sampling.stop_ids),
                    "ignore_eos": True,  # the recipe's stop ids decide
                    "logprobs": 0,
                    "detokenize": False,
                },
                "cache_salt": version,  # keys and values of other weights are never reused
            },
            seconds,
        )
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(len(group))):
                raise Lost(f"{self.url} gave {len(choices)} samples of {len(group)}")
            return [
                self.rollout(request, choice, version) for request, choice in zip(group, choices, strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise Lost(f"{self.url} gave no usable samples: {type(error).__name__}: {error}") from None

    def rollout(self, request: Request, choice: dict[str, Any], version: str) -> Rollout:
        self.check_version(choice, version)
        ids = [int(token) for token in choice["token_ids"]]
        told = choice["logprobs"]["content"]
        logprobs = [float(each["logprob"]) for each in told]
        if [each["token_id"] for each in told] != ids or not ids:
            raise Lost(f"{self.url} gave log-probabilities of other tokens than it sampled")
        if not all(math.isfinite(value) and value > LOWEST for value in logprobs):
            raise Lost(f"{self.url} sampled a token of no log-probability: its weights are not finite")
        if choice["finish_reason"] not in ("stop", "length"):
            raise Lost(
                f"{self.url} ended sample {request.index} with {choice['finish_reason']}, not stop or length"
            )
        return Rollout(
            request.index, request.prompt_ids, ids, torch.tensor(logprobs), choice["finish_reason"]
        )

    def canary(self, ids: list[int], version: str, seconds: float) -> list[float]:
        """Log-probabilities of ids[1:] at temperature 1; they are computed anew, past the prefix cache."""
        params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
        answer = self.post(
            "/inference/v1/generate",
            {"token_ids": ids, "sampling_params": params, "cache_salt": version},
            seconds,
        )
        try:
            self.check_version(answer["choices"][0], version)
            told = answer["prompt_logprobs"]
            return [float(told[place][str(ids[place])]["logprob"]) for place in range(1, len(ids))]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Lost(f"{self.url} did not score the canary: {type(error).__name__}: {error}") from None

    def call(self, method: str, arguments: list[Any], seconds: float) -> None:
        """One of the worker extension's methods on all workers of the server."""
        answer = self.post("/collective_rpc", {"method": method, "args": arguments}, seconds)
        for result in answer.get("results", []):
            if result["error"]:
                raise Lost(f"{self.url}: {result['error']}")

    def set_version(self, version: str, seconds: float) -> None:
        self.post("/update_weight_version", {"new_version": version}, seconds)

    def check_version(self, choice: dict[str, Any], version: str) -> None:
        found = {span["version"] for span in choice["weight_versions"]}
        if found != {version}:
            raise Lost(
                f"{self.url} answered from other weights than this run gave it ({', '.join(sorted(found))}): it was "
                "started anew, or another run updates it"
            )

    def post(self, path: str, body: dict[str, Any], seconds: float) -> Any:
        began = time.monotonic()
        limits = httpx.Timeout(max(0.05, seconds), connect=min(max(0.05, seconds), 10.0))
        try:
            reply = self._http.post(self.url + path, json=body, timeout=limits)
            status, content = reply.status_code, reply.json() if reply.content else {}
        except httpx.TimeoutException:
            waited = time.monotonic() - began
            raise Lost(f"{self.url} did not answer within {waited:.0f} s", late=True) from None
        except httpx.HTTPError as error:
            raise Lost(f"{self.url}: {error or type(error).__name__}") from None
        except ValueError:
            raise Lost(f"{self.url}: the answer to {path} is not JSON") from None
        if status == 200:
            return content
        said = content.get("error") if isinstance(content, dict) else None
        message = said.get("message") if isinstance(said, dict) else said
        if 400 <= status < 500 and status not in (408, 429):
            raise RunFailed(f"the rollout server {self.url} refused {path} with HTTP {status}: {message}")
        raise Lost(f"{self.url}: HTTP {status}" + (f": {message}" if message else ""))
