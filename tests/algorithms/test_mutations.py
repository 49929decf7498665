"""The hand-number tests are able to fail: each file of algorithms/, broken in one place, fails at least one of them.

A mutation is a text of the file and what replaces it. The text must occur exactly once, so a refactoring cannot skip a
mutation in silence. The tests that are run against the broken module are those of test_FILE.py whose only argument is
`m`, the module under test.
"""

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from rlhfctl import algorithms

HERE = Path(__file__).resolve().parent
SOURCES = Path(algorithms.__file__).resolve().parent

MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "masking": [
        ("1.0 / _positive(total_tokens", "1.0 / lengths.sum() + 0 * _positive(total_tokens"),  # local, not global
        ('"total_samples") * lengths)', '"total_samples") * lengths.mean())'),
        ('"total_samples") * lengths)', '"total_samples"))'),
        ('_positive(max_new_tokens, "max_new_tokens")', "lengths.max()"),
        ('_positive(total_samples, "total_samples") * lengths', "len(lengths) * lengths"),
        ('_positive(total_samples, "total_samples") * _positive', "len(lengths) * _positive"),
        ("return torch.where(some, weights, 0.0)", "return weights"),
        ("some = lengths > 0", "some = lengths > 1"),
        ("torch.repeat_interleave(per_sample, lengths", "per_sample.repeat(int(lengths[0])) if 1 else (lengths"),
        ("[None] < lengths[:, None]", "[None] <= lengths[:, None]"),
        ("((rewards != 0) & ~mask)", "((rewards > 0) & ~mask)"),
        ("((rewards != 0) & ~mask)", "((rewards != 0) & mask)"),
        ("if value <= 0:", "if value < 0:"),
    ],
    "sft": [
        ("nll = -torch.where", "nll = torch.where"),
        ("torch.where(taken, logprobs, 0.0)", "logprobs"),
        ("(weights * nll).sum()", "(weights * nll).mean()"),
        ("(weights * nll).sum()", "nll.sum()"),
        ("nll.detach().sum()", "nll.sum()"),
        ("nll.detach().sum()", "(weights * nll).detach().sum()"),
        ("taken = weights != 0", "taken = weights > -1"),
    ],
    "oreo": [
        (".flip(1).cumsum(1).flip(1)", ".cumsum(1)"),
        ("torch.where(mask, x, 0.0)", "x"),
        ("return first & mask", "return first"),
        ("units[:, 1:] != units[:, :-1]) | ~mask[:, :-1]", "units[:, 1:] != units[:, :-1])"),
        ('unit_starts(units_of("step" if level == "step" else "token"', "unit_starts(units_of(level"),
        ('"step" if level == "step" else "token"', '"token"'),
        ("returns.detach() - beta * suffix", "returns.detach() + beta * suffix"),
        ("returns.detach() - beta * suffix", "returns - beta * suffix"),
        ("beta * suffix_sums(log_ratios.detach(), mask)\n", "beta * suffix_sums(log_ratios, mask)\n"),
        ("torch.where(starts, values - targets.detach(), 0.0)", "values - targets.detach()"),
        ("values - targets.detach()", "values - targets"),
        ("* error.square()", "* error.abs()"),
        ("* error.square()", "* 0.5 * error.square()"),
        ("(sums - sums.detach())", "(sums - sums).detach()"),
        ("(sums - sums.detach())", "(sums.detach() - sums)"),
        ("reached = suffix_sums(log_ratios.detach(), mask)", "reached = suffix_sums(log_ratios, mask)"),
        ("values.detach() - returns.detach() + beta", "values - returns.detach() + beta"),
        ("returns.detach() + beta * reached", "returns.detach() - beta * reached"),
        ("returns.detach() + beta * reached", "returns.detach() + reached"),
        ("* residual.square()", "* residual.abs()"),
        ("torch.where(starts, values.detach()", "torch.where(mask, values.detach()"),
        ("torch.where(mask, per_token, 0.0)", "per_token"),
        ("_per_unit(mask, weights)", "_per_unit(mask[:, :1], weights)"),
        ("(weights / starts.sum(1).clamp(min=1))", "(weights / starts.shape[1])"),
        ("starts.sum(1).clamp(min=1)", "starts.sum(1)"),
        ("torch.where(starts, factors, 0.0)", "factors"),
        ("/ shares.sum(1, keepdim=True)", "/ starts.sum(1, keepdim=True)"),
        ("steps.clamp(max=len(table) - 1)", "steps % len(table)"),
        ("_per_unit(starts, weights, factors) * error", "_per_unit(starts, weights) * error"),
        ("_per_unit(starts, weights, factors) * residual", "_per_unit(starts, weights) * residual"),
        ("taken = torch.where(mask, log_ratios, 0.0)", "taken = log_ratios"),
    ],
    "kl": [
        ("d = logprobs - ref_logprobs", "d = ref_logprobs - logprobs"),
        ("0.5 * d.square()", "d.square()"),
        ("0.5 * d.square()", "0.5 * d.abs()"),
        ("torch.expm1(-d) + d", "torch.expm1(d) - d"),
        ("torch.expm1(-d) + d", "torch.expm1(-d) - d"),
        ("torch.expm1(-d) + d", "torch.exp(-d) - 1 + d"),
        ("torch.expm1(-d) + d", "(torch.expm1(-d) + d).clamp(-10, 10)"),
        ("        return d\n", "        return d.clamp(-10, 10)\n"),
        ("LARGE = 20.0", "LARGE = 19.0"),
        (".abs() > LARGE", " > LARGE"),
        (".abs() > LARGE", ".abs() >= LARGE"),
        ("if mask is not None:", "if False:"),
        ("logprobs.detach(), ref_logprobs.detach()", "logprobs, ref_logprobs"),
        ("torch.where(taken, ref_logprobs.detach(), 0.0)", "torch.where(taken, ref_logprobs, 0.0)"),
        ("logprobs = torch.where(taken, logprobs, 0.0)", "logprobs = logprobs"),
        ("(weights * kl(logprobs", "(kl(logprobs"),
        ("kl_sums(logprobs, ref_logprobs, taken)", "kl_sums(logprobs, ref_logprobs)"),
    ],
    "gspo": [
        ("logprobs - old_logprobs.detach()", "old_logprobs.detach() - logprobs"),
        ("old_logprobs.detach()", "old_logprobs"),
        ("torch.where(taken, logprobs - old_logprobs.detach(), 0.0)", "logprobs - old_logprobs.detach()"),
        ("(clip_low, clip_high, dual_clip)", "(clip_high, clip_low, dual_clip)"),
        ("(clip_low, clip_high, dual_clip)", "(clip_low, clip_high, None)"),
        ("loss_of_ratio(ratio, log_ratio", "loss_of_ratio(log_ratio.exp(), log_ratio"),
        ("weights, clip, importance)", "weights, clip, None)"),
        ("weights, clip, importance)", "taken.to(ratio.dtype), clip, importance)"),
        ("index_add(0, owner, taken.to(log_ratio.dtype))", "index_add(0, owner, torch.ones_like(log_ratio))"),
        ("/ tokens.clamp(min=1)", "/ 1.0"),
        ("mean.exp()[owner]", "mean.exp().detach()[owner]"),
        ("mean.exp()[owner]", "(1 + mean)[owner]"),
        ("(tokens > 0).sum()", "(tokens > 1).sum()"),
        ("clipped.to(empty.dtype)) > 0", "clipped.to(empty.dtype)) > 1"),
    ],
    "adaptive_kl": [
        ("(kl - target) / target", "(target - kl) / target"),
        ("(kl - target) / target", "(kl - target)"),
        ("(kl - target) / target, -LIMIT), LIMIT", "(kl - target) / target, -9), LIMIT"),
        ("(kl - target) / target, -LIMIT), LIMIT", "(kl - target) / target, -LIMIT), 9"),
        ("LIMIT = 0.2", "LIMIT = 0.21"),
        ("1.0 + error * samples / horizon", "1.0 - error * samples / horizon"),
        ("1.0 + error * samples / horizon", "1.0 + error * horizon / samples"),
        ("1.0 + error * samples / horizon", "1.0 + error"),
        ("return max(coef * (1.0 + error * samples / horizon), 0.0)",
         "return coef * (1.0 + error * samples / horizon)"),
        ("return max(coef *", "return max(1.0 *"),
        ("if not math.isfinite(kl):", "if math.isnan(kl):"),
        ("if not math.isfinite(kl):", "if False:"),
    ],
    "gae": [
        ("+ gamma * next_value - values", "- gamma * next_value - values"),
        ("+ gamma * next_value - values", "+ next_value - values"),
        ("+ gamma * next_value - values", "+ gamma * next_value + values"),
        ("delta + gamma * lam * next_advantage", "delta + lam * next_advantage"),
        ("delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
        ("delta + gamma * lam * next_advantage", "delta"),
        ("range(values.shape[1] - 1, -1, -1)", "range(values.shape[1] - 1, 0, -1)"),
        ("range(values.shape[1] - 1, -1, -1)", "range(values.shape[1] - 2, -1, -1)"),
        ("range(values.shape[1] - 1, -1, -1)", "range(values.shape[1])"),
        ("torch.where(here, advantage, next_advantage)", "torch.where(here, advantage, 0.0)"),
        ("torch.where(here, advantage, next_advantage)", "advantage"),
        ("torch.where(here, values[:, t], next_value)", "torch.where(here, values[:, t], 0.0)"),
        ("torch.where(here, values[:, t], next_value)", "values[:, t]"),
        ("torch.where(here, advantage, 0.0)", "advantage"),
        ("torch.where(mask, advantages + values, 0.0)", "advantages + values"),
        ("torch.where(mask, advantages + values, 0.0)", "torch.where(mask, advantages - values, 0.0)"),
        ("    refuse_outside(rewards, mask)\n", ""),
        ('/ count - mean**2, 0.0)', '/ max(count - 1, 1.0) - mean**2, 0.0)'),
        ('/ count - mean**2, 0.0)', '/ count, 0.0)'),
        ("(variance + WHITEN_EPS) ** -0.5", "1 / (variance**0.5 + WHITEN_EPS)"),
        ("(variance + WHITEN_EPS) ** -0.5", "(variance + WHITEN_EPS) ** -1"),
        ("WHITEN_EPS = 1e-8", "WHITEN_EPS = 1e-5"),
        ("(x.double() - mean) * scale", "x.double() * scale"),
        ("chosen = x[mask.bool()].double()", "chosen = x.nan_to_num().double()"),
        ("sums = sums or whiten_sums(x, mask)", "sums = whiten_sums(x, mask)"),
        ("torch.where(mask.bool(), (x.double()", "torch.where(~x.isnan(), (x.double()"),
        ("max(sums[\"count\"], 1.0)", "sums[\"count\"]"),
        (".to(x.dtype)", ""),
    ],
    "advantages": [
        ("groups - total / count", "groups + total / count"),
        ("total / count.clamp(min=1)", "total / n"),
        ("(total - groups) / others", "total / others"),
        ("(total - groups) / others", "(total - groups) / count"),
        ("advantages = groups - (total", "advantages = groups + (total"),
        ("others = (count - 1)", "others = count"),
        (".square().sum(1, keepdim=True) / others", ".square().sum(1, keepdim=True) / count"),
        (".square().sum(1, keepdim=True) / others", ".abs().sum(1, keepdim=True) / others"),
        ("torch.where(valid, centred, 0.0)", "centred"),
        ("(variance.sqrt() + std_eps)", "(variance + std_eps).sqrt()"),
        ("(variance.sqrt() + std_eps)", "variance.sqrt()"),
        ("torch.where(valid, scores.view(-1, n), 0.0)", "scores.view(-1, n).nan_to_num(1.0)"),
        ("torch.where(valid, groups, torch.inf)", "groups"),
        ("torch.where(valid, groups, -torch.inf)", "groups"),
        ("flat = lowest >= highest", "flat = lowest > highest"),
        ("valid & ~flat[:, None]", "valid"),
        ("valid & ~flat[:, None]", "~flat[:, None]"),
        ("scores.view(-1, n), 0.0)", "scores.view(n, -1).t(), 0.0)"),
        ("if n < 2 or", "if"),
        ("if not bool(torch.isfinite(scores[valid]).all()):", "if False:"),
        ("rewards[:, t] + gamma * following", "rewards[:, t] + following"),
        ("rewards[:, t] + gamma * following", "rewards[:, t] - gamma * following"),
        ("range(rewards.shape[1] - 1, -1, -1)", "range(rewards.shape[1] - 1, 0, -1)"),
        ("torch.where(here, current, following)", "current"),
        ("torch.where(here, current, following)", "torch.where(here, current, 0.0)"),
        ("torch.where(here, current, 0.0)", "current"),
        ("    refuse_outside(rewards, mask)\n", ""),
    ],
    "ppo": [
        ("logprobs - old_logprobs.detach()", "old_logprobs.detach() - logprobs"),
        ("old_logprobs.detach()", "old_logprobs"),
        ("advantages.detach()", "advantages"),
        ("importance.detach()", "importance"),
        ("torch.where(weights != 0, logprobs - old_logprobs.detach(), 0.0)", "logprobs - old_logprobs.detach()"),
        ("torch.where(taken, advantages.detach(), 0.0)", "advantages.detach()"),
        ("torch.where(taken, importance.detach(), 0.0)", "importance.detach()"),
        ("loss_of_ratio(log_ratio.exp()", "loss_of_ratio(1 + log_ratio"),
        ("1.0 - clip_low, 1.0 + clip_high", "1.0 - clip_low, 1.0 + clip_low"),
        ("1.0 - clip_low, 1.0 + clip_high", "1.0 - clip_high, 1.0 + clip_high"),
        ("1.0 - clip_low, 1.0 + clip_high", "1.0 - clip_high, 1.0 + clip_low"),
        ("surrogate = torch.min(unclipped, clipped)", "surrogate = torch.max(unclipped, clipped)"),
        ("surrogate = torch.min(unclipped, clipped)", "surrogate = unclipped"),
        ("surrogate = torch.min(unclipped, clipped)", "surrogate = clipped"),
        ("advantages < 0, torch.max", "advantages > 0, torch.max"),
        ("torch.where(advantages < 0, torch.max(surrogate", "torch.where(advantages < 9, torch.max(surrogate"),
        ("torch.max(surrogate, dual_clip * advantages)", "torch.min(surrogate, dual_clip * advantages)"),
        ("torch.max(surrogate, dual_clip * advantages)", "torch.max(surrogate, dual_clip + advantages)"),
        ("return Surrogate(bounded", "return Surrogate(surrogate"),
        ("per_token = -surrogate", "per_token = surrogate"),
        ("if importance is not None:", "if False:"),
        ("(weights * per_token).sum()", "(weights * per_token).mean()"),
        ("(weights * per_token).sum()", "per_token.mean()"),
        ("clipped < unclipped,", "clipped > unclipped,"),
        ("clipped < unclipped,", "clipped != unclipped,"),
        ("bounded > surrogate)", "bounded >= surrogate)"),
        ("surrogate.clipped.sum()", "surrogate.dual_clipped.sum()"),
        ("(ratio * taken)", "(ratio)"),
        ("torch.expm1(log_ratio) - log_ratio", "torch.expm1(-log_ratio) + log_ratio"),
        ("with torch.no_grad():", "if True:"),
    ],
    "value": [
        ("torch.where(taken, values, 0.0)", "values"),
        ("torch.where(taken, old_values.detach(), 0.0)", "old_values.detach()"),
        ("torch.where(taken, returns.detach(), 0.0)", "returns.detach()"),
        ("old_values.detach()", "old_values"),
        ("returns.detach()", "returns"),
        ("torch.max(plain,", "torch.min(plain,"),
        ("worst = torch.max(plain, (near - returns).square())", "worst = (near - returns).square()"),
        ("if clip is not None:", "if False:"),
        ("old_values + (values - old_values)", "returns + (values - old_values)"),
        ("old_values + (values - old_values)", "old_values - (values - old_values)"),
        (".clamp(-clip, clip)", ".clamp(max=clip)"),
        (".clamp(-clip, clip)", ".clamp(min=-clip)"),
        (".clamp(-clip, clip)", ".clamp(-2 * clip, 2 * clip)"),
        ("return 0.5 * (weights", "return (weights"),
        ("(weights * worst).sum()", "(weights * worst).mean()"),
        ("(weights * worst).sum()", "worst.sum()"),
        ("plain = (values - returns).square()", "plain = (values - returns).abs()"),
        ("(worst > plain)", "(worst >= plain)"),
        ("with torch.no_grad():", "if True:"),
        ("target = returns[chosen].double()", "target = returns.double()"),
        ("- (sums[\"errors\"] / count) ** 2", ""),
        ("- (sums[\"returns\"] / count) ** 2", ""),
        ("return 1.0 - max(left, 0.0) / spread", "return max(left, 0.0) / spread"),
        ("if spread <= 1e-12", "if spread < 0 * 1e-12"),
        ("max(sums[\"count\"], 1.0)", "sums[\"count\"]"),
    ],
    "reward_model": [
        ("softplus(torch.where(taken, margins, 0.0) - gap)", "softplus(gap - torch.where(taken, margins, 0.0))"),
        ("torch.where(taken, margins, 0.0) - gap", "-torch.where(taken, margins, 0.0) - gap"),
        ("torch.where(taken, margins, 0.0) - gap", "-gap"),
        ("torch.where(taken, margins, 0.0) - gap", "margins - gap"),
        ("gap = chosen - rejected", "gap = rejected - chosen"),
        ("gap = chosen - rejected", "gap = chosen - rejected - margins.nan_to_num()"),
        ("from torch.nn.functional import softplus", "softplus = lambda x: torch.log1p(torch.exp(x))"),
        ("chosen, rejected = torch.where(taken, chosen, 0.0), torch.where(taken, rejected, 0.0)",
         "chosen, rejected = torch.where(taken, chosen, 0.0), rejected"),
        ("chosen, rejected = torch.where(taken, chosen, 0.0), torch.where(taken, rejected, 0.0)",
         "chosen, rejected = chosen, torch.where(taken, rejected, 0.0)"),
        ("(chosen + rejected).square()", "(chosen - rejected).square()"),
        ("(chosen + rejected).square()", "(chosen + rejected).abs()"),
        ("center_coef * (chosen", "(chosen"),
        ("if center_coef:", "if False:"),
        ("0.5 * (gap == 0)", "1.0 * (gap == 0)"),
        ("(gap > 0).double()", "(gap < 0).double()"),
        ("(correct * taken).sum(), \"gap\"", "correct.sum(), \"gap\""),
        ("gap.sum()", "gap.abs().sum()"),
        ("(weights * per_pair).sum()", "(weights * per_pair).mean()"),
        ("(weights * per_pair).sum()", "per_pair.sum()"),
        ("if bool((margins[taken] < 0).any()):", "if False:"),
        ("if bool((margins[taken] < 0).any()):", "if bool((margins < 0).any()):"),
        ("softplus(scores) - targets * scores", "softplus(-scores) - targets * scores"),
        ("softplus(scores) - targets * scores", "softplus(scores) + targets * scores"),
        ("softplus(scores) - targets * scores", "softplus(scores) - (targets > 0.5) * scores"),
        ("scores, targets = torch.where(taken, scores, 0.0),", "scores, targets = scores,"),
        ("torch.where(taken, targets, 0.0)\n", "targets\n"),
        ("(scores > 0) == (targets > 0.5)", "(scores < 0) == (targets > 0.5)"),
        ("(scores > 0) == (targets > 0.5)", "(scores > 0) == (targets >= 0.5)"),
        ("(scores > 0) == (targets > 0.5)", "(scores >= 0) == (targets > 0.5)"),
        ("(targets > 0.5)).double() * taken", "(targets > 0.5)).double()"),
        ("(weights * per_item).sum()", "per_item.sum()"),
        ("(weights * per_item).sum()", "(weights * per_item).mean()"),
        ("(targets[taken] < 0) | ", ""),
        (" | (targets[taken] > 1)", ""),
        ("chosen = segments >= 0", "chosen = segments > 0"),
        ("empty.index_add(0, segments[chosen], token_scores[chosen])",
         "empty.index_add(0, segments[chosen], token_scores[chosen].detach())"),
        ("empty.index_add(0, segments[chosen], token_scores[chosen])",
         "empty.index_copy(0, segments[chosen], token_scores[chosen])"),
        ("confidences.double() - correct.double(), place", "confidences.double(), place"),
        ("gaps.abs().sum()", "gaps.sum().abs()"),
        ("(confidences.double() * bins)", "(confidences.double() * 10)"),
        (".clamp(max=bins - 1)", ""),
        ("/ len(confidences)", "/ bins"),
        ("    if not len(confidences):\n        return float(\"nan\")\n", ""),
        ("(below + upto)", "(below + below)"),
        ("(below + upto)", "(upto + upto)"),
        ("scores[good].double(), scores[~good].double()", "scores[~good].double(), scores[good].double()"),
        ("ordered = negatives.sort().values", "ordered = negatives"),
        ("if not len(positives) or not len(negatives):", "if not len(negatives):"),
        ("if not len(positives) or not len(negatives):", "if not len(positives):"),
    ],
    "importance": [
        ("raw = (old_logprobs.detach() - rollout_logprobs.detach()",
         "raw = (rollout_logprobs.detach() - old_logprobs.detach()"),
        ("raw = (old_logprobs.detach() - rollout_logprobs.detach()", "raw = (old_logprobs - rollout_logprobs"),
        ("raw.clamp(max=cap)", "raw"),
        ("raw.clamp(max=cap)", "raw.clamp(min=1.0, max=cap)"),
        ("raw.clamp(max=cap)", "torch.where(raw > cap, 0.0, raw)"),
        ("raw = (old_logprobs.detach() - rollout_logprobs.detach()).exp()",
         "raw = (old_logprobs.detach() - rollout_logprobs.detach())"),
        ("((raw > cap) & mask)", "(raw > cap)"),
        ("((raw > cap) & mask)", "((raw < cap) & mask)"),
        ("weights = torch.where(mask, raw.clamp(max=cap), 0.0)", "weights = raw.clamp(max=cap)"),
        ("\"tokens\": mask.sum()", "\"tokens\": torch.tensor(mask.numel())"),
        ("(ratio >= low) & (ratio <= high)", "(ratio > low) & (ratio <= high)"),
        ("(ratio >= low) & (ratio <= high)", "(ratio >= low) & (ratio < high)"),
        ("(ratio >= low) & (ratio <= high)", "(ratio >= low)"),
        ("(ratio >= low) & (ratio <= high)", "(ratio <= high)"),
        ("torch.where(inside, ratio, 0.0)", "torch.where(inside, 1.0, 0.0)"),
        ("torch.where(inside, ratio, 0.0)", "ratio.clamp(low, high)"),
        ("torch.where(inside, ratio, 0.0)", "torch.where(inside, ratio, 1.0)"),
        ("(~inside).sum()", "inside.sum()"),
        ("    ratio = (old_logprobs.detach() - rollout_logprobs.detach())",
         "    ratio = (old_logprobs - rollout_logprobs)"),
        ("    ratio = (old_logprobs.detach() - rollout_logprobs.detach())",
         "    ratio = (rollout_logprobs - old_logprobs).detach()"),
        ("    log_ratio = old_logprobs.detach() - rollout_logprobs.detach()",
         "    log_ratio = rollout_logprobs - old_logprobs"),
        ("/ lengths.clamp(min=1)).exp()", ").exp()"),
        ("/ lengths.clamp(min=1)).exp()", "/ lengths.clamp(min=1))"),
        ("(level >= low) & (level <= high)", "(level >= low)"),
        ("(level >= low) & (level <= high)", "(level <= high)"),
        ("(level >= low) & (level <= high)", "(level > low) & (level <= high)"),
        ("(level >= low) & (level <= high)", "(level >= low) & (level < high)"),
    ],
    "rewards_to_tokens": [
        ("rewards - kl_coef", "rewards + kl_coef"),
        ("kl_coef * torch.where", "torch.where"),
        ("torch.where(mask, kl, 0.0)", "kl.nan_to_num()"),
        ("rewards + token_reward", "rewards - token_reward"),
        ("rewards + token_reward", "rewards"),
        ("        refuse_outside(token_reward, mask)\n", ""),
        ("torch.where(mask, positions, -1).amax(1)", "mask.sum(1) - 1"),
        ("torch.where(mask, positions, -1).amax(1)", "positions[-1]"),
        ("torch.where(mask, positions, -1).amax(1)", "torch.where(mask, positions, -1).amax(1) - 1"),
        ("last] += scores", "last] = scores"),
        ("last] += scores", "last] -= scores"),
        ("if not bool(mask.any(1).all()):", "if not bool(mask.any()):"),
        ("rewards = torch.zeros(mask.shape,", "rewards = kl if kl is not None else torch.zeros(mask.shape,"),
    ],
    "implicit_prm": [
        ("(logprobs - ref_logprobs), 0.0).detach()", "(ref_logprobs - logprobs), 0.0).detach()"),
        ("(logprobs - ref_logprobs), 0.0).detach()", "(logprobs - ref_logprobs), 0.0)"),
        ("torch.where(mask.bool(), beta * (logprobs - ref_logprobs), 0.0)", "(beta * (logprobs - ref_logprobs))"),
        ("beta * (logprobs - ref_logprobs.detach())", "beta * (logprobs - ref_logprobs)"),
        ("beta * (logprobs - ref_logprobs.detach())", "(logprobs - ref_logprobs.detach())"),
        ("scores, outcomes, reduction", "-scores, outcomes, reduction"),
        ('reduction="sum") / total_samples', 'reduction="mean")'),
        ("(scores > 0) == (outcomes > 0.5)", "(scores > 0)"),
        ("mask.bool() & valid.bool()[:, None]", "mask.bool()"),
        ("/ mask.sum(1).clamp(min=1)", "/ mask.shape[1]"),
        ("process - _others(per_token, n, valid)[:, None]", "process"),
        ("scores - _others(scores, n, valid)", "scores"),
        ("coef * discounted_returns(centred, mask, gamma)", "discounted_returns(centred, mask, gamma)"),
        ("discounted_returns(centred, mask, gamma)", "centred"),
        ("discounted_returns(centred, mask, gamma)", "discounted_returns(centred, mask, 1.0)"),
        ("+ outcome[:, None]", "- outcome[:, None]"),
        ("+ outcome[:, None]", ""),
        ("(count > 1)", "(count > 0)"),
        ("(chosen.sum(1, keepdim=True) - chosen)", "chosen.sum(1, keepdim=True)"),
        ("(count - 1).clamp", "count.clamp"),
        ("torch.where(valid.bool(), values, 0.0)", "values"),
        ("if n < 2 or", "if"),
    ],
    "spans_to_tokens": [
        ("offsets[:, 1] > offsets[:, 0]", "offsets[:, 1] >= offsets[:, 0]"),
        ("some & (offsets[:, 0] < end) & (offsets[:, 1] > start)", "some & (offsets[:, 0] < end)"),
        ("some & (offsets[:, 0] < end) & (offsets[:, 1] > start)", "some & (offsets[:, 1] > start)"),
        ("(offsets[:, 1] > start)", "(offsets[:, 1] >= start)"),
        ("spread and bool(shared.any())", "bool(shared.any())"),
        ("spread and bool(shared.any())", "spread"),
        ("+= score / len(places)", "+= score"),
        ("+= score / len(places)", "= score / len(places)"),
        ("+= score / len(places)", "-= score / len(places)"),
        ("rewards[_policy_token(place, mask)]", "rewards[place]"),
        ("(some & (offsets[:, 0] < end)).nonzero()", "(some & (offsets[:, 0] <= end)).nonzero()"),
        ("(some & (offsets[:, 0] < end)).nonzero()", "(offsets[:, 0] < end).nonzero()"),
        ("begun[-1:] if", "begun[:1] if"),
        ("before[-1] if", "before[0] if"),
        ("mine[mine <= place]", "mine[mine >= place]"),
        ("else mine[0]", "else mine[-1]"),
        ("if not bool(mask.any()):", "if False:"),
    ],
    "step_rewards": [
        ("torch.sigmoid(logits)", "logits"),
        ("torch.sigmoid(logits)", "torch.sigmoid(-logits)"),
        ("cummin(0)", "cummax(0)"),
        ('if form == "raw":', 'if form in ("raw", "difference"):'),
        ("torch.zeros_like", "0.5 * torch.ones_like"),
        ('elif form != "difference":', "elif False:"),
    ],
    "redistribution": [
        ("values[1:] - values[:-1]", "values[:-1] - values[1:]"),
        ("values[1:] - values[:-1]", "values[1:]"),
        ("weights.mean(0)", "weights[0]"),
        ("score * mean / mean.sum()", "score * mean"),
        ("score * mean / mean.sum()", "mean / mean.sum()"),
        ("    refuse_outside(token_scores, mask)\n", ""),
        ("share * token_scores", "token_scores"),
        ("scores - given.sum(1)", "scores"),
        ("scores - given.sum(1)", "scores + given.sum(1)"),
        ("(1.0 - share) * scores", "scores"),
        ("scores + share * rest", "scores"),
        ("scores + share * rest", "scores + rest"),
        ("if preserve_total else", "if not preserve_total else"),
    ],
}  # fmt: skip

