"""The sections of a recipe that oreo alone has: what it samples itself, and the value it fits at the end."""

from typing import Annotated, Literal

from pydantic import Field

from rlhfctl.recipe.sections import DataSource, NonNegative, Positive, Section


class Collect(Section):
    """Offline data that the run makes itself, round by round: data.train holds prompts, `reward` judges the answers."""

    rounds: Positive = Field(1, description="how often the policy is sampled and trained on what came of it")
    samples: Positive = Field(8, description="samples of each prompt in each round")
    balance: Positive | None = Field(
        None, description="keep at most so many right and so many wrong samples of a prompt; null: all"
    )
    reference: Literal["generator", "initial"] = Field(
        "generator",
        description="what KL is measured to: the policy that wrote the round's samples, or the first round's",
    )


class ValueFit(Section):
    """A value fitted after training on fresh samples of the final policy, for search (trainers/value_fit.py)."""

    prompts: list[DataSource] = Field(
        default_factory=list,
        description="prompts with labels that are sampled; default: data.train, where collect makes that prompts",
    )
    samples: Positive = Field(
        12_000, description="samples of the final policy, spread evenly over the prompts"
    )
    steps: Positive = Field(600, description="optimizer steps of the fit")
    batch_size: Positive = Field(64, description="samples per step of the fit over all ranks")
    lr: float | None = Field(
        None, gt=0, description="its peak learning rate; default: value_model.lr, else optim.lr"
    )
    head: Literal["scalar", "token_sum"] = Field(
        "token_sum",
        description="scalar: a head on the last state; token_sum: a sum over the tokens of the response",
    )
    held_out: NonNegative = Field(
        200, description="the first prompts, kept apart to choose the search's weight of log pi; 0: weight 0"
    )


class OfflineReasoning(Section):
    """The `algorithm` section of oreo."""

    level: Literal["token", "step", "response"] = Field(
        "token", description="what one action is: a token, a step of reasoning, or the whole response"
    )
    beta: float = Field(0.03, gt=0, description="strength of the KL term of the objective: V = R - beta * S")
    alpha: float = Field(
        0.01, ge=0, description="factor of the exact KL to the reference on the states of the data; 0: off"
    )
    right: float = Field(1.0, description="training reward of rows whose reward is above threshold")
    wrong: float = Field(0.0, description="training reward of all other rows")
    threshold: float = Field(0.5, description="rewards above this are right answers")
    reward_range: tuple[float, float] = Field(
        (0.0, 1.0), description="[low, high] that the rows' rewards may hold; others are refused"
    )
    step_weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None,
        min_length=1,
        description="factors of the first, second, ... step of a response in both losses, the last one of all later "
        "steps; null: all units count the same",
    )
    value_warmup_steps: NonNegative = Field(
        0, description="steps at the start that train the value model alone"
    )
    truncated: Literal["drop", "zero"] = Field(
        "drop",
        description="rows marked truncated (or finish: length): left out, or kept as wrong without a stop token",
    )
    step_delimiters: list[str] = Field(
        ["\n"], min_length=1, description="texts that end a step, where a row does not hold its steps"
    )
    reference_cache_mb: NonNegative = Field(
        1024, description="keep the frozen reference's hidden states where they fit this many MiB; 0: never"
    )
    reference_cache_dir: str | None = Field(
        None,
        description="directory that keeps those states between runs, by a hash of the weights and of each row",
    )

    @property
    def uses_steps(self) -> bool:
        """Whether it matters where a response's steps end."""
        return self.level == "step" or self.step_weights is not None
