"""What the deepspeed section and the rest of a recipe must agree on."""

from typing import TYPE_CHECKING

from rlhfctl.recipe.deepspeed_section import DeepSpeed

if TYPE_CHECKING:
    from rlhfctl.recipe.tasks import Recipe


def problems(recipe: "Recipe") -> list[str]:
    """One sentence for each key that DeepSpeed would ignore or cannot do."""
    spec = recipe.deepspeed
    if spec is None:
        return []
    found = []
    stage = spec.zero_stage
    if spec.offload == "optimizer" and stage == 0:
        found.append(
            "deepspeed.offload optimizer needs deepspeed.zero_stage 1, 2 or 3: at 0 nothing is in parts"
        )
    if spec.offload == "all" and stage != 3:
        found.append(
            f"deepspeed.offload all puts parameters into CPU memory, which needs deepspeed.zero_stage 3, not {stage}: "
            "set zero_stage to 3, or offload to optimizer"
        )
    if stage != 3 and spec.persist_below != DeepSpeed.model_fields["persist_below"].default:
        found.append("deepspeed.persist_below is ignored here: it belongs to deepspeed.zero_stage 3")
    if stage == 0 and spec.bucket_elements != DeepSpeed.model_fields["bucket_elements"].default:
        found.append(
            "deepspeed.bucket_elements is ignored here: it belongs to deepspeed.zero_stage 1, 2 and 3"
        )
    if stage == 0 and recipe.policy.dtype == "bfloat16":
        found.append(
            "deepspeed.zero_stage 0 keeps no float32 master weights that a checkpoint could hold: with policy.dtype "
            "bfloat16 use zero_stage 1, or the plain engine (deepspeed null)"
        )
    algorithm, value_model = getattr(recipe, "algorithm", None), getattr(recipe, "value_model", None)
    shared = value_model is not None and getattr(value_model, "shared_trunk", False)
    if shared and getattr(algorithm, "value_warmup_steps", 0):
        found.append(
            "algorithm.value_warmup_steps with value_model.shared_trunk steps a part of one engine, which DeepSpeed "
            "does not do: give the value model a trunk of its own, or train without the deepspeed section"
        )
    if recipe.policy.lora is not None and getattr(value_model, "lora", None) and value_model.init == "policy":  # type: ignore[union-attr]
        found.append(
            "value_model.lora on the policy's own backbone would be two engines over one model, which DeepSpeed "
            "does not do: set value_model.init to a directory, or remove value_model.lora"
        )
    if stage == 3 and recipe.policy.quantization != "none":
        found.append(
            f"policy.quantization {recipe.policy.quantization} cannot be kept in parts: use deepspeed.zero_stage 2"
        )
    if getattr(recipe, "method", "reft") == "online_st":
        found.append("method online_st has no DeepSpeed engine: train without the deepspeed section")
    return found
