"""What rlhfctl adds to vLLM's own worker, in the server's process: load new weights, and say what is loaded.

Named to the server by --worker-extension-cls; its methods are called by name through /collective_rpc with JSON
arguments. Weights come as safetensors or as raw bytes of known shapes: nothing is ever unpickled.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from rlhfctl.rollout import weight_broadcast, weight_files
from rlhfctl.rollout.vllm import pack_head


class SyncedWorker:
    """A base class that vLLM adds to its worker's. Each method returns {"error": ...} instead of raising, which would
    end the server."""

    model_runner: Any
    vllm_config: Any
    rank: int
    sync_group: Any = None

    def sync_info(self) -> dict[str, Any]:
        config = self.vllm_config.model_config
        return {
            "vocabulary": config.get_vocab_size(),
            "dtype": str(config.dtype).removeprefix("torch."),
            "logprobs_mode": str(config.logprobs_mode),
            "chunked_prefill": bool(self.vllm_config.scheduler_config.enable_chunked_prefill),
            "device": self.model_runner.device.type,
        }

    def sync_files(self, directory: str, tensors: int) -> dict[str, Any]:
        """Load the `tensors` weights that lie in the safetensors files of `directory`."""
        return self.sync_guarded(lambda: self.sync_load(weight_files.read(directory, tensors)))

    def sync_join(self, address: str, port: int, first: int, world: int, seconds: float) -> dict[str, Any]:
        """Become rank first + own rank of the group that weights are broadcast in; its rank 0 is the trainer."""

        def join() -> None:
            self.sync_group = weight_broadcast.Group(
                address, port, first + self.rank, world, self.model_runner.device, seconds
            )

        return self.sync_guarded(join)

    def sync_receive(self) -> dict[str, Any]:
        """Load what the trainer broadcasts now."""
        return self.sync_guarded(lambda: self.sync_load(self.sync_group.receive()))

    def sync_load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.model_runner.reload_weights(weights_iterator=counted(weights))
        config = self.vllm_config.model_config.hf_config
        if getattr(config, "tie_word_embeddings", False) and self.model_runner.device.type == "cpu":
            pack_head(self.model_runner.model)

    def sync_guarded(self, act: Callable[[], None]) -> dict[str, Any]:
        try:
            act()
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            return {"error": f"{type(error).__name__}: {said[0]}"}
        return {"error": None}


def counted(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """All of them, even where the loader stops asking: what a sender broadcasts must be taken."""
    source = iter(weights)
    try:
        yield from source
    finally:
        for _ in source:
            continue
