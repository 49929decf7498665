"""`python -m rlhfctl.trainers.value_fit RUN --data PROMPTS [...]`: fit a value to a finished policy, by itself.

Writes RUN/value_model, or --out. Prompts need labels, and none of them should be evaluated on later.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from rlhfctl.data.encode import encode_prompts
from rlhfctl.data.load import load_samples
from rlhfctl.errors import Refused, RlhfctlError
from rlhfctl.evaluation.answers import Judge
from rlhfctl.evaluation.run import Answerer
from rlhfctl.evaluation.settings import Settings
from rlhfctl.evaluation.subject import open_subject
from rlhfctl.models.finite import first_non_finite
from rlhfctl.models.value_model import ValueFunction, save_value_model
from rlhfctl.recipe.oreo_sections import ValueFit
from rlhfctl.recipe.sections import DataSource
from rlhfctl.rewards.build import build_sources
from rlhfctl.rollout.types import Request
from rlhfctl.streams import write
from rlhfctl.trainers.optimizer import clip_and_step
from rlhfctl.trainers.value_fit import (
    SAMPLE_STEP,
    Order,
    Row,
    chosen,
    fresh_value,
    optimizer_of,
    prefixes,
    rows_of,
    train_batch,
)

BUDGET = 16384  # tokens of one forward pass
LR = 1e-3
DEFAULTS = ValueFit()


def fit_value(
    policy: nn.Module, rows: Sequence[Row], fit: ValueFit, seed: int, say: Callable[[str], None]
) -> ValueFunction:
    model = fresh_value(policy, fit.head)
    optimizer = optimizer_of(model, fit.lr or LR, fit.steps)
    order = Order(len(rows), fit.batch_size, seed)
    for step in range(fit.steps):
        members = order.batch(step)
        loss = train_batch(model, members, rows, prefixes(members, rows), BUDGET)
        if not math.isfinite(loss) or not math.isfinite(clip_and_step([optimizer], 1.0)[0]):
            raise Refused(f"the value's loss is not finite at step {step + 1}: lower --lr")
        if (step + 1) % 100 == 0 or step + 1 == fit.steps:
            say(f"step {step + 1}/{fit.steps}  loss {loss:.3f}")
    if (name := first_non_finite(model.named_parameters())) is not None:
        raise Refused(f"{name} of the value is NaN or infinity after its last step: lower --lr")
    return model.eval()


def run(given: argparse.Namespace, say: Callable[[str], None]) -> Path:
    """The directory that was written."""
    settings = Settings(
        given.source,
        data=given.data,
        verifier=given.verifier,
        search="sample",
        delimiters=given.delimiter,
        seed=given.seed,
    )
    settings.check()
    subject = open_subject(settings)
    out = given.out or Path(given.source) / "value_model"
    fit = ValueFit(samples=given.samples, steps=given.steps, lr=given.lr, head=given.head)
    samples = load_samples([DataSource(path=given.data)]).samples
    answerer = Answerer(subject, settings, say)
    prompts, dropped = encode_prompts(samples, answerer.encoder, answerer.longest_prompt)
    if len(prompts) <= fit.held_out:
        raise Refused(
            f"{given.data}: {fit.held_out} prompts are held out to choose alpha; {dropped.sentence()}"
        )
    held_out, asked = prompts[: fit.held_out], prompts[fit.held_out :]
    judge = Judge(build_sources(subject.reward, answerer.encoder), answerer.encoder, answerer.delimiters)
    repeated = [asked[index % len(asked)] for index in range(fit.samples)]
    requests = [Request(index, prompt.ids) for index, prompt in enumerate(repeated)]
    sampling = answerer.sampling(False, SAMPLE_STEP + given.seed)
    rows = rows_of(asked, judge(repeated, answerer.engine.generate(requests, sampling)))
    say(f"{len(rows)} samples, {sum(row.right for row in rows)} right")
    model = fit_value(answerer.policy, rows, fit, given.seed, say)
    facts: dict[str, object] = {"link": "logistic", "samples": len(rows), "steps": fit.steps}
    if (found := chosen(say, answerer, judge, held_out, model)) is not None:
        facts["alpha"] = found[0]
        say(sentence(*found, len(held_out)))
    head = model.token_sum if model.kind == "token_sum" else model.scalar
    save_value_model(out, model.trunk, head, subject.policy, facts)
    return out


def sentence(alpha: float, accuracies: dict[float, float], prompts: int) -> str:
    shown = ", ".join(f"{each:g}: {accuracy:.3f}" for each, accuracy in accuracies.items())
    return f"accuracy of beam 2 on {prompts} held-out prompts by alpha: {shown}; alpha {alpha:g} is kept"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhfctl.trainers.value_fit", description=__doc__)
    parser.add_argument("source", metavar="MODEL_OR_RUN")
    parser.add_argument("--data", required=True, help="prompts with labels")
    parser.add_argument("--verifier", default=None)
    parser.add_argument(
        "--delimiter", action="append", default=[], help="what ends a step; default: a newline"
    )
    parser.add_argument("--out", type=Path, default=None, help="default: RUN/value_model")
    parser.add_argument("--samples", type=int, default=DEFAULTS.samples)
    parser.add_argument("--steps", type=int, default=DEFAULTS.steps)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--head", choices=("token_sum", "scalar"), default=DEFAULTS.head)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)

    def say(line: str) -> None:
        write(sys.stderr, f"{line}\n")

    try:
        out = run(given, say)
    except RlhfctlError as error:
        write(sys.stderr, f"{error.message}\n")
        return error.exit_code
    print(out)
    return 0
