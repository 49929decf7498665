"""One schema per task: which sections a recipe of that task has, and what must agree between them."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlhfctl.recipe import token_rewards, zero_rules
from rlhfctl.recipe.algorithm import Algorithm
from rlhfctl.recipe.base import NAME, Seed
from rlhfctl.recipe.deepspeed_section import DeepSpeed
from rlhfctl.recipe.guard import Guard
from rlhfctl.recipe.ignored import (
    GROUP_ESTIMATORS,
    ignored_keys,
    ignored_keys_of_data,
    ignored_keys_of_oreo,
    ignored_keys_of_reft,
    ignored_keys_of_rm,
)
from rlhfctl.recipe.oreo_sections import Collect, OfflineReasoning, ValueFit
from rlhfctl.recipe.reft_sections import ReftAlgorithm, SelfTraining, Warmup
from rlhfctl.recipe.sections import (
    Data,
    ImplicitPrm,
    Launch,
    Optim,
    Policy,
    Reward,
    RewardModelling,
    Rollout,
    Section,
    Template,
    Train,
    ValueModel,
)
from rlhfctl.recipe.tracking import Tracking


class Recipe(Section):
    """What all tasks share."""

    name: str = Field(description="name of the run: runs/NAME/DATE is its default directory", pattern=NAME)
    seed: Seed = Field(17, description="the one source of randomness")
    policy: Policy = Field(description="the model that is trained")
    data: Data = Field(description="what it is trained and evaluated on")
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(description="how long, in which portions, what is kept")
    template: Template = Field(default_factory=Template)
    launch: Launch = Field(default_factory=Launch)
    tracking: Tracking = Field(default_factory=Tracking)
    deepspeed: DeepSpeed | None = Field(
        None, description="train with DeepSpeed; null: with the plain engine, everything whole on every rank"
    )

    @model_validator(mode="after")
    def deepspeed_fits(self) -> Self:
        if found := zero_rules.problems(self):
            raise ValueError("\n".join(found))
        return self

    @model_validator(mode="after")
    def data_is_read(self) -> Self:
        if found := ignored_keys_of_data(self.data, getattr(self, "task", "")):
            raise ValueError("\n".join(found))
        return self

    @model_validator(mode="after")
    def quantised_weights_are_frozen(self) -> Self:
        kind = self.policy.quantization
        if kind == "none":
            return self
        if self.policy.lora is None:
            raise ValueError(
                f"policy.quantization {kind} freezes the weights: train an adapter over them, with a section "
                "policy.lora"
            )
        values = self.values_of()
        if values is None or values.init != "policy" or values.shared_trunk or values.lora is not None:
            return self
        raise ValueError(
            f"policy.quantization {kind} freezes the weights, and the value model is a copy of them: train an adapter "
            "over them, with a section value_model.lora"
        )

    def values_of(self) -> ValueModel | None:
        """The value model that a run of this recipe trains; None where there is none."""
        return None


class SftRecipe(Recipe):
    task: Literal["sft"] = Field(description="supervised fine-tuning")
    reward: Reward | None = Field(
        None, description="evaluation only: greedy answers to data.eval are scored by it"
    )
    rollout: Rollout | None = Field(None, description="evaluation only: how those answers are generated")

    @model_validator(mode="after")
    def evaluation_is_whole(self) -> Self:
        if self.reward is not None and not self.data.eval:
            raise ValueError("reward in an sft recipe scores answers to data.eval, and data.eval is empty")
        if self.rollout is not None and self.reward is None:
            raise ValueError(
                "rollout in an sft recipe is for evaluation by a reward: add reward, or remove rollout"
            )
        problems = token_rewards.problems(self.reward, None) if self.reward is not None else []
        if problems:
            raise ValueError("\n".join(problems))
        if self.rollout is not None and self.rollout.engine != "hf":
            raise ValueError(f"rollout.engine {self.rollout.engine} belongs to ppo: sft evaluates with hf")
        return self

    def evaluation_rollout(self) -> Rollout:
        return self.rollout or Rollout()


class RmRecipe(Recipe):
    task: Literal["rm"] = Field(description="reward model from pairs, right or wrong answers, or steps")
    algorithm: RewardModelling = Field(default_factory=RewardModelling)

    # No answers are generated or rewarded here: what looks at these sections of other tasks finds none.
    reward: ClassVar[None] = None
    rollout: ClassVar[None] = None

    @model_validator(mode="after")
    def nothing_is_ignored(self) -> Self:
        ignored = ignored_keys_of_rm(self)
        if self.policy.lora is not None and self.policy.path is None:
            ignored.append(
                "policy.lora needs policy.path: an adapter on random weights has no base to belong to"
            )
        if ignored:
            raise ValueError("; ".join(ignored))
        if self.algorithm.read == "step_end" and not all(each.step_separator for each in self.data.train):
            raise ValueError(
                "data step_separator is empty: a model of steps would not find their ends where it scores"
            )
        return self


class PpoRecipe(Recipe):
    task: Literal["ppo"] = Field(description="reinforcement learning from rollouts and rewards")
    reference: str | None = Field(
        None, description="reference model directory; default: the policy as it starts"
    )
    value_model: ValueModel | None = Field(
        None, description="default with advantage gae: a copy of the policy"
    )
    reward: Reward = Field(description="what a response is worth")
    implicit_prm: ImplicitPrm | None = Field(None, description="algorithm.advantage prime: its reward model")
    rollout: Rollout = Field(default_factory=Rollout)
    algorithm: Algorithm = Field(default_factory=Algorithm)
    guard: Guard = Field(default_factory=Guard, description="when a run that goes wrong is stopped")

    @model_validator(mode="after")
    def sections_agree(self) -> Self:
        n, batch, advantage = self.rollout.n, self.train.batch_size, self.algorithm.advantage
        if batch % n:
            raise ValueError(f"rollout.n ({n}) must divide train.batch_size ({batch})")
        if batch % self.algorithm.minibatches:
            raise ValueError(
                f"algorithm.minibatches ({self.algorithm.minibatches}) must divide train.batch_size ({batch})"
            )
        if advantage in (*GROUP_ESTIMATORS, "prime") and n < 2:
            raise ValueError(
                f"algorithm.advantage {advantage} compares samples of a prompt: rollout.n must be 2 or more"
            )
        if advantage == "prime" and self.algorithm.kl_coef and self.algorithm.kl_in == "reward":
            raise ValueError("algorithm.advantage prime has no KL in its reward: kl_coef 0, or kl_in loss")
        if advantage != "prime" and self.implicit_prm is not None:
            raise ValueError(f"algorithm.advantage {advantage} uses no implicit_prm: remove it, or set prime")
        if self.reward.shaping.normalisation == "group" and n < 2:
            raise ValueError(
                "reward.shaping.normalisation group compares samples of a prompt: rollout.n must be 2 or more"
            )
        bounds = self.reward.shaping.clip
        if bounds is not None and bounds[0] >= bounds[1]:
            raise ValueError(
                "reward.shaping.clip is [low, high] with low < high: else every reward is the same"
            )
        buffer, longest = self.reward.shaping.overlong_buffer, self.rollout.max_new_tokens
        if buffer > longest:
            raise ValueError(
                f"reward.shaping.overlong_buffer ({buffer}) is longer than rollout.max_new_tokens ({longest}): the "
                "penalty would begin before the response does"
            )
        if advantage != "gae" and self.value_model is not None:
            raise ValueError(f"algorithm.advantage {advantage} uses no value model: remove value_model")
        if self.algorithm.loss == "gspo":
            if advantage not in GROUP_ESTIMATORS:
                raise ValueError(
                    f"algorithm.loss gspo moves whole responses: algorithm.advantage {advantage} tells their tokens "
                    f"apart; use one of {', '.join(GROUP_ESTIMATORS)}"
                )
            if self.algorithm.loss_mean != "sequence":
                raise ValueError(
                    "algorithm.loss gspo is a mean over responses: set algorithm.loss_mean to sequence"
                )
        steps, warmup = self.train.steps, self.algorithm.value_warmup_steps
        if steps is not None and warmup >= steps:
            raise ValueError(
                f"algorithm.value_warmup_steps ({warmup}) leaves none of train.steps ({steps}) to the policy"
            )
        if self.rollout.dynamic_sampling and steps is None:
            raise ValueError(
                "rollout.dynamic_sampling takes as many prompts as it needs: give train.steps, not train.epochs"
            )
        if self.algorithm.importance_correction != "none" and self.algorithm.old_logprobs == "sampler":
            raise ValueError(
                "algorithm.importance_correction compares the trainer with the sampler: old_logprobs cannot be sampler"
            )
        if self.rollout.engine != "hf" and self.rollout.top_p < 1:
            raise ValueError(
                f"rollout.engine {self.rollout.engine} gives log-probabilities within the nucleus, which the trainer "
                "does not compute: rollout.top_p must be 1, or rollout.engine hf"
            )
        if self.algorithm.importance_correction != "none" and self.rollout.top_p < 1:
            raise ValueError(
                "algorithm.importance_correction weighs by log-probabilities of the whole distribution, which do not "
                "know of rollout.top_p: set rollout.top_p to 1, or importance_correction to none"
            )
        ignored = ignored_keys(self) + token_rewards.problems(self.reward, self.algorithm.advantage)
        if ignored:
            raise ValueError("\n".join(ignored))  # one problem a line
        return self

    def values_of(self) -> ValueModel | None:
        return (self.value_model or ValueModel()) if self.algorithm.advantage == "gae" else None


class ReftRecipe(PpoRecipe):
    task: Literal["reft"] = Field(description="a supervised warm-up, then ppo on the same questions")  # type: ignore[assignment]
    method: Literal["reft", "offline_st", "online_st"] = Field(
        "reft",
        description="the second phase: ppo, or the paper's baselines, supervised on the policy's own right answers",
    )
    warmup: Warmup | None = Field(description="the first phase; null: policy.path is warmed up already")
    self_training: SelfTraining | None = Field(
        None, description="method offline_st and online_st: how many samples, and their weight"
    )
    value_model: ValueModel | None = Field(
        default_factory=lambda: ValueModel(shared_trunk=True),
        description="default: one head on the policy's own trunk",
    )
    algorithm: ReftAlgorithm = Field(default_factory=ReftAlgorithm)

    @model_validator(mode="after")
    def phases_agree(self) -> Self:
        if self.warmup is None and self.policy.path is None:
            raise ValueError("warmup null needs policy.path: random weights are not warmed up")
        if self.warmup is not None and self.reference is not None:
            raise ValueError("reference is the end of the warm-up: remove it, or set warmup to null")
        if self.policy.lora is not None and not self.policy.lora.merge_final and self.warmup is not None:
            raise ValueError(
                "policy.lora.merge_final false would leave an adapter of the warm-up's model: it must be true"
            )
        if ignored := ignored_keys_of_reft(self):
            raise ValueError("\n".join(ignored))
        return self


class OreoRecipe(Recipe):
    task: Literal["oreo"] = Field(description="offline reasoning optimisation from scored trajectories")
    reference: str | None = Field(
        None, description="frozen reference model directory; default: the policy as it starts"
    )
    value_model: ValueModel = Field(default_factory=ValueModel)
    algorithm: OfflineReasoning = Field(default_factory=OfflineReasoning)
    collect: Collect | None = Field(
        None, description="sample the trajectories in rounds; null: data.train holds them"
    )
    value_fit: ValueFit | None = Field(
        None, description="fit a value for search to the final policy; null: value_model is OREO's own"
    )
    reward: Reward | None = Field(
        None, description="judges answers to data.eval, and the samples of collect and value_fit"
    )
    rollout: Rollout | None = Field(None, description="how answers to those prompts are generated")

    @model_validator(mode="after")
    def sections_agree(self) -> Self:
        if problem := offline_problem(self):
            raise ValueError(problem)
        if self.value_model.shared_trunk or self.value_model.init == "reward_model":
            raise ValueError(
                "oreo trains a value model of its own: value_model.shared_trunk and init: reward_model are for ppo"
            )
        algorithm, steps = self.algorithm, self.train.steps
        if algorithm.reward_range[0] >= algorithm.reward_range[1] or algorithm.right <= algorithm.wrong:
            raise ValueError(
                "algorithm.reward_range must be [low, high], and algorithm.right above algorithm.wrong"
            )
        if steps is not None and algorithm.value_warmup_steps >= steps:
            raise ValueError(
                f"algorithm.value_warmup_steps ({algorithm.value_warmup_steps}) leaves no step for the policy: "
                f"train.steps is {steps}"
            )
        ignored = ignored_keys_of_oreo(self)
        if self.reward is not None:
            ignored += token_rewards.problems(self.reward, None)
        if ignored:
            raise ValueError("\n".join(ignored))
        return self

    def evaluation_rollout(self) -> Rollout:
        return self.rollout or Rollout()

    def values_of(self) -> ValueModel | None:
        return self.value_model


def offline_problem(recipe: OreoRecipe) -> str | None:
    """What does not fit between the sections that sample and the others."""
    collect, fit = recipe.collect, recipe.value_fit
    sampling = [name for name, section in (("collect", collect), ("value_fit", fit)) if section is not None]
    if recipe.reward is None and (recipe.data.eval or sampling):
        wants = " and ".join(sampling) or "data.eval"
        return f"{wants} of an oreo recipe needs reward: it says which answers are right"
    if recipe.reward is not None and not recipe.data.eval and not sampling:
        return "oreo evaluates answers to data.eval by reward: give both, or neither"
    if recipe.rollout is not None and recipe.reward is None:
        return "rollout in an oreo recipe is for answers that reward judges: add reward, or remove rollout"
    if fit is not None and collect is None and not fit.prompts:
        return "value_fit needs value_fit.prompts: data.train holds trajectories, no prompts to sample"
    if recipe.rollout is not None and recipe.rollout.engine == "vllm_server":
        return "rollout.engine vllm_server belongs to ppo and reft: oreo samples with hf or vllm"
    if recipe.deepspeed is not None and sampling:
        return f"{' and '.join(sampling)} of an oreo recipe samples and trains by the plain engine: remove deepspeed"
    lora = recipe.policy.lora
    if fit is not None and lora is not None and not lora.merge_final:
        return "value_fit trains all of the final policy's weights: policy.lora.merge_final must be true"
    if collect is None:
        return None
    if recipe.reference is not None and collect.reference == "generator" and collect.rounds > 1:
        return "reference is one model for all rounds: set collect.reference to initial, or remove reference"
    if lora is not None and not lora.merge_final and collect.rounds > 1:
        return "policy.lora.merge_final false would leave an adapter of an earlier round's model: it must be true"
    if collect.reference == "initial" and recipe.policy.path is None:
        return "collect.reference initial needs policy.path: random weights are nowhere to be read again"
    return None


TASKS: dict[str, type[SftRecipe] | type[RmRecipe] | type[PpoRecipe] | type[ReftRecipe] | type[OreoRecipe]] = {
    "sft": SftRecipe,
    "rm": RmRecipe,
    "ppo": PpoRecipe,
    "reft": ReftRecipe,
    "oreo": OreoRecipe,
}
AnyRecipe = SftRecipe | RmRecipe | PpoRecipe | ReftRecipe | OreoRecipe