CASES = [(name, old, new) for name, pairs in MUTATIONS.items() for old, new in pairs]


@cache
def source(name: str) -> str:
    return (SOURCES / f"{name}.py").read_text()


@cache
def checks(name: str) -> list[Callable[[ModuleType], None]]:
    """The hand-number tests of one file."""
    spec = importlib.util.spec_from_file_location(f"checks_of_{name}", HERE / f"test_{name}.py")
    assert spec is not None
    assert spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    found = [
        function
        for key, function in vars(tests).items()
        if key.startswith("test_") and list(inspect.signature(function).parameters) == ["m"]
    ]
    assert found
    return found


def load(name: str, text: str) -> ModuleType:
    module = ModuleType(f"broken_{name}")
    exec(compile(text, f"{name}.py, broken", "exec"), module.__dict__)
    return module


def failures(name: str, module: ModuleType) -> list[str]:
    """Names of the tests that fail on the module."""
    failed = []
    for check in checks(name):
        try:
            check(module)
        except (NameError, AttributeError, TypeError):
            raise  # the mutation does not run: it proves nothing
        except (Exception, pytest.fail.Exception):  # pytest.raises fails with an exception of its own family
            failed.append(check.__name__)
    return failed


def test_every_file_has_mutations_and_there_are_enough() -> None:
    assert set(MUTATIONS) == {path.stem for path in SOURCES.glob("*.py")} - {"__init__"}
    assert len(set(CASES)) == len(CASES) >= 40


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_source_as_it_is_passes(name: str) -> None:
    assert failures(name, load(name, source(name))) == []


@pytest.mark.parametrize(("name", "old", "new"), CASES)
def test_a_broken_file_fails_its_tests(name: str, old: str, new: str) -> None:
    code = source(name)
    assert code.count(old) == 1, (
        f"{name}.py holds {old!r} {code.count(old)} times: bring the mutation up to date"
    )
    assert failures(name, load(name, code.replace(old, new))), f"no test of {name} notices {old!r} -> {new!r}"
