"""GGUF files of few tokens: what is added to a text, kinds that are refused, files that are damaged."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from rlhfctl.errors import UsageError
from rlhfctl.templates.inspect import inspect
from rlhfctl.templates.sides import Side, load_side

Write = Callable[[Path, dict[str, Any]], Path]


def small(**changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer of five tokens; a key's dots are written as two underscores."""
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<eos>", "1"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 3,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}<eos>{% endfor %}",
    }
    found.update({key.replace("__", "."): value for key, value in changes.items()})
    return {key: value for key, value in found.items() if value is not None}


def tokenizer_of(gguf: Write, path: Path, **changes: Any) -> tuple[Side, Tokenizer | None]:
    side = load_side(gguf(path / "m.gguf", small(**changes)))
    return side, side.tokenizer


@pytest.mark.parametrize(
    ("changes", "ids"),
    [
        ({}, [2, 3]),
        ({"tokenizer__ggml__add_bos_token": True}, [3, 2, 3]),
        ({"tokenizer__ggml__add_eos_token": True}, [2, 3, 3]),
        (
            {"tokenizer__ggml__pre": "llama-bpe"},
            [3, 2, 3],
        ),  # llama.cpp adds a BOS for this kind unless told not to
        ({"tokenizer__ggml__pre": "llama-bpe", "tokenizer__ggml__add_bos_token": False}, [2, 3]),
        (
            {"tokenizer__ggml__token_type": [1, 1, 1, 1, 1]},
            [2, 3],
        ),  # what is declared as EOS is one, whatever its type
    ],
)
def test_what_is_added_to_a_text(
    gguf: Write, tmp_path: Path, changes: dict[str, Any], ids: list[int]
) -> None:
    side, tokenizer = tokenizer_of(gguf, tmp_path, **changes)
    assert tokenizer is not None
    assert tokenizer.encode("ab<eos>").ids == ids
    assert side.adds_bos is (ids[0] == 3)


def test_a_file_without_a_word_rule_is_cut_as_llama_cpp_cuts_it(gguf: Write, tmp_path: Path) -> None:
    tokens = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["12", "!a", "99"]
    types, merges = [1] * len(tokens), ["1 2", "! a", "9 9"]
    changes: dict[str, Any] = {
        "tokenizer__ggml__tokens": tokens, "tokenizer__ggml__token_type": types, "tokenizer__ggml__merges": merges,
        "tokenizer__ggml__bos_token_id": None, "tokenizer__ggml__eos_token_id": None,
    }  # fmt: skip
    text, cut = "12399!a", {}
    for pre in ("gpt-2", "default", None):
        tokenizer = tokenizer_of(gguf, tmp_path, **changes, tokenizer__ggml__pre=pre)[1]
        assert tokenizer is not None
        cut[pre] = tokenizer.encode(text).tokens
    assert cut["gpt-2"] == ["12", "3", "99", "!", "a"]
    assert cut["default"] == cut[None] == ["12", "3", "99", "!", "a"]
    tokenizer = tokenizer_of(gguf, tmp_path, **changes, tokenizer__ggml__pre="default")[1]
    assert tokenizer is not None
    assert tokenizer.encode("31299").tokens == ["3", "12", "99"]
    assert tokenizer.encode("33199").tokens == ["3", "3", "1", "99"]
    assert tokenizer.encode("33912").tokens == ["3", "3", "9", "12"]
    assert tokenizer.encode("3399").tokens == ["3", "3", "9", "9"]  # in threes: 339 9


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer__ggml__model": "t5"}, "is of the kind 't5'"),
        ({"tokenizer__ggml__model": None}, "is not in the file"),
        ({"tokenizer__ggml__pre": "tekken"}, "cuts text into words by the rule 'tekken'"),
        ({"tokenizer__ggml__token_type": [1]}, "has no type for each of its tokens"),
        ({"tokenizer__ggml__merges": None}, "has no merges"),
        ({"tokenizer__ggml__merges": ["ab"]}, "has merges that are not two pieces"),
        ({"tokenizer__ggml__model": "llama"}, "has no score for each of its tokens"),
        (
            {"tokenizer__ggml__model": "llama", "tokenizer__ggml__scores": [0.0] * 5},
            "has no tokens for bytes",
        ),
        ({"general__architecture": "phi3"}, "whose markers strip whitespace"),
    ],
)
def test_a_kind_that_cannot_be_rebuilt_is_said(
    gguf: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(
        "rlhfctl.templates.gguf.find_spec", lambda name: None
    )  # an environment without transformers
    side, tokenizer = tokenizer_of(gguf, tmp_path, **changes)
    assert tokenizer is None
    report = inspect(side)
    assert reason in report.policy["note"]
    assert "findings that need token ids are not made" in report.policy["note"]
    assert "vocab_size" not in report.policy


def test_bad_files_are_one_sentence(gguf: Write, tmp_path: Path) -> None:
    whole = gguf(tmp_path / "m.gguf", small()).read_bytes()
    head = b"GGUF" + struct.pack("<IQ", 3, 0)
    key = struct.pack("<Q", 1) + b"k"
    bad = {
        "version 1 is not": b"GGUF" + struct.pack("<I", 1) + whole[8:],
        "version 50331648 is not": b"GGUF" + struct.pack(">I", 3) + whole[8:],
        "does not begin with GGUF": b"PK\x03\x04" + whole,
        "metadata entries": head + struct.pack("<Q", 2**63),
        "a string of": head + struct.pack("<QQ", 1, 2**62),
        "an array of": head + struct.pack("<Q", 1) + key + struct.pack("<IIQ", 9, 8, 2**60),
        "unknown value type 77": head + struct.pack("<Q", 1) + key + struct.pack("<I", 77),
        "it is cut off": head + struct.pack("<Q", 1) + key + struct.pack("<IIQ", 9, 6, 9_999_999),
    }
    place = tmp_path / "bad.gguf"
    for reason, data in bad.items():
        place.write_bytes(data)
        with pytest.raises(UsageError, match="is not a readable GGUF file") as error:
            load_side(place)
        assert reason in str(error.value)
        assert "\n" not in str(error.value)
    for length in range(0, len(whole), 7):
        place.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="is not a readable GGUF file"):
            load_side(place)
    gguf(place, small(tokenizer__ggml__tokens=[1, 2]))
    with pytest.raises(UsageError, match="no list of strings"):
        load_side(place)
    for changes in ({"merges": ["a z"]}, {"token_type": ["x"] * 5, "bos_token_id": ["x"]}):
        gguf(place, small(**{f"tokenizer__ggml__{key}": value for key, value in changes.items()}))
        with pytest.raises(UsageError, match="is not a readable GGUF file: its tokenizer"):
            inspect(load_side(place))
