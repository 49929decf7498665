"""A value model on disk: V of the state after a token, for search and for reading values beside answers.

A directory holds the backbone in Hugging Face layout, value_head.safetensors, the tokenizer, and in config.json
`value_model: {"head": ..., ...}`. Two heads (h_j: last hidden state at token j, a_j: the token itself):

scalar      V after token j = w . h_j                                 weight `score.weight` [1, H]
token_sum   V after token j = b . h_p + sum over p < i <= j of (W h_{i-1})[a_i], p: the last prompt token
                                                                      `prompt.weight` [1, H], `token.weight` [V, H]
The scalar head is what `oreo` trains; it lies where models/value_head.py looks, so a value model also starts another.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhfctl.checkpoint_files import HEAD_FILE
from rlhfctl.errors import Refused
from rlhfctl.models.export import copy_tokenizer, save_portable
from rlhfctl.models.load import config_of, hidden_at_predictors, load_trunk
from rlhfctl.models.packing import Pack, pack_reading, plan_packs
from rlhfctl.models.value_head import checked_head, read_config, read_head
from rlhfctl.recipe.sections import Policy

HEADS = ("scalar", "token_sum")


class TokenSumHead(nn.Module):
    """prompt: b [1, H], token: W [V, H]; both float32, at zero."""

    def __init__(self, vocabulary: int, hidden_size: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(1, hidden_size))
        self.token = nn.Parameter(torch.zeros(vocabulary, hidden_size))

    def start(self, hidden: Tensor) -> Tensor:
        """V [N] before the first response token, from the hidden states [N, H] of the last prompt tokens."""
        return (hidden.float() @ self.prompt.t()).squeeze(-1)

    def increments(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """What the tokens `targets` [N] add, from the hidden states [N, H] that predict them."""
        return torch.linalg.vecdot(hidden.float(), self.token[targets])


class ValueFunction(nn.Module):
    """kind: scalar (head [1, H]) | token_sum (a TokenSumHead)."""

    def __init__(self, trunk: nn.Module, head: Tensor | TokenSumHead, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.trunk = trunk
        self.kind = "token_sum" if isinstance(head, TokenSumHead) else "scalar"
        self.facts = dict(facts)
        if isinstance(head, TokenSumHead):
            self.token_sum = head
        else:
            self.scalar = nn.Parameter(head.float())

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(config_of(self.trunk).vocab_size)

    @torch.no_grad()
    def at(
        self,
        rows: Sequence[list[int]],
        places: Sequence[Sequence[int]],
        budget: int,
        prompts: Sequence[int] | None = None,
    ) -> list[list[float]]:
        """V of the state after the token at each place, packed under `budget` tokens a forward pass.

        rows: token ids, prompt first; places: ascending indices into each row; prompts: the number of prompt tokens of
        each row, which the token_sum head needs (no place may lie before the last prompt token).
        """
        lengths = [len(row) for row in rows]
        found: list[list[float]] = [[] for _ in rows]
        if self.kind == "token_sum" and prompts is None:
            raise ValueError("a token_sum value model needs the number of prompt tokens of each row")
        for members in plan_packs(range(len(rows)), lengths, budget):
            if prompts is None or self.kind == "scalar":
                values = self._scalar_at(pack_reading(members, rows, places, self._device()))
            else:
                values = self._sums_at(members, rows, places, prompts)
            for row, part in zip(
                members, values.split([len(places[member]) for member in members]), strict=True
            ):
                found[row] = part.tolist()
        return found

    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _scalar_at(self, batch: Pack) -> Tensor:
        hidden = hidden_at_predictors(self.trunk, batch)
        return (hidden.float() @ self.scalar.t()).squeeze(-1)

    def _sums_at(
        self,
        members: Sequence[int],
        rows: Sequence[list[int]],
        places: Sequence[Sequence[int]],
        prompts: Sequence[int],
    ) -> Tensor:
        if any(places[row] and places[row][0] < prompts[row] - 1 for row in members):
            raise ValueError("a token_sum value model says nothing of states inside the prompt")
        reads = [
            range(prompt - 1, place[-1] + 1) if place else range(0)
            for prompt, place in zip(prompts, places, strict=True)
        ]
        batch = pack_reading(members, rows, [list(read) for read in reads], self._device())
        hidden = hidden_at_predictors(self.trunk, batch)
        values = []
        for row, part in zip(members, hidden.split(batch.counts), strict=True):
            if not places[row]:
                continue
            tokens = rows[row][prompts[row] : places[row][-1] + 1]
            taken = torch.tensor(tokens, dtype=torch.long, device=part.device)  # none of an empty answer
            start = self.token_sum.start(part[:1])
            sums = torch.cat([start, start + self.token_sum.increments(part[:-1], taken).cumsum(0)])
            values.append(sums[torch.tensor(places[row], device=part.device) - (prompts[row] - 1)])
        return torch.cat(values) if values else hidden.new_zeros(0)


def save_value_model(
    directory: Path,
    trunk: nn.Module,
    head: Tensor | TokenSumHead,
    policy: Policy,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the directory that load_value_model reads. head: [1, H], or a TokenSumHead; policy: whose tokenizer goes
    with it; facts: what else a reader should know, put into config.json beside the kind of the head."""
    directory.mkdir(parents=True, exist_ok=True)
    save_portable(trunk, directory)
    tensors: dict[str, Tensor]
    if isinstance(head, TokenSumHead):
        kind, tensors = "token_sum", {"prompt.weight": head.prompt, "token.weight": head.token}
    else:
        kind, tensors = "scalar", {"score.weight": head}
    written = {name: tensor.detach().float().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(written, directory / HEAD_FILE, metadata={"format": "pt"})
    path = directory / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    for key in ("attn_implementation", "_attn_implementation", "reward_model", "value_head_prefix"):
        config.pop(key, None)
    config["value_model"] = {"head": kind, **(facts or {})}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    copy_tokenizer(policy, directory)


def load_value_model(
    path: str | Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> ValueFunction:
    """Raises Refused where `path` holds no value model, an incomplete one, or a head of another size."""
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise Refused(f"{path} is not a value model: it has no config.json")
    facts = read_config(directory).get("value_model")
    if not isinstance(facts, dict) or facts.get("head") not in HEADS:
        raise Refused(
            f"{path} is not a value model: its config.json says nothing of a value head "
            f"(value_model.head: {' | '.join(HEADS)}); `rlhfctl oreo` writes one in RUN/value_model"
        )
    trunk = load_trunk(str(directory), dtype, device, trust_remote_code)
    width, vocabulary = config_of(trunk).hidden_size, config_of(trunk).vocab_size
    head: Tensor | TokenSumHead
    if facts["head"] == "scalar":
        found = read_head(directory)
        if found is None:
            raise Refused(f"the value model {path} lacks {HEAD_FILE}: its values would be random")
        head = found
        widths = {found.shape[1]}
    else:
        head, widths = _read_token_sum(directory, vocabulary)
    if widths != {width}:
        raise Refused(f"the value head of {path} is {max(widths)} wide, the model {width}")
    return ValueFunction(trunk, head, facts).to(device).eval()


def _read_token_sum(directory: Path, vocabulary: int) -> tuple[TokenSumHead, set[int]]:
    file = directory / HEAD_FILE
    tensors = load_file(file) if file.is_file() else {}
    if missing := [name for name in ("prompt.weight", "token.weight") if name not in tensors]:
        raise Refused(f"the value model {directory} lacks {missing[0]} in {HEAD_FILE}")
    prompt = checked_head(tensors["prompt.weight"].float(), f"{file}:prompt.weight")
    token = tensors["token.weight"].float()
    if token.dim() != 2 or token.shape[0] != vocabulary or not bool(torch.isfinite(token).all()):
        raise Refused(
            f"the value head {file}:token.weight has shape {list(token.shape)}: it is [{vocabulary}, hidden] "
            "and finite"
        )
    head = TokenSumHead(vocabulary, token.shape[1])
    head.prompt.data, head.token.data = prompt, token
    return head, {prompt.shape[1], token.shape[1]}


def refuse_other_vocabulary(path: str | Path, tokenizer: str | Path) -> None:
    """V reads token ids: Refused where the value model's tokenizer gives other ids than the policy's."""
    from tokenizers import Tokenizer

    files = [Path(place) / "tokenizer.json" for place in (path, tokenizer)]
    if not all(file.is_file() for file in files):
        return
    ours, theirs = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
    if ours != theirs:
        odd = sorted(set(ours.items()) ^ set(theirs.items()))[0][0]
        raise Refused(
            f"the value model {path} has another vocabulary than {tokenizer} ({len(ours)} and {len(theirs)} tokens, "
            f"first difference {odd!r}): it would read other words than the policy writes"
        )
