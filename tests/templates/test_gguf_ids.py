"""Tokenizers rebuilt from GGUF metadata: the ids and findings of the directory that a file was made from."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from rlhfctl.templates.checks.tokens import same_vocabulary
from rlhfctl.templates.inspect import Report, inspect
from rlhfctl.templates.sides import load_side

# name -> the word rule, the architecture, and the chat template where the directory has none
KINDS = {
    "qwen2": ("qwen2", "qwen2", None),
    "llama-3-8b-instruct": ("llama-bpe", "llama", None),
    "gpt2": ("gpt-2", "gpt2", "chatml"),
    "llama-2": (None, "llama", "llama-2-chat"),
    "mistral-v3": (None, "llama", "mistral-7b-instruct-v0.1"),
}
ODD = (
    "", " ", "  ", "\n\n \n", "a\r\n\tb  \u00a0c\u2003d", "caf\u00e9 cafe\u0301 \u212b \u1e9b\u0323",
    "\ufb01 \u00bd \u2460", "\u7b54\u6848\u662f\u56db\u3002", "\ud55c\uad6d\uc5b4 \ub9d0", "\u0939\u093f\u0928\u094d",
    "\u0627\u0644\u0639\u0631\u0628", "\U0001f469\u200d\U0001f469\u200d\U0001f466 \U0001f1e9\U0001f1ea",
    "\u2581x \u2581\u2581", "\x00\x01\x7f", "I'LL they'Ve it's", "1234567 3.14 $5,000", "<s> a</s> b",
    " <|im_start|> x<|im_end|>\n", "<|eot_id|><|begin_of_text|>", "[INST] x [/INST]", "<|endoftext|>x",
    "def f(x):\n        return  x**2  # \u00fc", "\u0e20\u0e32\u0e29\u0e32", "\U00010348\U0001d54f",
)  # fmt: skip
Write = Callable[[Path, dict[str, Any]], Path]
Made = Callable[[str], tuple[Path, Path]]


def original(directory: Path) -> tuple[dict[str, Any], dict[int, Any], dict[str, int]]:
    """tokenizer.json's model, the added tokens by id, and every token's id."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    return model, tokenizer.get_added_tokens_decoder(), tokenizer.get_vocab()


def metadata_of(directory: Path, pre: str | None, architecture: str) -> dict[str, Any]:
    """What a converter writes for a tokenizer directory, padded to the rows of its embedding."""
    model, added, vocabulary = original(directory)
    side = load_side(directory)
    rows = int(side.config.get("vocab_size") or len(vocabulary) + 3)
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [5] * rows
    for token, index in vocabulary.items():
        byte = pre is None and len(token) == 6 and token.startswith("<0x")
        tokens[index], types[index] = token, 6 if byte else 1
    for index, token in added.items():
        types[index] = 3 if token.special else 4
    found: dict[str, Any] = {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama" if pre is None else "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": bool(side.adds_bos),
    }
    if "max_position_embeddings" in side.config:
        found[f"{architecture}.context_length"] = side.config["max_position_embeddings"]
    if pre is None:
        # as in the SentencePiece models of these tokenizers: runs of spaces last, all with one score
        found["tokenizer.ggml.scores"] = [
            -1e9 if not t.strip("\u2581") else -float(i) for i, t in enumerate(tokens)
        ]
    else:
        found["tokenizer.ggml.pre"] = pre
        pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
        found["tokenizer.ggml.merges"] = list(pairs)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = side.tokens.get(f"{name}_token")
        if token is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = vocabulary[token]
    if side.template is not None:
        found["tokenizer.chat_template"] = side.template
    return found


