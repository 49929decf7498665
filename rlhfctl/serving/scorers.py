"""What a service scores with: a reward model's directory or a file of rules, and what the handshake says of it."""

import ast
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhfctl import __version__
from rlhfctl.base_weights import read_facts
from rlhfctl.errors import Refused, UsageError
from rlhfctl.models.hub import is_hub_id, local_directory
from rlhfctl.recipe.sections import ModelSource, PythonSource
from rlhfctl.rewards.outcome import Outcome
from rlhfctl.rewards.python_source import PythonReward
from rlhfctl.serving.batching import Scorer
from rlhfctl.serving.protocol import SCHEMA, HeadInfo, Info, TemplateInfo

FUNCTIONS = ("score", "reward_func", "reward")  # ours, OpenRLHF's, TRL's; the first that the file has
MAX_WORKERS = 4
# Told in the handshake, None where the model has none; further ones where it has them.
TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

Samples = list[dict[str, Any]]


@dataclass(slots=True)
class Served:
    """scorers: one a worker."""

    info: Info
    scorers: list[Scorer]


def open_served(source: str, engine: str = "plain", dtype: str = "auto") -> Served:
    """A directory or a hub id is a model, a .py file (or FILE.py:FUNCTION) rules. engine: what runs a model, plain or
    vllm; dtype: of its weights (auto: bfloat16 on a GPU, float32 on the CPU).

    Raises UsageError, TemplateMismatch, Refused, Unable."""
    path, found, function = source.rpartition(".py")
    is_file = bool(found) and (not function or function.startswith(":"))
    if is_hub_id(source) and not is_file:
        return open_model(str(local_directory(source)), engine, dtype, name=source)
    if Path(source).is_dir():
        return open_model(source, engine, dtype)
    for option, given, default in (("--engine", engine, "plain"), ("--dtype", dtype, "auto")):
        if given != default:
            raise UsageError(f"{option} {given} is for reward models, and {source} is no model directory")
    if is_file and Path(f"{path}.py").is_file():
        return open_rules(f"{path}.py", function.removeprefix(":"))
    raise UsageError(f"{source} is neither a model directory nor a python file with a reward function")


def open_model(path: str, engine: str = "plain", dtype: str = "auto", name: str | None = None) -> Served:
    """name: what the handshake calls it, default the directory's."""
    from transformers.utils import logging

    from rlhfctl.models.heap import keep_large_blocks
    from rlhfctl.models.load import resolve_dtype
    from rlhfctl.rewards.model import ModelReward

    logging.disable_progress_bar()
    keep_large_blocks()
    source = ModelReward(ModelSource.model_validate({"kind": "model", "path": path, "dtype": dtype}))
    if engine == "vllm":
        source.model = pooled(source.model, path)
    rm = source.bridge.rm
    model = source.model
    tokenizer = rm.tokenizer.to_str()
    template = TemplateInfo(
        sha256=rm.sha256, text=rm.template, tokens={**dict.fromkeys(TOKEN_NAMES), **rm.tokens}
    )
    max_length = source.bridge.options.max_length
    head = HeadInfo(status="loaded", shape=list(model.head.weight.reshape(1, -1).shape))
    info = Info(
        schema=SCHEMA,
        kind="model",
        name=name or Path(path).resolve().name,
        version=__version__,
        fingerprint=hash_of(
            *(rm.sha256, sorted(rm.tokens.items()), tokenizer, max_length),
            str(resolve_dtype(dtype, source.device)),
            *weight_facts(Path(path)),
        ),
        granularities=source.granularities,
        template=template,
        tokenizer_sha256=hash_of(tokenizer),
        head=head,
        mean=model.mean,
        std=model.std,
        max_length=max_length,
    )
    return Served(info, [ModelScorer(source.score)])


def pooled(plain: Any, path: str) -> Any:
    """The same reward model on vLLM. Raises Refused for one that reads both ways, which vLLM's runner does not."""
    from rlhfctl.models.pooled_reward import PooledRewardModel
    from rlhfctl.models.reward_model import RewardModel

    if not isinstance(plain, RewardModel):
        raise Refused(f"{path} is an encoder, which --engine vllm does not run: serve it without")
    return PooledRewardModel(plain, path)


