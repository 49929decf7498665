"""A value of a finished policy, fitted afresh on its own samples with outcome labels alone, for value-guided search.

The trunk is a copy of the policy with all layers trained, the head starts at zero: `token_sum` (models/value_model.py),
or `scalar`. Loss: binary cross-entropy of the outcome, at every prefix of the response from the empty one to the one
before the stop token, mean over all prefixes of the batch. The value is a logit of success. alpha, the weight of
log pi in the score of a search, is chosen on held-out prompts by the accuracy of a beam of width 2.

A recipe's `value_fit` section runs it after training (value_phase.py), `python -m rlhfctl.trainers.value_fit` alone
(value_command.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhfctl.data.encode import PromptRow
from rlhfctl.errors import Refused
from rlhfctl.evaluation.answers import Answer, Judge
from rlhfctl.evaluation.guided import rollout_of, value_of
from rlhfctl.evaluation.run import Answerer
from rlhfctl.models.export import merged_copy
from rlhfctl.models.load import backbone, config_of, hidden_at_predictors
from rlhfctl.models.packing import pack_reading, plan_packs
from rlhfctl.models.value_model import TokenSumHead, ValueFunction
from rlhfctl.recipe.sections import Optim
from rlhfctl.search.beam import Beam, beam_search
from rlhfctl.trainers.optimizer import Optimizer

SAMPLE_STEP = 1_000_000  # rollout steps of training and of evaluation have other random numbers
ALPHAS = (0.0, 0.1, 0.25, 0.5, 1.0)


@dataclass(slots=True)
class Row:
    """ids: prompt and response without the stop token; prompt: tokens of the prompt; right: the outcome."""

    ids: list[int]
    prompt: int
    right: bool

    @property
    def places(self) -> list[int]:
        """The last token of each prefix: from the prompt's end on."""
        return list(range(self.prompt - 1, len(self.ids)))


def rows_of(prompts: Sequence[PromptRow], answers: Sequence[Answer]) -> list[Row]:
    """answers[i] is to prompts[i % len(prompts)]. Truncated and unjudged ones are left out."""
    asked = [prompts[index % len(prompts)] for index in range(len(answers))]
    rows = [
        Row(prompt.ids + answer.ids[:-1], len(prompt.ids), answer.correct)
        for prompt, answer in zip(asked, answers, strict=True)
        if answer.correct is not None and not answer.truncated
    ]
    right = sum(row.right for row in rows)
    if right in (0, len(rows)):
        raise Refused(f"of {len(rows)} samples {right} are right: a value has nothing to tell apart")
    return rows


def fresh_value(policy: nn.Module, head: str) -> ValueFunction:
    """A value function over a copy of the policy's trunk, its head at zero."""
    trunk = merged_copy(backbone(policy))
    config = config_of(trunk)
    weight: Tensor | TokenSumHead = torch.zeros(1, config.hidden_size)
    if head == "token_sum":
        weight = TokenSumHead(config.vocab_size, config.hidden_size)
    model = ValueFunction(trunk, weight, {"link": "logistic"}).to(next(trunk.parameters()).device)
    return model.requires_grad_(True)


def optimizer_of(model: ValueFunction, lr: float, steps: int) -> Optimizer:
    return Optimizer(model.named_parameters(), Optim(lr=lr), lr, steps)


class Order:
    """Which rows make up step s: a stream of epochs, each a permutation from (seed, epoch)."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.epochs: dict[int, list[int]] = {}

    def batch(self, step: int) -> list[int]:
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._epoch(place // self.rows)[place % self.rows] for place in places]

    def _epoch(self, number: int) -> list[int]:
        if number not in self.epochs:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) & (2**63 - 1))
            self.epochs[number] = torch.randperm(self.rows, generator=generator).tolist()
        return self.epochs[number]


def prefixes(members: Sequence[int], rows: Sequence[Row]) -> int:
    return sum(len(rows[member].places) for member in members)


def train_batch(
    model: ValueFunction, members: Sequence[int], rows: Sequence[Row], total: int, budget: int
) -> float:
    """Forward and backward over this rank's members; their part of the mean over all `total` prefixes."""
    found = 0.0
    for places in plan_packs(range(len(members)), [len(rows[member].ids) for member in members], budget):
        loss = loss_of(model, [members[place] for place in places], rows) / total
        loss.backward()
        found += float(loss.detach())
    return found


def loss_of(model: ValueFunction, members: Sequence[int], rows: Sequence[Row]) -> Tensor:
    """Binary cross-entropy summed over all prefixes of the members' responses."""
    chosen = [rows[member] for member in members]
    places = [row.places for row in chosen]
    batch = pack_reading(
        range(len(chosen)), [row.ids for row in chosen], places, next(model.parameters()).device
    )
    hidden = hidden_at_predictors(model.trunk, batch)
    targets = [
        float(chosen[row].right)
        for row, count in zip(batch.rows, batch.counts, strict=True)
        for _ in range(count)
    ]
    if model.kind == "scalar":
        values = (hidden.float() @ model.scalar.t()).squeeze(-1)
    else:
        parts = []
        for row, part in zip(batch.rows, hidden.split(batch.counts), strict=True):
            taken = torch.tensor(chosen[row].ids[chosen[row].prompt :], dtype=torch.long, device=part.device)
            start = model.token_sum.start(part[:1])
            parts.append(torch.cat([start, start + model.token_sum.increments(part[:-1], taken).cumsum(0)]))
        values = torch.cat(parts)
    expected = torch.tensor(targets, device=values.device)
    return functional.binary_cross_entropy_with_logits(values, expected, reduction="sum")


def choose_alpha(
    answerer: Answerer, judge: Judge, prompts: Sequence[PromptRow], model: ValueFunction, width: int = 2
) -> tuple[float, dict[float, float]]:
    """The alpha of ALPHAS with the highest accuracy (the smallest of equal ones), and the accuracy of each."""
    ids = [prompt.ids for prompt in prompts]
    value = value_of(model, ids, answerer.encoder.stop_ids)
    found = {}
    for alpha in ALPHAS:
        sampling = answerer.sampling(False, SAMPLE_STEP * 2)
        trees = beam_search(
            answerer.engine, ids, value, Beam(width, 20, alpha), sampling, answerer.delimiters
        )
        answers = judge(prompts, [rollout_of(tree, ids) for tree in trees])
        found[alpha] = sum(bool(answer.correct) for answer in answers) / len(prompts)
    return max(found, key=lambda alpha: (found[alpha], -alpha)), found


def chosen(
    say: Callable[[str], None],
    answerer: Answerer,
    judge: Judge,
    prompts: Sequence[PromptRow],
    model: ValueFunction,
) -> tuple[float, dict[float, float]] | None:
    """As choose_alpha; None where there are no prompts, or the answers have no steps to search over: the value ranks
    whole answers then."""
    if not prompts:
        return None
    try:
        return choose_alpha(answerer, judge, prompts, model)
    except Refused as refusal:
        say(f"value fit: no alpha is chosen: {refusal.message}")
        return None


if __name__ == "__main__":
    from rlhfctl.trainers.value_command import main

    raise SystemExit(main())
