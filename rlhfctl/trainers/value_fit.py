"""A value of a finished policy, fitted afresh on its own samples with outcome labels alone, for value-guided search.

`python -m rlhfctl.trainers.value_fit RUN --data PROMPTS [...]` writes RUN/value_model, or --out.

The trunk is a copy of the policy with all layers trained, the head starts at zero: `token_sum` (models/value_model.py),
or `scalar`. Loss: binary cross-entropy of the outcome, at every prefix of the response from the empty one to the one
before the stop token, mean over all prefixes of the batch. The value is a logit of success. alpha, the weight of
log pi in the score of a search, is chosen on held-out prompts by the accuracy of a beam of width 2.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhfctl.data.encode import PromptRow, encode_prompts
from rlhfctl.data.load import load_samples
from rlhfctl.errors import Refused, RlhfctlError
from rlhfctl.evaluation.answers import Judge
from rlhfctl.evaluation.guided import value_of
from rlhfctl.evaluation.run import Answerer
from rlhfctl.evaluation.settings import Settings
from rlhfctl.evaluation.subject import open_subject
from rlhfctl.models.load import backbone, config_of, hidden_at_predictors
from rlhfctl.models.packing import pack_reading
from rlhfctl.models.value_model import TokenSumHead, ValueFunction, save_value_model
from rlhfctl.recipe.sections import DataSource, Optim
from rlhfctl.rewards.build import build_sources
from rlhfctl.rollout.types import Request, Rollout
from rlhfctl.search.beam import Beam, beam_search
from rlhfctl.trainers.optimizer import Optimizer, clip_and_step

SAMPLE_STEP = 1_000_000  # rollout steps of training and of evaluation have other random numbers
ALPHAS = (0.0, 0.1, 0.25, 0.5, 1.0)
HELD_OUT = 200


@dataclass(slots=True)
class Row:
    """ids: prompt and response without the stop token; prompt: tokens of the prompt; right: the outcome."""

    ids: list[int]
    prompt: int
    right: bool


@dataclass(frozen=True)
class ValueFit:
    samples: int = 12_000
    steps: int = 600
    batch_size: int = 64
    lr: float = 1e-3
    head: str = "token_sum"
    seed: int = 0


def collect(answerer: Answerer, judge: Judge, prompts: Sequence[PromptRow], fit: ValueFit) -> list[Row]:
    """fit.samples samples at temperature 1, spread evenly over the prompts, without truncated and unjudged ones."""
    asked = [prompts[index % len(prompts)] for index in range(fit.samples)]
    sampling = answerer.sampling(False, SAMPLE_STEP + fit.seed)
    requests = [Request(index, prompt.ids) for index, prompt in enumerate(asked)]
    answers = judge(asked, answerer.engine.generate(requests, sampling))
    rows = [
        Row(prompt.ids + answer.ids[:-1], len(prompt.ids), answer.correct)
        for prompt, answer in zip(asked, answers, strict=True)
        if answer.correct is not None and not answer.truncated
    ]
    right = sum(row.right for row in rows)
    if right in (0, len(rows)):
        raise Refused(f"of {len(rows)} samples {right} are right: a value has nothing to tell apart")
    return rows


def fit_value(
    policy: nn.Module, rows: Sequence[Row], fit: ValueFit, say: Callable[[str], None]
) -> ValueFunction:
    """A value function over a copy of the policy's trunk."""
    trunk = copy.deepcopy(backbone(policy))
    config = config_of(trunk)
    head: Tensor | TokenSumHead = torch.zeros(1, config.hidden_size)
    if fit.head == "token_sum":
        head = TokenSumHead(config.vocab_size, config.hidden_size)
    device = next(trunk.parameters()).device
    model = ValueFunction(trunk, head, {"link": "logistic"}).to(device)
    model.requires_grad_(True)
    optimizer = Optimizer(model.named_parameters(), Optim(lr=fit.lr), fit.lr, fit.steps)
    ids = [row.ids for row in rows]
    places = [list(range(row.prompt - 1, len(row.ids))) for row in rows]
    order = torch.zeros(0, dtype=torch.long)
    epoch = 0
    for step in range(fit.steps):
        if len(order) < fit.batch_size:
            generator = torch.Generator().manual_seed(fit.seed * 1_000_003 + epoch)
            order, epoch = torch.cat([order, torch.randperm(len(rows), generator=generator)]), epoch + 1
        members, order = order[: fit.batch_size].tolist(), order[fit.batch_size :]
        loss = loss_of(model, members, rows, ids, places)
        loss.backward()
        clip_and_step([optimizer], 1.0)
        if not math.isfinite(float(loss.detach())):
            raise Refused(f"the value's loss is not finite at step {step + 1}: lower --lr")
        if (step + 1) % 100 == 0 or step + 1 == fit.steps:
            say(f"step {step + 1}/{fit.steps}  loss {float(loss.detach()):.3f}")
    return model.eval()


