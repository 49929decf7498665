"""vLLM in processes of its own, one or several: requests are spread over them, weights are brought to each.

A group, which is one prompt and its samples, is one request. It comes back whole from one server, or it is asked again
of another one; when none is left the rollout is given up on all ranks, and nothing of it is used.

    seed of sample i in step s = key(seed, s) + i      (a server counts on from a group's first)
"""

import copy
import itertools
import os
import secrets
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhfctl.errors import Refused, RlhfctlError, RunFailed, Unable
from rlhfctl.models.in_parts import shape_of
from rlhfctl.models.load import config_of, head_weight
from rlhfctl.models.merged import exhaust, merged_weights
from rlhfctl.models.vllm_start import cache_bytes, first_line
from rlhfctl.recipe.rollout_server import RolloutServer
from rlhfctl.rollout import ranks, server_sync, vllm_process
from rlhfctl.rollout.canary import Run, canary_ids, difference, directly, trainer_logprobs
from rlhfctl.rollout.handshake import ServerInfo, ask, mismatch
from rlhfctl.rollout.parallel import in_parallel
from rlhfctl.rollout.sampling import stream_key
from rlhfctl.rollout.types import EngineLost, Request, Rollout, Sampling, refuse_too_long
from rlhfctl.rollout.vllm_client import Client, Lost

Say = Callable[[str], None]
IN_FLIGHT = 64  # requests of one rank at one server
ASK_SECONDS = 10.0


class VllmServerEngine:
    """max_length: longest prompt and response together; cache_tokens: of a started server, room for so many tokens of
    keys and values; logs: where started servers write theirs, None: a temporary directory.

    Rank 0 starts the servers and brings them their weights; every rank asks all of them. Raises Unable, Refused.
    """

    def __init__(
        self,
        spec: RolloutServer,
        policy: nn.Module,
        max_length: int,
        cache_tokens: int,
        trust_remote_code: bool,
        logs: Path | None,
        say: Say,
    ) -> None:
        weight = head_weight(policy)
        self.spec, self.say = spec, say
        self.max_length = max_length
        self.canary = canary_ids(shape_of(weight)[0])
        self.started: list[vllm_process.Started] = []
        self.syncs = itertools.count()
        length = max(max_length, len(self.canary) + 1)

        def open_servers() -> tuple[str, list[ServerInfo]]:
            if spec.urls is None:
                self.started = start(
                    spec, policy, length, cache_tokens, trust_remote_code, logs or self.scratch()
                )
            urls = spec.urls or [server.url for server in self.started]
            infos = [ask(url.rstrip("/"), ASK_SECONDS) for url in urls]
            for info in infos:
                refuse_other(info, weight, length)
            return secrets.token_hex(4), infos

        self.run, self.infos = ranks.from_rank_zero(open_servers)
        self.stop = weakref.finalize(self, stop_all, self.started)
        self.broadcaster = server_sync.Broadcaster(self.infos, weight.device)
        self.clients = [Client(info.url, IN_FLIGHT) for info in self.infos]
        self.lost: dict[str, str] = {}  # url -> why
        self.version = ""

    def scratch(self) -> Path:
        """A directory that goes when this object does."""
        self.directory = tempfile.TemporaryDirectory(prefix="rlhfctl-rollout-")
        return Path(self.directory.name)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        failed: RlhfctlError | None = None
        rollouts: list[Rollout] = []
        try:
            refuse_too_long(requests, sampling, self.max_length)
            rollouts = self.spread(grouped(requests, sampling.temperature == 0), sampling)
        except RlhfctlError as error:
            failed = error
        ranks.raise_together(failed)
        place = {request.index: number for number, request in enumerate(requests)}
        return sorted(rollouts, key=lambda rollout: place[rollout.index])

    def spread(self, groups: list[list[Request]], sampling: Sampling) -> list[Rollout]:
        """Every group's samples. Raises EngineLost where no server is left to ask."""
        key = stream_key(sampling.seed, sampling.step, 0) >> 1
        where = "in an evaluation" if sampling.temperature == 0 else f"at step {sampling.step + 1}"
        busy = dict.fromkeys((client.url for client in self.clients), 0)
        lock = threading.Lock()

        def sample(group: list[Request]) -> list[Rollout]:
            while True:
                with lock:
                    live = self.live()
                    if not live:
                        raise EngineLost(
                            f"stopped {where}: no rollout server is left ({'; '.join(self.lost.values())})"
                        )
                    client = min(live, key=lambda each: busy[each.url])
                    busy[client.url] += 1
                try:
                    return client.generate(
                        group, sampling, key + group[0].index, self.version, self.spec.request_timeout
                    )
                except Lost as lost:
                    with lock:
                        self.lose(client, lost, sampling.step + 1)
                finally:
                    with lock:
                        busy[client.url] -= 1

        found = in_parallel(groups, sample, IN_FLIGHT * len(self.clients))
        return [rollout for samples in found for rollout in samples]

    def live(self) -> list[Client]:
        return [client for client in self.clients if client.url not in self.lost]

    def lose(self, client: Client, lost: Lost, step: int) -> None:
        if client.url not in self.lost:
            self.lost[client.url] = str(lost)
            self.say(f"step {step}: a rollout server is lost: {lost}; {len(self.live())} left")

    def sync(self, policy: nn.Module, step: int, run: Run = directly) -> dict[str, float]:
        version = f"{self.run}.{next(self.syncs)}"
        wanted = trainer_logprobs(policy, self.canary, run)
        weights = merged_weights(policy)

        def update() -> tuple[float, dict[str, str]]:
            try:
                return self.update(policy, weights, wanted, step, version), self.lost
            finally:
                exhaust(weights)

        if ranks.rank() != 0:
            exhaust(weights)
        worst, self.lost = ranks.from_rank_zero(update)
        self.version = version
        return {"sync/canary": worst, "sync/servers": float(len(self.live()))}

    def update(
        self, policy: nn.Module, weights: server_sync.Weights, wanted: Tensor, step: int, version: str
    ) -> float:
        """On rank 0: every weight anew on every server; the largest difference of their canaries from `wanted`. A
        server that does not take them is lost. Raises RunFailed where none is left or one has other weights."""
        ends = time.monotonic() + self.spec.sync_timeout
        try:
            if self.spec.sync == "files":
                self.readmit(step)
                size = sum(shape_of(each).numel() * each.itemsize for each in policy.parameters())
                failed = server_sync.send_files(self.spec, self.live(), weights, size, ends)
            else:
                failed = self.broadcaster.send(self.clients, weights, ends)
        except RlhfctlError:
            raise
        except Exception as error:
            raise RunFailed(f"stopped at step {step}: the weight sync failed: {first_line(error)}") from error
        found: dict[str, list[float]] = {}

        def prove(client: Client) -> None:
            client.set_version(version, server_sync.left(ends))
            found[client.url] = client.canary(self.canary, version, server_sync.left(ends))

        failed |= server_sync.each([each for each in self.live() if each.url not in failed], prove)
        for client in self.live():
            if client.url in failed:
                self.lose(client, failed[client.url], step)
        if not self.live():
            why = "failed"
            if any(lost.late for lost in failed.values()):
                why = f"took longer than rollout.server.sync_timeout ({self.spec.sync_timeout:g} s)"
            raise RunFailed(
                f"stopped at step {step}: the weight sync {why}: {'; '.join(self.lost.values())}; "
                "continue with --resume"
            )
        dtype = head_weight(policy).dtype
        return max(difference(wanted, dtype, logprobs, step) for logprobs in found.values())

    def readmit(self, step: int) -> None:
        """A lost server that answers again gets the weights like any other."""
        for info in self.infos:
            if info.url in self.lost and answers_as(info):
                del self.lost[info.url]
                self.say(f"step {step}: the rollout server {info.url} is back")

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.stop()


