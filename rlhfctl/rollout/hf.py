"""Batched generation with the policy that is trained: prompts prefilled once, finished rows dropped.

The Llama and Qwen2 family decodes by rollout/decode.py, everything else with the transformers module itself.

B rows, P prompt tokens (right-padded), G generated tokens, K key/value heads, D head size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from rlhfctl.models.attention import causal_attention, sdpa
from rlhfctl.models.linear import product
from rlhfctl.models.load import backbone, head_weight
from rlhfctl.rollout.decode import FusedWeights, StaticDecoder, uncovered
from rlhfctl.rollout.sampling import draw, uniforms
from rlhfctl.rollout.types import Request, Rollout, Sampling


class Decoder(Protocol):
    """The rows of one batch. `select` leaves rows out."""

    def prefill(self, ids: Tensor) -> Tensor:
        """ids [groups, P], right-padded -> logits [B, V] of each row's first token."""
        ...

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The rows' newest tokens [B] and their positions -> logits [B, V] of the next ones."""
        ...

    def select(self, order: Tensor) -> None:
        """Row order[i] becomes row i; the rows past len(order) are no more."""
        ...


# (group of each row [B], prompt lengths [groups], P, room for generated tokens)
MakeDecoder = Callable[[Tensor, Tensor, int, int], Decoder]


