"""From text to a checked recipe: sources, extends, overrides, paths, resolved YAML."""

import io
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhfctl.errors import UsageError
from rlhfctl.recipe.catalogue import header, shipped_names, shipped_path, summary
from rlhfctl.recipe.errors import RecipeError
from rlhfctl.recipe.load import dump, load_recipe, read_resolved

Write = Callable[..., Path]


def refusal(source: str, *overrides: str, task: str | None = None) -> str:
    with pytest.raises(UsageError) as error:
        load_recipe(source, overrides, task)
    return error.value.message


def test_a_path_a_name_and_stdin(recipe_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe_file()
    loaded = load_recipe("r.yaml")
    assert loaded.recipe.train.steps == 10
    assert loaded.path == Path("r.yaml")
    assert load_recipe("quickstart/sft").recipe.name == "quickstart-sft"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert load_recipe("-").recipe == loaded.recipe


def test_places_for_later_reports(recipe_file: Write) -> None:
    recipe_file()
    loaded = load_recipe("r.yaml", ["optim.lr=1e-4"])
    assert loaded.place("data.train.0.path") == "r.yaml:7:14"
    assert loaded.place("optim.lr") == "override optim.lr=1e-4"
    assert loaded.place("data.train_on") == "r.yaml:5:1"


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_recipe_loads_and_says_what_it_is(name: str, tmp_path: Path) -> None:
    path = shipped_path(name)
    assert path is not None
    loaded = load_recipe(name)
    lines = header(path)
    text = "\n".join(lines)
    assert summary(path).endswith(".")
    assert "Hardware:" in text
    for label in ("Launch: ", "Override:"):
        line = next(line for line in lines if line.startswith(label)).removeprefix(label)
        words = shlex.split(line.split("   (")[0])
        assert words[:3] == ["rlhfctl", loaded.recipe.task, name]
        load_recipe(name, [word for word in words[3:] if "=" in word])
        assert loaded.recipe.launch.nnodes == 1 or "--run-dir" in words
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(dump(loaded.recipe))
    assert read_resolved(resolved) == loaded.recipe
    assert dump(read_resolved(resolved)) == resolved.read_text()


def test_a_missing_recipe_names_the_nearest(recipe_file: Write, tmp_path: Path) -> None:
    assert "did you mean quickstart/ppo?" in refusal("quickstart/pppo")
    assert "(rlhfctl recipes list)" in refusal("nothing-like-it.yaml")
    (tmp_path / "run").mkdir()
    assert refusal(str(tmp_path / "run")).endswith("is a directory: give a recipe file")
    recipe_file(name="run/recipe.yaml")
    assert refusal("run").endswith("give run/recipe.yaml")


def test_a_rule_that_names_a_section_alone_points_at_it(recipe_file: Write) -> None:
    recipe_file(recipe_file().read_text() + "rollout: {n: 2}\n")
    assert refusal("r.yaml").startswith("r.yaml:10:1: rollout in an sft recipe is for evaluation by a reward")


def test_an_override_of_the_task_is_what_is_wrong_with_it(recipe_file: Write) -> None:
    recipe_file()
    said = refusal("r.yaml", "task=ppo", task="sft")
    assert said == "override task=ppo: `rlhfctl sft` trains a recipe of sft; leave the override out"


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "../x", ""])
def test_a_name_is_a_directory_beside_others(recipe_file: Write, name: str) -> None:
    recipe_file()
    assert "name must be letters, digits" in refusal("r.yaml", f"name='{name}'")


@pytest.mark.parametrize("name", ["a", "a-", "a..b", ".a", "v1.0", "wörter_2"])
def test_names_that_hold_dots(recipe_file: Write, name: str) -> None:
    recipe_file()
    assert load_recipe("r.yaml", [f"name={name}"]).recipe.name == name


def test_seeds_up_to_63_bits(recipe_file: Write) -> None:
    recipe_file()
    assert load_recipe("r.yaml", [f"seed={2**63 - 1}"]).recipe.seed == 2**63 - 1
    assert "seed must be at most 9223372036854775807" in refusal("r.yaml", f"seed={2**63}")
    assert "seed must be at most 9223372036854775807" in refusal("r.yaml", "seed=99999999999999999999999")


def test_the_wrong_command_names_the_right_one(recipe_file: Write) -> None:
    recipe_file()
    assert refusal("r.yaml", task="ppo") == "r.yaml is a recipe of sft, not of ppo: run `rlhfctl sft r.yaml`"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "r.yaml:1:1: the recipe is empty"),
        ("# only a comment\n", "the recipe is empty"),
        ("- a\n", "the recipe is a list, not sections"),
        ("just words\n", 'the recipe is "just words", not sections'),
        ("name: x\n", "r.yaml:1:1: missing key task: one of sft, rm, ppo, reft, oreo"),
        (
            "task: sfd\n",
            'r.yaml:1:7: task must be one of sft, rm, ppo, reft, oreo, not "sfd"; did you mean sft?',
        ),
    ],
)
def test_a_recipe_that_is_none(recipe_file: Write, text: str, said: str) -> None:
    recipe_file(text)
    assert said in refusal("r.yaml")