def start(
    spec: RolloutServer,
    policy: nn.Module,
    length: int,
    cache_tokens: int,
    trust_remote_code: bool,
    logs: Path,
) -> list[vllm_process.Started]:
    weight = head_weight(policy)
    config = copy.deepcopy(config_of(policy))
    config.architectures = [type(policy).__name__]
    model = logs / "rollout_server"
    config.save_pretrained(model)
    shape = vllm_process.Shape(
        model,
        str(weight.dtype).removeprefix("torch."),
        length,
        cache_bytes(config, weight.dtype, max(cache_tokens, length)),
        trust_remote_code,
        torch.get_num_threads(),
        gpus_of_servers(spec.count) if weight.device.type == "cuda" else (),
    )
    return vllm_process.start(spec, shape, logs)


def gpus_of_servers(count: int) -> tuple[str, ...]:
    """The visible devices that the trainer's ranks on this machine leave. Raises Unable.

    DeepSpeed's launcher has another name for the number of ranks, and hides the devices that they do not have."""
    taken = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    named = os.environ.get("RLHFCTL_GPUS") or os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [str(place) for place in range(torch.cuda.device_count())]
    if len(visible) < taken + count:
        raise Unable(
            f"{count} rollout server(s) beside {taken} trainer process(es) need {taken + count} GPUs, {len(visible)} "
            "are visible: lower launch.nproc_per_node or rollout.server.count, or take rollout.engine vllm"
        )
    return tuple(visible[taken : taken + count])


def refuse_other(info: ServerInfo, weight: Tensor, length: int) -> None:
    """Raises Refused for a server whose model is not the policy's."""
    problem = mismatch(info, shape_of(weight)[0], length)
    if problem is not None:
        raise Refused(problem)
    dtype = str(weight.dtype).removeprefix("torch.")
    if info.dtype != dtype:
        raise Refused(
            f"the rollout server {info.url} computes in {info.dtype}, the policy in {dtype}: start it with "
            f"--dtype {dtype}"
        )


def stop_all(started: list[vllm_process.Started]) -> None:
    for server in started:
        server.stop()


def grouped(requests: Sequence[Request], greedy: bool) -> list[list[Request]]:
    """Runs of one prompt with consecutive indices; a server answers greedily one sample at a time."""
    groups: list[list[Request]] = []
    for request in requests:
        last = groups[-1][-1] if groups else None
        alike = last and (request.prompt_ids, request.most) == (last.prompt_ids, last.most)
        if not greedy and last and alike and request.index == last.index + 1:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def answers_as(info: ServerInfo) -> bool:
    try:
        return ask(info.url, 2.0) == info
    except RlhfctlError:
        return False
