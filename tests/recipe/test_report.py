"""Everything wrong with a recipe in one report, each at its line and column with a caret and a suggestion."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhfctl.recipe.errors import RecipeError, window
from rlhfctl.recipe.load import load_recipe

BAD = """\
task: ppo
naem: x
policy:
  path: foo
  lora: {rnk: 3, target_modules: 7}
optim:
  lr: 1e-6x
  lr: 3
  betas: [0.9]
train:
  batch_size: yes
  step: 100
  shuffle: no
reward:
  sources:
    - {kind: verifier, nme: chain_answer}
    - {kind: remote, url: 127.0.0.1:5000}
    - {kind: pyhton, path: x}
    - {path: z}
    - {kind: python, path: x, right: 1}
rollout: {engine: sglang, n: 0}
launch: {nproc_per_node: 0, hostfil: x}
algorithm: {advantage: greep, clip_epsilon: .inf}
data: 3
"""

REPORT = """\
bad.yaml:1:1: missing key name
  1 | task: ppo
    | ^
bad.yaml:2:1: unknown key naem; did you mean name?
  2 | naem: x
    | ^
bad.yaml:5:10: unknown key policy.lora.rnk; did you mean policy.lora.rank?
  5 |   lora: {rnk: 3, target_modules: 7}
    |          ^
bad.yaml:5:34: policy.lora.target_modules must be all-linear or a list, not 7
  5 |   lora: {rnk: 3, target_modules: 7}
    |                                  ^
bad.yaml:7:7: optim.lr must be a number, not "1e-6x"
  7 |   lr: 1e-6x
    |       ^
bad.yaml:8:3: duplicate key optim.lr (first on line 7)
  8 |   lr: 3
    |   ^
bad.yaml:9:10: optim.betas needs 2 items or more
  9 |   betas: [0.9]
    |          ^
bad.yaml:11:15: train.batch_size must be an integer, not "yes"
  11 |   batch_size: yes
     |               ^
bad.yaml:12:3: unknown key train.step; did you mean train.steps?
  12 |   step: 100
     |   ^
bad.yaml:13:3: unknown key train.shuffle; did you mean data.shuffle?
  13 |   shuffle: no
     |   ^
bad.yaml:16:7: missing key reward.sources.0.name
  16 |     - {kind: verifier, nme: chain_answer}
     |       ^
bad.yaml:16:24: unknown key reward.sources.0.nme; did you mean reward.sources.0.name?
  16 |     - {kind: verifier, nme: chain_answer}
     |                        ^
bad.yaml:17:7: 127.0.0.1:5000 is no address of a reward service: it starts with http:// or https://
  17 |     - {kind: remote, url: 127.0.0.1:5000}
     |       ^
bad.yaml:18:14: reward.sources.2.kind must be one of verifier, python, model, remote, not "pyhton"; did you mean python?
  18 |     - {kind: pyhton, path: x}
     |              ^
bad.yaml:19:7: missing key reward.sources.3.kind
  19 |     - {path: z}
     |       ^
bad.yaml:20:31: reward.sources.4.right is no key of kind python
  20 |     - {kind: python, path: x, right: 1}
     |                               ^
bad.yaml:21:19: rollout.engine must be one of hf, vllm, vllm_server, not "sglang"
  21 | rollout: {engine: sglang, n: 0}
     |                   ^
bad.yaml:21:30: rollout.n must be at least 1, not 0
  21 | rollout: {engine: sglang, n: 0}
     |                              ^
bad.yaml:22:26: launch.nproc_per_node must be auto or at least 1, not 0
  22 | launch: {nproc_per_node: 0, hostfil: x}
     |                          ^
bad.yaml:22:29: unknown key launch.hostfil; did you mean launch.hostfile?
  22 | launch: {nproc_per_node: 0, hostfil: x}
     |                             ^
bad.yaml:23:24: algorithm.advantage must be one of gae, grpo, dr_grpo, rloo, reinforce, reinforce_baseline, prime, \
not "greep"; did you mean grpo?
  23 | algorithm: {advantage: greep, clip_epsilon: .inf}
     |                        ^
bad.yaml:23:45: algorithm.clip_epsilon must be a finite number, not inf
  23 | algorithm: {advantage: greep, clip_epsilon: .inf}
     |                                             ^
bad.yaml:24:7: data must be a section (KEY: VALUE), not 3
  24 | data: 3
     |       ^
override seed=-1: seed must be at least 0, not -1"""


def test_all_errors_in_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(BAD)
    with pytest.raises(RecipeError) as error:
        load_recipe("bad.yaml", ["seed=-1"])
    assert error.value.message == REPORT


@pytest.mark.parametrize(
    ("lines", "place", "said"),
    [
        (["rollout: {n: 3}"], "r.yaml:2:11", "rollout.n (3) must divide train.batch_size (128)"),
        (["algorithm: {advantage: grpo}", "value_model: null"], "r.yaml:2:13", "rollout.n must be 2 or more"),
        (["policy: {path: null}"], "r.yaml:2:10", "give either policy.path or policy.from_config"),
    ],
)
def test_a_rule_between_keys_stands_at_a_key_it_names(
    recipe_file: Callable[..., Path], lines: list[str], place: str, said: str
) -> None:
    recipe_file("\n".join(["extends: quickstart/ppo", *lines, ""]))
    with pytest.raises(RecipeError) as error:
        load_recipe("r.yaml")
    assert error.value.message.startswith(f"{place}: ")
    assert said in error.value.message


def test_a_rule_that_found_two_things_is_two_problems(recipe_file: Callable[..., Path]) -> None:
    recipe_file("extends: quickstart/ppo\nvalue_model: null\nalgorithm: {advantage: reinforce}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe("r.yaml", ["algorithm.gae_lambda=0.5"])
    keys = [problem.key for problem in error.value.problems]
    assert keys == ["algorithm.value_coef", "algorithm.gae_lambda"]


def test_the_part_of_a_long_line_around_the_caret() -> None:
    line = "x" * 150 + "HERE" + "y" * 150
    text, column = window(line, 151)
    assert text[column - 1 : column + 3] == "HERE"
    assert len(text) == 103
    assert window("short", 3) == ("short", 3)