def test_a_file_that_is_not_text(recipe_file: Write) -> None:
    recipe_file().write_bytes(b"task: sft\nname: \xff\n")
    assert refusal("r.yaml") == "r.yaml:2:7: not UTF-8 text"


def test_extends_merges_sections_and_replaces_lists(recipe_file: Write) -> None:
    recipe_file()
    recipe_file(
        "extends: r.yaml\nname: child\ntrain:\n  batch_size: 8\ndata: {train: [{path: other}]}\n",
        "sub/c.yaml",
    )
    recipe_file("extends: sub/c.yaml\noptim: {lr: 1e-3}\n", "top.yaml")
    recipe = load_recipe("top.yaml").recipe
    assert (recipe.name, recipe.train.steps, recipe.train.batch_size, recipe.optim.lr) == (
        "child",
        10,
        8,
        1e-3,
    )
    assert [source.path for source in recipe.data.train] == ["other"]


def test_extends_a_shipped_recipe(recipe_file: Write) -> None:
    recipe_file("extends: quickstart/ppo\nalgorithm: {kl_coef: 0.2}\n")
    recipe = load_recipe("r.yaml").recipe
    assert recipe.task == "ppo"
    assert (recipe.algorithm.kl_coef, recipe.algorithm.ppo_epochs) == (0.2, 2)