def loss_of(
    model: ValueFunction,
    members: Sequence[int],
    rows: Sequence[Row],
    ids: Sequence[list[int]],
    places: Sequence[list[int]],
) -> Tensor:
    """Mean binary cross-entropy over all prefixes of the members' responses."""
    batch = pack_reading(members, ids, places, next(model.parameters()).device)
    hidden = hidden_at_predictors(model.trunk, batch)
    targets = [
        float(rows[row].right)
        for row, count in zip(batch.rows, batch.counts, strict=True)
        for _ in range(count)
    ]
    if model.kind == "scalar":
        values = (hidden.float() @ model.scalar.t()).squeeze(-1)
    else:
        parts = []
        for row, part in zip(batch.rows, hidden.split(batch.counts), strict=True):
            taken = torch.tensor(ids[row][rows[row].prompt :], dtype=torch.long, device=part.device)
            start = model.token_sum.start(part[:1])
            parts.append(torch.cat([start, start + model.token_sum.increments(part[:-1], taken).cumsum(0)]))
        values = torch.cat(parts)
    return functional.binary_cross_entropy_with_logits(values, torch.tensor(targets, device=values.device))


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
        rollouts = [
            Rollout(
                tree.answer.prompt, ids[tree.answer.prompt], tree.answer.ids, torch.zeros(1),
                "stop" if tree.answer.finish == "stop" else "length",
            )
            for tree in trees
        ]  # fmt: skip
        found[alpha] = sum(bool(answer.correct) for answer in judge(prompts, rollouts)) / len(prompts)
    return max(found, key=lambda alpha: (found[alpha], -alpha)), found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhfctl.trainers.value_fit", description=__doc__)
    parser.add_argument("source", metavar="MODEL_OR_RUN")
    parser.add_argument(
        "--data", required=True, help="prompts with labels, none of which is evaluated on later"
    )
    parser.add_argument("--verifier", default=None)
    parser.add_argument("--out", type=Path, default=None, help="default: RUN/value_model")
    parser.add_argument("--samples", type=int, default=ValueFit.samples)
    parser.add_argument("--steps", type=int, default=ValueFit.steps)
    parser.add_argument("--lr", type=float, default=ValueFit.lr)
    parser.add_argument("--head", choices=("token_sum", "scalar"), default=ValueFit.head)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        settings = Settings(
            given.source, data=given.data, verifier=given.verifier, search="sample", seed=given.seed
        )
        subject = open_subject(settings)
        out = given.out or Path(given.source) / "value_model"
        samples = load_samples([DataSource(path=given.data)]).samples
        answerer = Answerer(subject, settings, say)
        prompts, dropped = encode_prompts(samples, answerer.encoder, answerer.longest_prompt)
        if len(prompts) <= HELD_OUT:
            raise Refused(
                f"{given.data}: {HELD_OUT} prompts are held out to choose alpha; {dropped.sentence()}"
            )
        judge = Judge(build_sources(subject.reward, answerer.encoder), answerer.encoder, answerer.delimiters)
        fit = ValueFit(given.samples, given.steps, lr=given.lr, head=given.head, seed=given.seed)
        rows = collect(answerer, judge, prompts[HELD_OUT:], fit)
        say(f"{len(rows)} samples, {sum(row.right for row in rows)} right")
        model = fit_value(answerer.policy, rows, fit, say)
        alpha, accuracies = choose_alpha(answerer, judge, prompts[:HELD_OUT], model)
        shown = ", ".join(f"{each:g}: {accuracy:.3f}" for each, accuracy in accuracies.items())
        say(f"accuracy of beam 2 on {HELD_OUT} held-out prompts by alpha: {shown}; alpha {alpha:g} is kept")
        head = model.token_sum if model.kind == "token_sum" else model.scalar
        facts = {"link": "logistic", "alpha": alpha, "samples": len(rows), "steps": fit.steps}
        save_value_model(out, model.trunk, head, subject.policy, facts)
    except RlhfctlError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