@pytest.fixture(scope="session")
def made(shared: Path, gguf: Write, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tokenizer's GGUF file and the directory with a chat template that it was made from, by name; in one folder."""
    folder = tmp_path_factory.mktemp("gguf")

    @cache
    def make(name: str) -> tuple[Path, Path]:
        pre, architecture, template = KINDS[name]
        directory = folder / name
        shutil.copytree(shared / "tokenizers" / name, directory)
        if template is not None:
            place = shared / "chat-templates" / f"{template}.jinja"
            shutil.copyfile(place, directory / "chat_template.jinja")
        return gguf(folder / f"{name}.gguf", metadata_of(directory, pre, architecture)), directory

    return make


@pytest.fixture(scope="session")
def lines(shared: Path) -> list[str]:
    """A few hundred real lines, prompts whose ids are hard to keep, and odd text."""
    rows = (shared / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()[:120]
    real = [text for row in rows for text in json.loads(row).values()]
    return [
        *real,
        *ODD,
        *(a + b for a in ODD for b in ODD[::3]),
        (shared / "TEMPLATES.md").read_text()[:10_000],
    ]


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_the_directory(made: Made, lines: list[str], name: str) -> None:
    file, directory = made(name)
    ours, theirs = load_side(file).tokenizer, load_side(directory).tokenizer
    assert ours is not None
    assert theirs is not None
    assert len(lines) > 400
    left, right = ours.encode_batch(lines), theirs.encode_batch(lines)
    for text, one, other in zip(lines, left, right, strict=True):
        assert one.ids == other.ids, text
        assert one.offsets == other.offsets, text
    for text in ODD:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert same_vocabulary(ours, theirs)


def told(report: Report) -> list[tuple[str, ...]]:
    return [(f.side, f.id, f.severity, f.detail) for f in report.findings]


@pytest.mark.parametrize("name", KINDS)
def test_findings_are_those_of_the_directory(made: Made, name: str) -> None:
    file, directory = made(name)
    from_file, from_directory = inspect(load_side(file)), inspect(load_side(directory))
    assert told(from_file) == told(from_directory)
    assert {"K011", "K012"} & {f.id for f in from_file.findings}  # made from ids
    for key in ("tokens", "eot", "adds_bos", "vocab_size", "render_tokens", "double_bos", "seam_merge"):
        one, other = from_file.policy[key], from_directory.policy[key]
        assert {k: v for k, v in one.items() if v} == other if key == "tokens" else one == other, key


def test_pairs_of_files_are_pairs_of_directories(made: Made) -> None:
    files, directories = zip(made("gpt2"), made("llama-2"), strict=True)
    expected = told(inspect(*map(load_side, directories)))
    assert ("pair", "P003") in {finding[:2] for finding in expected}
    assert told(inspect(*map(load_side, files))) == expected
    assert told(inspect(load_side(files[0]), load_side(directories[1]))) == expected


def test_the_command_takes_a_file_and_its_directory(made: Made) -> None:
    file, directory = made("llama-2")
    done = subprocess.run(
        [sys.executable, "-m", "rlhfctl", "inspect-template", str(file), str(directory), "--json"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    report = json.loads(done.stdout)
    found = {
        side: {f["id"] for f in report["findings"] if f["side"] == side} for side in ("policy", "rm", "pair")
    }
    assert found["policy"] == found["rm"]
    assert "P003" not in found["pair"]
    assert next(f for f in report["findings"] if f["id"] == "K001")["evidence"]["double_bos"] is True
    assert report["bridge"]["mode"] == "identity"


@pytest.mark.heavy
def test_transformers_reads_what_is_not_rebuilt(made: Made, gguf: Write, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    file, directory = made("llama-3-8b-instruct")
    metadata = {**metadata_of(directory, "llama-bpe", "llama"), "tokenizer.ggml.pre": "falcon3"}
    side, expected = load_side(gguf(tmp_path / "m.gguf", metadata)), load_side(file).tokenizer
    assert side.tokenizer is not None
    assert expected is not None
    assert side.tokenizer.encode("Hello 12345<|eot_id|>").ids == expected.encode("Hello 12345<|eot_id|>").ids
    assert "read as transformers reads it" in side.note


def test_pieces_of_one_score_are_refused(
    made: Made, gguf: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhfctl.templates.gguf.find_spec", lambda name: None)
    metadata = metadata_of(made("llama-2")[1], *KINDS["llama-2"][:2])
    metadata["tokenizer.ggml.scores"] = [-1000.0] * len(metadata["tokenizer.ggml.scores"])
    side = load_side(gguf(tmp_path / "m.gguf", metadata))
    assert side.tokenizer is None
    assert "pieces of equal score" in side.note
