"""What must agree between reward.granularity, the sources that give spans, redistribution and the estimator."""

from rlhfctl.recipe.sections import ModelSource, RemoteSource, Reward

PER_TOKEN = ("gae", "reinforce")


def problems(reward: Reward, advantage: str | None) -> list[str]:
    """One sentence each. advantage: of ppo; None where scores are taken as they are (sft, oreo)."""
    found: list[str] = []
    dense, shaping = reward.granularity != "sequence", reward.shaping
    spread = shaping.redistribution != "none"
    fields = type(shaping).model_fields
    changed = [key for key, field in fields.items() if getattr(shaping, key) != field.default]
    if advantage is None:
        if dense:
            found.append("reward.granularity is ignored in an evaluation: it belongs to ppo")
        found += [f"reward.shaping.{key} is ignored here: it belongs to ppo" for key in changed]
    else:
        if (dense or spread) and advantage not in PER_TOKEN:
            key = "granularity" if dense else "shaping.redistribution"
            found.append(
                f"reward.{key} needs an advantage per token: algorithm.advantage gae or reinforce, not {advantage}"
            )
        if spread and not any(isinstance(source, ModelSource) for source in reward.sources):
            found.append(
                "reward.shaping.redistribution spreads a reward model's score over the tokens: it needs a source of "
                "kind model"
            )
        for key in () if spread else ("preserve_total", "redistribution_share"):
            if key in changed:
                found.append(f"reward.shaping.{key} is ignored here: it belongs to redistribution")
    if dense and spread:
        found.append("reward.shaping.redistribution spreads one score of the response: granularity sequence")
    if dense and not any(source.span_weight for source in reward.sources):
        found.append(
            f"reward.granularity {reward.granularity} needs a source with span_weight: none has its spans counted"
        )
    for place, source in enumerate(reward.sources):
        where = f"reward.sources.{place}"
        if source.span_weight and not dense:
            found.append(
                f"{where}.span_weight is ignored here: it belongs to reward.granularity step or token"
            )
        by_step = reward.granularity == "step" and source.span_weight
        form = source.step_reward if isinstance(source, ModelSource | RemoteSource) else "difference"
        if form != "difference" and not by_step:
            found.append(
                f"{where}.step_reward is ignored here: it belongs to granularity step and span_weight"
            )
    return found
