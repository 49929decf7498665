"""The rollout.server section: the processes of `rollout.engine: vllm_server`, started here or given by address."""

from typing import Literal

from pydantic import Field, model_validator

from rlhfctl.recipe.base import Positive, Section

LOCAL = ("localhost", "127.0.0.1", "[::1]")


class RolloutServer(Section):
    count: Positive = Field(
        1,
        description="servers that the run starts and ends; on GPUs each takes the next one after the trainer's",
    )
    urls: list[str] | None = Field(
        None, min_length=1, description="servers that run already, instead of started ones: http://HOST:PORT"
    )
    port: Positive | None = Field(
        None, le=65535, description="of the first started server, the others follow; default: free ones"
    )
    start_timeout: float = Field(600.0, gt=0, description="seconds until a started server answers")
    request_timeout: float = Field(
        600.0,
        gt=0,
        description="seconds for the samples of one prompt; a server that takes longer counts as dead",
    )
    sync: Literal["files", "broadcast"] = Field(
        "files",
        description="how weights get there: files: safetensors in a directory that both see; broadcast: a process "
        "group of the trainer and the servers (nccl on GPUs, gloo on CPUs)",
    )
    sync_dir: str | None = Field(
        None,
        description="directory of sync files; default: /dev/shm where the weights fit, else the temporary one",
    )
    sync_timeout: float = Field(
        600.0, gt=0, description="seconds for one weight sync, its check included; then the run stops"
    )

    @model_validator(mode="after")
    def keys_agree(self) -> "RolloutServer":
        for url in self.urls or []:
            if not url.startswith(("http://", "https://")):
                raise ValueError(
                    f"{url} is no address of a rollout server: it starts with http:// or https://"
                )
        if len(set(self.urls or [])) < len(self.urls or []):
            raise ValueError("rollout.server.urls names a server twice")
        away = [url for url in self.urls or [] if host(url) not in LOCAL]
        if away and self.sync == "files" and self.sync_dir is None:
            raise ValueError(
                f"rollout.server.sync files to {away[0]} needs rollout.server.sync_dir: a directory that the server "
                "sees as well"
            )
        return self


def host(url: str) -> str:
    """The host of an address, an IPv6 one in its brackets."""
    rest = url.split("://", 1)[1].split("/", 1)[0]
    return rest.rsplit(":", 1)[0] if ":" in rest.rpartition("]")[2] else rest
