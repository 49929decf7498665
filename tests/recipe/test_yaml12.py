"""YAML 1.2: what PyYAML reads otherwise, places, duplicates, and a dump that both YAML versions read back."""

import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlhfctl.recipe.errors import RecipeError
from rlhfctl.recipe.yaml12 import dump, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("+12", 12),
        ("1_000", "1_000"),
        ("2001-01-01", "2001-01-01"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("nUll", "nUll"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("'1e-6'", "1e-6"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        ("!!int 5", 5),
        ("=", "="),
        ("127.0.0.1:29500", "127.0.0.1:29500"),
        ("{a: [1, x], b: }", {"a": [1, "x"], "b": None}),
        ("[&x 1, *x]", [1, 1]),
    ],
)
def test_core_schema(text: str, value: object) -> None:
    read = parse(text, "f").value
    assert read == value
    assert type(read) is type(value)


def test_surrogate_pairs_are_the_characters_that_json_means() -> None:
    text = json.dumps({"\U0001f600": ["a\U0001f600b", "plain"]})
    assert "\\ud83d\\ude00" in text
    document = parse(text, "r.json")
    assert document.value == {"\U0001f600": ["a\U0001f600b", "plain"]}
    assert document.problems == []
    half = parse('name: "\\ud800"\n"\\udc00": 1\n', "r.yaml")
    assert [(problem.message, str(problem.place)) for problem in half.problems] == [
        ("half of a surrogate pair is no character", "r.yaml:1:7"),
        ("half of a surrogate pair is no character", "r.yaml:2:1"),
    ]


def test_places_count_from_one_and_name_keys_and_values() -> None:
    document = parse("# x\noptim:\n  lr: 1e-6\ndata: {train: [{path: a}]}\n", "f.yaml")
    assert str(document.keys["optim", "lr"]) == "f.yaml:3:3"
    assert str(document.values["optim", "lr"]) == "f.yaml:3:7"
    assert str(document.values["data", "train", 0, "path"]) == "f.yaml:4:23"
    assert document.values["optim", "lr"].text == "  lr: 1e-6"


def test_every_duplicate_is_told_and_the_first_value_stays() -> None:
    document = parse("a: 1\nb: {c: 2, c: 3}\na: 4\n", "f")
    assert document.value == {"a": 1, "b": {"c": 2}}
    assert [(str(p.place), p.message) for p in document.problems] == [
        ("f:2:11", "duplicate key b.c (first on line 2)"),
        ("f:3:1", "duplicate key a (first on line 1)"),
    ]


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("a: 1\n\tb: 2\n", "f:2:1", "a tab; indent with spaces"),
        ("a: [1\n", "f:2:1", "not valid YAML"),
        ("a: b: c\n", "f:1:5", "quote a value that holds ': '"),
        ("a: 1\n---\nb: 2\n", "f:2:1", "a second YAML document"),
        ("a: \x01\n", "f:1:4", "the character #x01 is not allowed"),
        ("a: *x\n", "f:1:4", "undefined alias"),
        ("[" * 3000, "f:1:1", "nested too deeply"),
    ],
)
def test_what_is_not_yaml_is_one_sentence_at_its_place(text: str, place: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse(text, "f")
    assert error.value.message.startswith(f"{place}: ")
    assert said in error.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: !!python/name:os.system x", "the tag !!python/name:os.system is not part"),
        ("a: !mine {b: 1}", "the tag !mine is not part"),
        ("a: !!int x", "'x' is not of the type !!int"),
        ("? [1, 2]\n: 3", "a key must be a name"),
        ("a: &x {b: 1}\nc: {<<: *x}", "use extends"),
        ("a: &x [*x]", "an alias to a value that contains it"),
        ("a: " + "9" * 5000, "is not of the type !!int"),
    ],
)
def test_what_the_core_schema_does_not_have(text: str, said: str) -> None:
    assert said in parse(text, "f").problems[0].message


def test_aliases_that_multiply_are_refused_before_they_fill_memory() -> None:
    ones = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    bomb = ones + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    with pytest.raises(RecipeError, match=r"f:1:.*more than 100000 values, aliases counted as often as used"):
        parse(bomb, "f")
    few = ones + "b: [*a0, *a0]\n"
    assert parse(few, "f").value["b"] == [[1] * 10] * 2


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False)
    | st.sampled_from(
        ["no", "1e-6", "12:30", "017", "0o17", "~", "", "=", "<<", "2001-01-01", "1_0", ".5", "- x", "a: b"]
    )
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(plain)
def test_a_dump_reads_back_under_both_versions_of_yaml(value: object) -> None:
    text = dump(value)
    assert parse(text, "f").value == value
    assert yaml.safe_load(text) == value


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text, "f")
    except RecipeError as error:
        refused = error.message
    else:
        return
    assert refused.startswith("f:")
