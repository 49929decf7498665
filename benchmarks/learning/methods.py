"""What each method changes in recipes/quickstart/ppo.yaml.

The reward, the data, the number of samples of a step and the number of steps are the same for all; the recipe's own
settings are gae with a value head on the policy's trunk.
"""

WITHOUT_VALUES = ["value_model=null", "algorithm.value_coef=1.0"]

METHODS: dict[str, list[str]] = {
    "ppo": [],
    "grpo": [*WITHOUT_VALUES, "algorithm.advantage=grpo", "rollout.n=4"],
    "rloo": [*WITHOUT_VALUES, "algorithm.advantage=rloo", "rollout.n=4"],
    "reinforce_baseline": [
        *WITHOUT_VALUES,
        "algorithm.advantage=reinforce_baseline",
        "rollout.n=4",
    ],
}