class DecodeCache:
    """Keys and values of a batch: prompts at [0, P), generated tokens at [P, P + G).

    Every row writes its generated token at the same place, so a step is one slice assignment; a shorter prompt leaves
    a gap that `allowed` masks. Positions are carried by the rotation of the keys, not by their place.
    """

    def __init__(self, lengths: Tensor, prompt_width: int, room: int) -> None:
        self.prompt_width, self.lengths = prompt_width, lengths
        self.capacity = prompt_width + room
        self.filled = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        gaps = torch.arange(prompt_width, device=lengths.device)[None] >= lengths[:, None]
        self.allowed: Tensor | None = None
        if bool(gaps.any()):
            allowed = torch.ones(len(lengths), self.capacity, dtype=torch.bool, device=lengths.device)
            allowed[:, :prompt_width] = ~gaps
            self.allowed = allowed[:, None, None, :]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        rows, heads, tokens, dim = key.shape
        if layer not in self.keys:
            shape = (rows, heads, self.capacity, dim)
            self.keys[layer], self.values[layer] = key.new_empty(shape), value.new_empty(shape)
        start, end = self.filled, self.filled + tokens
        self.keys[layer][:, :, start:end] = key
        self.values[layer][:, :, start:end] = value
        if start == 0:
            # Right-padded prompts need no mask: causality keeps real tokens from the padding behind them.
            return causal_attention(query, key, value, scale, window)
        allowed = None if self.allowed is None else self.allowed[..., :end]
        if window is not None and end > window:
            near = self.near(end, window)
            allowed = near if allowed is None else allowed & near
        return sdpa(query, self.keys[layer][:, :, :end], self.values[layer][:, :, :end], scale, mask=allowed)

    def near(self, end: int, window: int) -> Tensor:
        """[rows, 1, 1, end]: the places whose positions the newest token still sees."""
        places = torch.arange(end, device=self.lengths.device)
        written = self.lengths[:, None] - self.prompt_width + places  # positions of generated tokens
        positions = torch.where(places < self.prompt_width, places, written)
        return (written[:, -1:] - positions < window)[:, None, None]

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) rows of the batch."""
        self.lengths = self.lengths.index_select(0, rows)
        for store in (self.keys, self.values):
            for layer, tensor in store.items():
                # What lies past `filled` is not yet written: only the used part is copied.
                fresh = tensor.new_empty(len(rows), *tensor.shape[1:])
                fresh[:, :, : self.filled] = tensor[:, :, : self.filled].index_select(0, rows)
                store[layer] = fresh
        if self.allowed is not None:
            self.allowed = self.allowed.index_select(0, rows)


class ModuleDecoder:
    """The module's own forward pass, token after token."""

    def __init__(self, model: nn.Module, owner: Tensor, lengths: Tensor, width: int, room: int) -> None:
        self.trunk, self.weight = backbone(model), head_weight(model)
        self.owner, self.lengths = owner, lengths
        self.cache = DecodeCache(lengths, width, room)

    def prefill(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        out = self.trunk(input_ids=ids, position_ids=positions, use_cache=False, layout=self.cache)
        hidden = out.last_hidden_state[torch.arange(len(ids), device=ids.device), self.lengths - 1]
        self.cache.filled = ids.shape[1]
        # From one row per prompt to one row per sample.
        if len(self.owner) > len(ids):
            self.cache.select(self.owner)
        return product(hidden.index_select(0, self.owner), self.weight)

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        out = self.trunk(
            input_ids=ids[:, None], position_ids=positions[:, None], use_cache=False, layout=self.cache
        )
        self.cache.filled += 1
        return product(out.last_hidden_state[:, 0], self.weight)

    def select(self, order: Tensor) -> None:
        self.cache.select(order)


def decoder_of(model: nn.Module) -> MakeDecoder:
    if uncovered(model) is None:
        return partial(StaticDecoder, FusedWeights(model))
    return partial(ModuleDecoder, model)


@torch.no_grad()
def generate(model: nn.Module, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
    """One response per request, in the order of the requests.

    Requests with the same prompt share one prefill; batches hold prompts of similar length within max_batch_tokens.
    """
    training = model.training
    model.eval()
    make, device = decoder_of(model), head_weight(model).device
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(tuple(request.prompt_ids), []).append(place)
    done: dict[int, Rollout] = {}
    batch: list[tuple[tuple[int, ...], list[int]]] = []
    rows = 0
    for prompt, places in sorted(groups.items(), key=lambda item: (len(item[0]), item[1][0])):
        width = len(prompt) + sampling.max_new_tokens
        if batch and (rows + len(places)) * width > sampling.max_batch_tokens:
            done.update(_generate_batch(make, device, requests, batch, sampling))
            batch, rows = [], 0
        batch.append((prompt, places))
        rows += len(places)
    if batch:
        done.update(_generate_batch(make, device, requests, batch, sampling))
    model.train(training)
    return [done[place] for place in range(len(requests))]


def _generate_batch(
    make: MakeDecoder,
    device: torch.device,
    requests: Sequence[Request],
    groups: list[tuple[tuple[int, ...], list[int]]],
    sampling: Sampling,
) -> dict[int, Rollout]:
    width = max(len(prompt) for prompt, _ in groups)
    lengths = torch.tensor([len(prompt) for prompt, _ in groups], device=device)
    ids = torch.tensor([list(prompt) + [0] * (width - len(prompt)) for prompt, _ in groups], device=device)
    places = [place for _, members in groups for place in members]
    owner = torch.tensor([g for g, (_, members) in enumerate(groups) for _ in members], device=device)
    decoder = make(owner, lengths, width, sampling.max_new_tokens)
    logits = decoder.prefill(ids)
    position = lengths.index_select(0, owner)

    greedy = sampling.temperature == 0.0
    temperature = 1.0 if greedy else sampling.temperature
    stream = None
    if not greedy:
        stream = torch.stack(
            [
                uniforms(sampling.seed, sampling.step, requests[p].index, sampling.max_new_tokens)
                for p in places
            ]
        ).to(device)
    stops = torch.tensor(sampling.stop_ids, device=device)
    live = torch.arange(len(places), device=device)  # which sample each row of the cache belongs to
    tokens = torch.zeros(len(places), sampling.max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(places), sampling.max_new_tokens, device=device)
    produced = torch.full((len(places),), sampling.max_new_tokens, device=device)
    delimited = torch.zeros(len(places), dtype=torch.bool, device=device)
    stopped = torch.zeros(len(places), dtype=torch.bool, device=device)

    for step in range(sampling.max_new_tokens):
        uniform = None if stream is None else stream[live, step]
        picked, picked_logprobs = draw(logits, uniform, temperature, sampling.top_p)
        tokens[live, step], logprobs[live, step] = picked, picked_logprobs
        ended = torch.isin(picked, stops)
        if sampling.delimiters is not None:
            going_on = (~ended).nonzero().squeeze(1).tolist()
            so_far = tokens[live, : step + 1].tolist()
            cut = [row for row in going_on if sampling.delimiters.end(so_far[row])]
            delimited[live[cut]] = True
            ended[cut] = True
        if bool(ended.any()):
            produced[live[ended]] = step + 1
            stopped[live[ended]] = ~delimited[live[ended]]
            order = without(ended)
            if len(order) == 0:
                break
            # Finished rows leave the batch: they cost nothing from here on.
            live, picked, position = live[order], picked[order], position[order]
            decoder.select(order)
        if step + 1 == sampling.max_new_tokens:
            break
        logits = decoder.step(picked, position)
        position = position + 1

    counts, ended_rows, cut_rows = produced.tolist(), stopped.tolist(), delimited.tolist()
    return {
        place: Rollout(
            index=requests[place].index,
            prompt_ids=requests[place].prompt_ids,
            response_ids=tokens[row, : counts[row]].tolist(),
            logprobs=logprobs[row, : counts[row]].cpu(),
            finish="stop" if ended_rows[row] else "delimiter" if cut_rows[row] else "length",
        )
        for row, place in enumerate(places)
    }


def without(ended: Tensor) -> Tensor:
    """ended [B] -> the rows that go on, each at its own place where there is still one, the others in the gaps."""
    going = (~ended).nonzero().squeeze(1)
    order = torch.arange(len(going), device=ended.device)
    order[ended[: len(going)]] = going[going >= len(going)]
    return order