def test_extends_from_the_home_directory(recipe_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    base = recipe_file(name="base.yaml")
    monkeypatch.setenv("HOME", str(base.parent))
    child = recipe_file("extends: ~/base.yaml\nname: child\n", "child.yaml")
    monkeypatch.chdir("/")
    assert load_recipe(str(child)).recipe.name == "child"


def test_extends_goes_wrong(recipe_file: Write) -> None:
    recipe_file("extends: b.yaml\n", "a.yaml")
    recipe_file("extends: a.yaml\n", "b.yaml")
    assert "b.yaml:1:10: extends goes in a circle: a.yaml -> b.yaml -> a.yaml" in refusal("a.yaml")
    recipe_file("extends: quickstart/pppo\n", "c.yaml")
    assert "c.yaml:1:10: extends: there is no file" in refusal("c.yaml")
    assert "did you mean quickstart/ppo?" in refusal("c.yaml")
    recipe_file("extends: [a]\n", "d.yaml")
    assert "extends must be a shipped name or a path" in refusal("d.yaml")


def test_an_error_in_a_base_is_told_in_the_base(recipe_file: Write) -> None:
    recipe_file(
        "task: sft\nname: x\npolicy: {path: m}\ndata: {train: [{path: d}]}\ntrain: {steps: ten}\n",
        "base.yaml",
    )
    recipe_file("extends: base.yaml\nname: y\n")
    assert 'base.yaml:5:16: train.steps must be an integer, not "ten"' in refusal("r.yaml")


def test_paths_become_absolute_where_they_exist(recipe_file: Write, tmp_path: Path) -> None:
    recipe_file("x", "data.jsonl")
    recipe_file("x", "elsewhere/reward.py")
    recipe_file("x", "reward.py")
    base = "extends: quickstart/ppo\npolicy: {path: org/hub-model}\ndata: {train: [{path: data.jsonl}], eval: []}\n"
    recipe_file(f"{base}reward: {{sources: [{{kind: python, path: reward.py}}]}}\n", "elsewhere/r.yaml")
    recipe = load_recipe("elsewhere/r.yaml").recipe
    assert recipe.policy.path == "org/hub-model"
    assert recipe.data.train[0].path == str(tmp_path / "data.jsonl")
    beside = recipe_file("x", "elsewhere/other.jsonl")
    assert (
        load_recipe("elsewhere/r.yaml", ["data.train.0.path=other.jsonl"]).recipe.data.train[0].path
        == "other.jsonl"
    )
    recipe_file("extends: r.yaml\ndata: {train: [{path: other.jsonl}]}\n", "elsewhere/s.yaml")
    assert load_recipe("elsewhere/s.yaml").recipe.data.train[0].path == str(beside)
    recipe_file("x", "other.jsonl")
    assert load_recipe("elsewhere/s.yaml").recipe.data.train[0].path == str(tmp_path / "other.jsonl")
    assert recipe.reward.sources[0].path == str(tmp_path / "elsewhere/reward.py")
    given = load_recipe("elsewhere/r.yaml", ["reward.sources.0.path=reward.py"]).recipe
    assert given.reward.sources[0].path == str(tmp_path / "reward.py")
    assert load_recipe("elsewhere/r.yaml", ["value_model.init=policy"]).recipe.value_model.init == "policy"
    assert load_recipe("elsewhere/r.yaml", ["policy.path=~/m"]).recipe.policy.path == str(Path.home() / "m")


def test_overrides_reach_every_kind_of_key(recipe_file: Write) -> None:
    recipe_file()
    recipe = load_recipe(
        "r.yaml",
        [
            "optim.lr=1e-6",
            "policy.lora.rank=4",
            "data.train.0.limit=5",
            "data.eval.0.path=e.jsonl",
            'policy.template_kwargs={enable_thinking: false, "a b": [1]}',
            "optim.max_grad_norm=null",
            "name=a.b-c",
            "data.train.1={path: second, weight: 2}",
            "data.train.0.system=key=value",
        ],
    ).recipe
    assert recipe.optim.lr == 1e-6
    assert recipe.policy.lora is not None
    assert (recipe.policy.lora.rank, recipe.policy.lora.alpha) == (4, 32.0)
    assert [(source.path, source.limit, source.weight) for source in recipe.data.train] == [
        ("data.jsonl", 5, 1.0),
        ("second", None, 2.0),
    ]
    assert recipe.data.train[0].system == "key=value"
    assert recipe.data.eval[0].path == "e.jsonl"
    assert recipe.policy.template_kwargs == {"enable_thinking": False, "a b": [1]}
    assert recipe.optim.max_grad_norm is None
    assert recipe.name == "a.b-c"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
        ("lr=1", "unknown key lr; did you mean optim.lr?"),
        ("optimm.lr=1", "unknown key optimm; did you mean optim?"),
        ("optim.lr=fast", 'optim.lr must be a number, not "fast"'),
        ("train.steps=1.5", "train.steps must be an integer, not 1.5"),
        ('train.steps="5"', 'train.steps must be an integer, not "5"'),
        ("train.steps=0", "train.steps must be at least 1, not 0"),
        (
            "data.shuffle=no",
            'data.shuffle must be true or false, not "no" (YAML 1.2 has only true and false)',
        ),
        ("name=5", "name must be a string, not 5: put quotes around it"),
        ("data.train.0.format=alpacca", "did you mean alpaca?"),
        ("data.train.3.path=x", "data.train has 1 item: there is no data.train.3"),
        ("data.train.path=x", "data.train is a list: its items are data.train.0, data.train.1, ..."),
        ("data.train.\u00b2.path=x", "data.train is a list: its items are data.train.0, data.train.1, ..."),
        ('data.train.0.path="a\\0b"', "it holds a character that no name has"),
        ('launch.hostfile="a\\0b"', "launch.hostfile: 'a\\x00b' cannot be a file or a directory"),
        ("data.train=[]", "data.train must be a list of 1 or more, not an empty list"),
        ("name.x=1", "name is a value, not a section: it has no x"),
        ("seed.x=1", "seed must be an integer, not a section"),
        ("optim.lr", "not KEY=VALUE, such as optim.lr=1e-5"),
        ("=5", "not KEY=VALUE"),
        ("optim.lr=[1", "not valid YAML"),
        ("policy.attention=flash", 'policy.attention must be one of auto, sdpa, not "flash"'),
        ("tracking={wandb: x}", 'tracking.wandb must be a section (KEY: VALUE), not "x"'),
        ("tracking.wandb.mode=ofline", "did you mean offline?"),
        ("algorithm.kl_coef=1", "algorithm is for rm and ppo and reft and oreo, and this is a recipe of sft"),
        ("train.epochs=2", "give either train.steps or train.epochs (the other one null)"),
    ],
)
def test_overrides_that_are_wrong(recipe_file: Write, override: str, said: str) -> None:
    recipe_file()
    message = refusal("r.yaml", override)
    assert message.startswith(f"override {override}: ")
    assert said in message


def test_an_override_given_twice(recipe_file: Write) -> None:
    recipe_file()
    assert "optim.lr is given twice" in refusal("r.yaml", "optim.lr=1", "optim.lr=2")


def test_recipe_errors_are_usage_errors_with_their_problems(recipe_file: Write) -> None:
    recipe_file("task: sft\nnaem: x\n")
    with pytest.raises(RecipeError) as error:
        load_recipe("r.yaml", ["optim.lr=x"])
    assert error.value.exit_code == 2
    told = [problem.as_dict() for problem in error.value.problems]
    assert {"file": "r.yaml", "line": 2, "column": 1, "override": None, "key": "naem"}.items() <= told[
        -2
    ].items()
    assert told[-2]["suggestion"] == "name"
    assert {
        "file": None,
        "line": None,
        "column": None,
        "override": "optim.lr=x",
        "key": "optim.lr",
    }.items() <= told[-1].items()
