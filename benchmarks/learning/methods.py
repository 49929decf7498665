"""What each run changes in a shipped quickstart recipe.

METHODS are compared by their learning curves. DENSE are rewards of steps and tokens, held against `ppo`, which has one
reward at the end; all of theirs are recipes/quickstart/ppo.yaml, gae with a value head on the policy's trunk. The
questions, the number of samples of a step and the number of steps are the same for all. {home} stands for the directory
of a task seed.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """changes: overrides of recipes/quickstart/RECIPE.yaml. reward_model: of REWARD_MODELS, trained first."""

    changes: list[str] = field(default_factory=list)
    recipe: str = "ppo"
    reward_model: str | None = None


WITHOUT_VALUES = ["value_model=null", "algorithm.value_coef=1.0"]
DEMONSTRATED = ["data.train=[{path: {home}/data/sft.jsonl, format: prompt_response}]"]
WARM = [  # from the sft run of the same task seed, on its questions
    "warmup=null",
    "policy.from_config=null",
    "policy.tokenizer=null",
    *DEMONSTRATED,
]
SCRATCH = [  # from random weights
    "policy.path=null",
    "policy.from_config={home}/model",
    "policy.tokenizer={home}/model",
]
NO_PPO = ["algorithm.minibatches=1", "algorithm.kl_coef=0.05"]
SUPERVISED = [*WARM, *NO_PPO]
FEW = "self_training={samples: 4, keep: 4}"  # of each of 20,000 questions: the paper's 100 and 10 take 25 times as long
AS_SFT = [  # its supervised phase, as quickstart/sft
    "optim.lr=3e-3",
    "optim.schedule=cosine",
    "optim.warmup_ratio=0.03",
    "train.steps=700",
    "train.batch_size=64",
    "train.eval_every=350",
]

METHODS: dict[str, Method] = {
    "ppo": Method(),
    "grpo": Method([*WITHOUT_VALUES, "algorithm.advantage=grpo", "rollout.n=4"]),
    "rloo": Method([*WITHOUT_VALUES, "algorithm.advantage=rloo", "rollout.n=4"]),
    "reinforce_baseline": Method(
        [*WITHOUT_VALUES, "algorithm.advantage=reinforce_baseline", "rollout.n=4"],
    ),
    "reft": Method(WARM, "reft"),
    "online_st": Method([*SUPERVISED, "method=online_st"], "reft"),
    "offline_st": Method([*DEMONSTRATED, *SCRATCH, *NO_PPO, "method=offline_st", FEW, *AS_SFT], "reft"),
    "sft_long": Method([*DEMONSTRATED, *SCRATCH, "train.steps=1400", "train.eval_every=350"], "sft"),
}

# The verdict on the final digit and, with a weight, on each line; a model's steps with a weight of their own.
DIGIT = "{kind: verifier, name: chain_answer, right: 1.0, wrong: 0.1, unparsable: 0.0"
PRM = "{kind: model, path: {home}/MODEL/final, weight: 0.0, step_reward: STEP_REWARD, span_weight: "
RM = "{kind: model, path: {home}/rm/final, weight: "


# A sampled special token spells a text that a reward model of this closed vocabulary cannot read.
UNREAD = "reward.max_failures=1000"


def lines(weight: float, *more: str) -> Method:
    """weight: reward of a line that follows from the line before it."""
    sources = f"reward.sources=[{DIGIT}, span_weight: {weight}}}]"
    return Method(["reward.granularity=step", sources, *more])


def process(weight: float, step_reward: str, *more: str, model: str = "prm") -> Method:
    """weight: of a process reward model trained on step labels."""
    source = PRM.replace("MODEL", model).replace("STEP_REWARD", step_reward)
    return Method(
        ["reward.granularity=step", f"reward.sources=[{DIGIT}}}, {source}{weight}}}]", UNREAD, *more],
        reward_model=model,
    )


def implicit(coef: float, lr: float, *more: str) -> Method:
    """coef, lr: of the implicit process reward model."""
    changes = ["algorithm.advantage=prime", "rollout.n=4", "algorithm.kl_coef=0.0"]
    model = [f"implicit_prm.coef={coef}", f"implicit_prm.lr={lr}"]
    return Method([*WITHOUT_VALUES, *changes, *model, *more])


# Prompts whose samples all earn the same are replaced, as PRIME's authors do: the outcomes are then about even.
FILTERED = ["rollout.dynamic_sampling=true", "rollout.max_refills=8"]

# A line is rewarded at once, so a token may answer for what is near: about half of a reward one line later counts.
# Values that are flat along a response, as a new head's are, are nearly right then.
NEAR = ["algorithm.gamma=0.9"]

DENSE: dict[str, Method] = {
    "ppo-gamma-0.9": Method(NEAR),
    "lines-0.2": lines(0.2),
    "lines-0.4": lines(0.4),
    "lines-0.4-lambda-0.5": lines(0.4, "algorithm.gae_lambda=0.5"),
    "lines-0.4-gamma-0.9": lines(0.4, *NEAR),
    "prm-difference-0.3": process(0.3, "difference", *NEAR),
    "prm-difference-1.0": process(1.0, "difference"),
    "prm-1800-difference-0.3": process(0.3, "difference", *NEAR, model="prm-1800"),
    "prm-fast-difference-0.3": process(0.3, "difference", *NEAR, model="prm-fast"),
    "rm-0.1": Method([f"reward.sources=[{DIGIT}}}, {RM}0.1}}]", UNREAD], reward_model="rm"),
    "redistribution-0.1": Method(
        [f"reward.sources=[{DIGIT}}}, {RM}0.1}}]", UNREAD, "reward.shaping.redistribution=difference"],
        reward_model="rm",
    ),
    "rloo-filtered": Method([*METHODS["rloo"].changes, *FILTERED]),
    "prime": implicit(1.0, 1e-4, *FILTERED),
    "prime-unfiltered": implicit(1.0, 1e-4),
    "prime-strong": implicit(5.0, 3e-4),
}

STEPS = [
    "algorithm.objective=step",
    "algorithm.step_coef=0.0",
    "data.train=[{path: {home}/data/steps.jsonl, format: stepwise}]",
    "data.eval=[]",
]
REWARD_MODELS: dict[str, list[str]] = {
    "rm": [
        "data.train=[{path: {home}/data/pairs.jsonl, format: preference}, "
        "{path: {home}/data/steps.jsonl, format: stepwise}]"
    ],
    "prm": STEPS,
    "prm-1800": [*STEPS, "train.steps=1800"],
    "prm-fast": [*STEPS, "train.steps=1500", "optim.lr=3e-3"],
}