def open_rules(path: str, function: str = "") -> Served:
    """One process for each worker, started here so that a file that cannot be loaded is refused at once."""
    function = function or find_function(path)
    workers = max(1, min(MAX_WORKERS, os.cpu_count() or 1))
    section = PythonSource(kind="python", path=str(Path(path).resolve()), function=function)
    rewards = [PythonReward(section) for _ in range(workers)]
    try:
        for reward in rewards:
            reward.start()
    except BaseException:
        for reward in rewards:
            reward.close()
        raise
    info = Info(
        schema=SCHEMA,
        kind="rules",
        name=f"{Path(path).stem}.{function}",
        version=__version__,
        fingerprint=hash_of(Path(path).read_text(errors="replace"), function),
        granularities=["sequence", "step", "token"],
    )
    return Served(info, [RulesScorer(reward) for reward in rewards])


def find_function(path: str) -> str:
    """Raises Refused where the file does not parse or has no function of a known name."""
    try:
        tree = ast.parse(Path(path).read_text())
    except (SyntaxError, ValueError) as error:
        raise Refused(f"{path} is not python: {error}") from None
    found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    for name in FUNCTIONS:
        if name in found:
            return name
    raise Refused(
        f"{path} has no function {', '.join(FUNCTIONS[:-1])} or {FUNCTIONS[-1]} (it has {', '.join(found) or 'none'}); "
        f"name another with {path}:FUNCTION"
    )


class ModelScorer:
    def __init__(self, score: Any) -> None:
        self._score = score

    def score(self, requests: list[Samples]) -> list[list[Outcome]]:
        return split(self._score([sample for request in requests for sample in request]), requests)

    def close(self) -> None:
        return None


class RulesScorer:
    """A batch of several clients that fails as a whole (it hung, its process ended) is scored again client by client,
    so that nobody pays for another's sample."""

    def __init__(self, reward: PythonReward) -> None:
        self.reward = reward

    def score(self, requests: list[Samples]) -> list[list[Outcome]]:
        outcomes = self.reward.score([sample for request in requests for sample in request])
        if len(requests) > 1 and all(outcome.status in ("timeout", "error") for outcome in outcomes):
            parts = [self.reward.score(request) for request in requests]
        else:
            parts = split(outcomes, requests)
        for request, part in zip(requests, parts, strict=True):
            for sample, outcome in zip(request, part, strict=True):
                if outcome.status == "ok":
                    outcome.text_sha256 = hashlib.sha256(sample["response"].encode()).hexdigest()
        return parts

    def close(self) -> None:
        self.reward.close()


def split(outcomes: list[Outcome], requests: Sequence[Samples]) -> list[list[Outcome]]:
    parts, start = [], 0
    for request in requests:
        parts.append(outcomes[start : start + len(request)])
        start += len(request)
    return parts


def weight_facts(directory: Path) -> list[Any]:
    """The configuration, and of each weights file its size and 64 pieces of it: gigabytes need not be read.

    An adapter's facts are followed by those of the checkpoint it stands on: what that holds, not where it is."""
    facts: list[Any] = []
    adapter = directory / "adapter_config.json"
    if (directory / "config.json").is_file():
        facts.append((directory / "config.json").read_text())
    if adapter.is_file():
        written, trained_on = json.loads(adapter.read_text()), read_facts(directory)
        written.pop("base_model_name_or_path", None)
        facts += [written, trained_on.get("quantization"), trained_on.get("quantization_block")]
    for file in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        size = file.stat().st_size
        pieces = hashlib.sha256()
        with file.open("rb") as opened:
            for place in range(64):
                opened.seek(size * place // 64)
                pieces.update(opened.read(1 << 16))
        facts.append([file.name, size, pieces.hexdigest()])
    if adapter.is_file():
        from rlhfctl.models.adapter_base import base_of

        facts += weight_facts(Path(base_of(directory)))
    return facts


def hash_of(*parts: Any) -> str:
    """sha256 over strings and JSON values; one string alone is hashed as it is."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return hashlib.sha256(parts[0].encode()).hexdigest()
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
