"""Batched generation with the transformers module itself: prompts prefilled once, finished rows dropped.

B rows, P prompt tokens (right-padded), G generated tokens, K key/value heads, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhfctl.models.attention import causal_attention, sdpa
from rlhfctl.models.linear import product
from rlhfctl.models.load import backbone, head_weight
from rlhfctl.rollout.sampling import draw, uniforms
from rlhfctl.rollout.types import Request, Rollout, Sampling


class DecodeCache:
    """Keys and values of a batch: prompts at [0, P), generated tokens at [P, P + G).

    Every row writes its generated token at the same place, so a step is one slice assignment; a shorter prompt leaves
    a gap that `blocked` masks. Positions are carried by the rotation of the keys, not by their place.
    """

    def __init__(self, lengths: Tensor, prompt_width: int, room: int) -> None:
        self.prompt_width = prompt_width
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
        if window is not None and end > window:
            raise ValueError("generation past the sliding window of this model is not supported")
        allowed = None if self.allowed is None else self.allowed[..., :end]
        return sdpa(query, self.keys[layer][:, :, :end], self.values[layer][:, :, :end], scale, mask=allowed)

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) rows of the batch."""
        for store in (self.keys, self.values):
            for layer, tensor in store.items():
                # What lies past `filled` is not yet written: only the used part is copied.
                fresh = tensor.new_empty(len(rows), *tensor.shape[1:])
                fresh[:, :, : self.filled] = tensor[:, :, : self.filled].index_select(0, rows)
                store[layer] = fresh
        if self.allowed is not None:
            self.allowed = self.allowed.index_select(0, rows)


@torch.no_grad()
def generate(model: nn.Module, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
    """One response per request, in the order of the requests.

    Requests with the same prompt share one prefill; batches hold prompts of similar length within max_batch_tokens.
    """
    training = model.training
    model.eval()
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(tuple(request.prompt_ids), []).append(place)
    done: dict[int, Rollout] = {}
    batch: list[tuple[tuple[int, ...], list[int]]] = []
    rows = 0
    for prompt, places in sorted(groups.items(), key=lambda item: (len(item[0]), item[1][0])):
        width = len(prompt) + sampling.max_new_tokens
        if batch and (rows + len(places)) * width > sampling.max_batch_tokens:
            done.update(_generate_batch(model, requests, batch, sampling))
            batch, rows = [], 0
        batch.append((prompt, places))
        rows += len(places)
    if batch:
        done.update(_generate_batch(model, requests, batch, sampling))
    model.train(training)
    return [done[place] for place in range(len(requests))]


def _generate_batch(
    model: nn.Module,
    requests: Sequence[Request],
    groups: list[tuple[tuple[int, ...], list[int]]],
    sampling: Sampling,
) -> dict[int, Rollout]:
    trunk, weight = backbone(model), head_weight(model)
    device = weight.device
    width = max(len(prompt) for prompt, _ in groups)
    lengths = torch.tensor([len(prompt) for prompt, _ in groups], device=device)
    ids = torch.tensor([list(prompt) + [0] * (width - len(prompt)) for prompt, _ in groups], device=device)
    positions = torch.arange(width, device=device).expand(len(groups), -1)
    cache = DecodeCache(lengths, width, sampling.max_new_tokens)

    out = trunk(input_ids=ids, position_ids=positions, use_cache=False, layout=cache)
    hidden = out.last_hidden_state[torch.arange(len(groups), device=device), lengths - 1]  # (groups, H)
    cache.filled = width

    # From one row per prompt to one row per sample.
    places = [place for _, members in groups for place in members]
    owner = torch.tensor([g for g, (_, members) in enumerate(groups) for _ in members], device=device)
    if len(places) > len(groups):
        cache.select(owner)
    hidden, position = hidden.index_select(0, owner), lengths.index_select(0, owner)

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
        picked, picked_logprobs = draw(product(hidden, weight), uniform, temperature, sampling.top_p)
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
            going = (~ended).nonzero().squeeze(1)
            if len(going) == 0:
                break
            # Finished rows leave the batch: they cost nothing from here on.
            live, picked, position = live[going], picked[going], position[going]
            cache.select(going)
        if step + 1 == sampling.max_new_tokens:
            break
        out = trunk(input_ids=picked[:, None], position_ids=position[:, None], use_cache=False, layout=cache)
        hidden = out.last_hidden_state[:, 0]
        cache.filled += 1
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
