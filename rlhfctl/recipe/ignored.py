"""Keys that a recipe sets and that its other keys make meaningless: an error, never silence.

A key at its default is never reported, so a resolved recipe, which spells out every key, reads back as it was.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhfctl.recipe.sections import Data, Reward
    from rlhfctl.recipe.tasks import OreoRecipe, PpoRecipe, ReftRecipe, RmRecipe

GROUP_ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_baseline")


def ignored_keys(recipe: "PpoRecipe") -> list[str]:
    """One sentence for each key that would change nothing."""
    algorithm, value_model = recipe.algorithm, recipe.value_model
    gae = algorithm.advantage == "gae"
    per_token = algorithm.advantage in ("gae", "reinforce")
    shared = value_model is not None and value_model.shared_trunk
    penalised = algorithm.kl_coef > 0
    # section, key, whether the run reads it, what it belongs to
    table: list[tuple[str, Any, str, bool, str]] = [
        ("algorithm", algorithm, "gae_lambda", gae, "algorithm.advantage gae"),
        ("algorithm", algorithm, "value_clip", gae, "algorithm.advantage gae"),
        ("algorithm", algorithm, "value_coef", gae and shared, "value_model.shared_trunk true"),
        (
            "algorithm",
            algorithm,
            "gamma",
            per_token or algorithm.advantage == "prime",
            "algorithm.advantage gae, reinforce or prime",
        ),
        ("algorithm", algorithm, "group_std_eps", algorithm.advantage == "grpo", "algorithm.advantage grpo"),
        ("algorithm", algorithm, "kl_in", penalised, "algorithm.kl_coef above 0"),
        ("algorithm", algorithm, "kl_estimator", penalised, "algorithm.kl_coef above 0"),
        ("algorithm", algorithm, "kl_limit", penalised, "algorithm.kl_coef above 0"),
        ("algorithm", algorithm, "kl_target", penalised, "algorithm.kl_coef above 0"),
        ("algorithm", algorithm, "kl_horizon", algorithm.kl_target is not None, "algorithm.kl_target"),
        ("algorithm", algorithm, "value_warmup_steps", gae, "algorithm.advantage gae"),
        (
            "algorithm",
            algorithm,
            "importance_cap",
            algorithm.importance_correction in ("tis", "sequence_mask"),
            "importance_correction tis or sequence_mask",
        ),
        (
            "algorithm",
            algorithm,
            "importance_bounds",
            algorithm.importance_correction in ("icepop", "sequence_mask"),
            "importance_correction icepop or sequence_mask",
        ),
        (
            "rollout",
            recipe.rollout,
            "dynamic_sampling",
            algorithm.advantage in (*GROUP_ESTIMATORS, "prime"),
            f"algorithm.advantage {', '.join(GROUP_ESTIMATORS)}, prime",
        ),
        (
            "rollout",
            recipe.rollout,
            "max_refills",
            recipe.rollout.dynamic_sampling,
            "rollout.dynamic_sampling true",
        ),
    ]
    server, served = recipe.rollout.server, recipe.rollout.engine == "vllm_server"
    owner = "rollout.engine vllm_server"
    started = f"{owner} without server.urls"
    table += [
        ("rollout.server", server, "count", served and server.urls is None, started),
        ("rollout.server", server, "urls", served, owner),
        ("rollout.server", server, "port", served and server.urls is None, started),
        ("rollout.server", server, "start_timeout", served and server.urls is None, started),
        ("rollout.server", server, "request_timeout", served, owner),
        ("rollout.server", server, "sync", served, owner),
        (
            "rollout.server",
            server,
            "sync_dir",
            served and server.sync == "files",
            f"{owner} with server.sync files",
        ),
        ("rollout.server", server, "sync_timeout", served, owner),
        (
            "rollout",
            recipe.rollout,
            "max_batch_tokens",
            not (served and server.urls),
            "engines that a run starts",
        ),
    ]
    guard = recipe.guard
    table += [
        ("guard", guard, "length_ratio", guard.length != "off", "guard.length"),
        ("guard", guard, "kl", penalised, "algorithm.kl_coef above 0"),
        (
            "guard",
            guard,
            "kl_nats",
            penalised and guard.kl != "off",
            "guard.kl, with algorithm.kl_coef above 0",
        ),
        ("guard", guard, "entropy_ratio", guard.entropy != "off", "guard.entropy"),
    ]
    if value_model is not None:
        table.append(("value_model", value_model, "lr", not shared, "value_model.shared_trunk false"))
    shaping = recipe.reward.shaping
    table += [
        ("reward.shaping", shaping, "truncated_reward", shaping.truncated == "replace", "truncated: replace"),
        (
            "reward.shaping",
            shaping,
            "overlong_factor",
            shaping.overlong_buffer > 0,
            "overlong_buffer above 0",
        ),
    ]
    found = [
        f"{section}.{key} is ignored here: it belongs to {owner}"
        for section, values, key, used, owner in table
        if not used and getattr(values, key) != type(values).model_fields[key].default
    ]
    if recipe.reference is not None and not penalised:
        found.append("reference is ignored here: it belongs to algorithm.kl_coef above 0")
    return found


def ignored_keys_of_data(data: "Data", task: str) -> list[str]:
    """As ignored_keys, of tasks that learn from no judgement, and of the sources of data.eval."""
    found = []
    if task == "ppo" and data.train_on != type(data).model_fields["train_on"].default:
        found.append("data.train_on is ignored here: it belongs to sft, oreo and reft's warm-up")
    for split, sources in (("train", data.train), ("eval", data.eval)):
        for place, source in enumerate(sources):
            where = f"data.{split}.{place}"
            if task in ("sft", "ppo", "reft") and source.step_separator != "\n":
                found.append(f"{where}.step_separator is ignored here: it belongs to rm and oreo")
            if split == "eval" and source.weight != 1.0:
                found.append(
                    f"{where}.weight is ignored here: an evaluation reads each row once, limit leaves rows out"
                )
    return found


def ignored_keys_of_reward(reward: "Reward") -> list[str]:
    """As ignored_keys, of the sources."""
    speaks = [getattr(source, "protocol", None) == "openrlhf" for source in reward.sources]
    table: list[tuple[str, Any, str, bool, str]] = [
        ("reward", reward, "match", any(speaks), "a remote source with protocol openrlhf"),
        ("reward", reward, "match_threshold", reward.match is not None, "reward.match"),
    ]
    for place, (source, openrlhf) in enumerate(zip(reward.sources, speaks, strict=True)):
        if source.kind != "remote":
            continue
        where = f"reward.sources.{place}"
        table.append((where, source, "query", openrlhf, "protocol openrlhf"))
        for key in ("template_sha256", "fingerprint", "span_weight", "step_reward"):
            table.append((where, source, key, not openrlhf, "protocol rlhfctl"))
    return [
        f"{section}.{key} is ignored here: it belongs to {owner}"
        for section, values, key, used, owner in table
        if not used and getattr(values, key) != type(values).model_fields[key].default
    ]


def ignored_keys_of_rm(recipe: "RmRecipe") -> list[str]:
    """As ignored_keys."""
    algorithm = recipe.algorithm
    pairwise = algorithm.objective == "pairwise"
    sources = [*recipe.data.train, *recipe.data.eval]
    table: list[tuple[str, Any, str, bool, str]] = [
        ("algorithm", algorithm, "margin_coef", pairwise, "algorithm.objective pairwise"),
        ("algorithm", algorithm, "center_coef", pairwise, "algorithm.objective pairwise"),
        ("algorithm", algorithm, "step_coef", algorithm.objective != "step", "objectives other than step"),
        (
            "algorithm",
            algorithm,
            "outcome_threshold",
            algorithm.objective == "outcome",
            "algorithm.objective outcome",
        ),
        ("data", recipe.data, "train_on", False, "sft"),
        ("train", recipe.train, "samples_every", False, "ppo"),
        ("train", recipe.train, "samples_per_step", False, "ppo"),
    ]
    found = [
        f"{section}.{key} is ignored here: it belongs to {owner}"
        for section, values, key, used, owner in table
        if not used and getattr(values, key) != type(values).model_fields[key].default
    ]
    if any(source.step_separator != "\n" for source in sources if not has_steps(source.format)):
        found.append(
            "data step_separator is ignored in rows without steps: it belongs to stepwise, trajectory, prm800k and "
            "math_shepherd"
        )
    return found


def ignored_keys_of_oreo(recipe: "OreoRecipe") -> list[str]:
    """As ignored_keys."""
    table: list[tuple[str, Any, str, bool, str]] = [
        (
            "algorithm",
            recipe.algorithm,
            "step_delimiters",
            recipe.algorithm.uses_steps,
            "algorithm.level step, and step_weights",
        ),
        (
            "algorithm",
            recipe.algorithm,
            "step_weights",
            recipe.algorithm.level != "response",
            "algorithm.level token and step",
        ),
        (
            "algorithm",
            recipe.algorithm,
            "reference_cache_dir",
            recipe.algorithm.reference_cache_mb > 0
            and (recipe.policy.path is not None or recipe.reference is not None),
            "reference_cache_mb above 0 and weights on disk (policy.path or reference)",
        ),
        ("train", recipe.train, "samples_every", False, "ppo"),
        ("train", recipe.train, "samples_per_step", False, "ppo"),
    ]
    if recipe.rollout is not None:
        samples = recipe.collect is not None or recipe.value_fit is not None
        table += [
            ("rollout", recipe.rollout, key, False, "ppo") for key in ("n", "dynamic_sampling", "max_refills")
        ]
        table += [
            ("rollout", recipe.rollout, key, samples, "collect and value_fit: evaluation is greedy, with hf")
            for key in ("temperature", "top_p", "engine")
        ]
    return [
        f"{section}.{key} is ignored here: it belongs to {owner}"
        for section, values, key, used, owner in table
        if not used and getattr(values, key) != type(values).model_fields[key].default
    ]


def ignored_keys_of_reft(recipe: "ReftRecipe") -> list[str]:
    """As ignored_keys: the baselines are supervised, and each has keys of its own."""
    if recipe.method == "reft":
        unused = recipe.self_training is not None
        return (
            ["self_training is ignored here: it belongs to method offline_st and online_st"] if unused else []
        )
    found = [
        f"{name}.{key}" if key else name
        for name in ("algorithm", "value_model", "implicit_prm", "guard", "reference")
        for key in changed_keys(
            getattr(recipe, name), type(recipe).model_fields[name].get_default(call_default_factory=True)
        )
    ]
    shaping = recipe.reward.shaping
    found += [f"reward.shaping.{key}" for key in changed_keys(shaping, type(shaping)())]
    found += ["reward.granularity"] if recipe.reward.granularity != "sequence" else []
    found += ["train.samples_every"] if recipe.train.samples_every else []
    found += ["rollout.dynamic_sampling"] if recipe.rollout.dynamic_sampling else []
    problems = [f"{key} is ignored here: it belongs to method reft" for key in found]
    given = set() if recipe.self_training is None else recipe.self_training.model_fields_set
    own, other = {
        "offline_st": ({"samples", "keep"}, "online_st"),
        "online_st": ({"gold_share"}, "offline_st"),
    }[recipe.method]
    for key in sorted(given - own):
        assert recipe.self_training is not None
        if getattr(recipe.self_training, key) != type(recipe.self_training).model_fields[key].default:
            problems.append(f"self_training.{key} is ignored here: it belongs to method {other}")
    if recipe.method == "offline_st" and recipe.rollout.n != 1:
        problems.append("rollout.n is ignored here: method offline_st takes self_training.samples")
    if not any(source.kind in ("verifier", "python") for source in recipe.reward.sources):
        problems.append(
            f"method {recipe.method} keeps right answers: it needs a reward source of kind verifier"
        )
    return problems


def changed_keys(given: Any, default: Any) -> list[str]:
    """The keys of a section that are not at their defaults; [""] where the whole differs."""
    if given == default:
        return []
    if given is None or default is None or type(given) is not type(default) or isinstance(given, str):
        return [""]
    return [key for key in type(given).model_fields if getattr(given, key) != getattr(default, key)]


def has_steps(format: str) -> bool:
    return format in ("auto", "stepwise", "trajectory", "prm800k", "math_shepherd")
