"""Token-level truth over real tokenizers, and the findings built on it."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.templates.bounded import Sandbox
from rlhfctl.templates.checks import pair, tokens
from rlhfctl.templates.inspect import Options, inspect
from rlhfctl.templates.probe import Probe
from rlhfctl.templates.sides import Side, load_side

CLOCK = datetime(2025, 1, 15)


@pytest.fixture(scope="module")
def sides(shared: Path) -> Iterator[Any]:
    """(tokenizer, template or None) -> Probe; tokenizers are read once."""
    sandbox = Sandbox()
    kept: dict[str, Side] = {}

    def probe(tokenizer: str, template: str | None) -> Probe:
        chosen = shared / "chat-templates" / f"{template}.jinja" if template else None
        side = load_side(shared / "tokenizers" / tokenizer, chosen)
        if tokenizer in kept:
            side.tokenizer = kept[tokenizer].tokenizer
        kept.setdefault(tokenizer, side)
        return Probe(side, sandbox, CLOCK)

    yield probe
    sandbox.close()


def test_token_pairs(shared: Path, sides: Any) -> None:
    listed = json.loads((shared / "tokenizers" / "token-pairs.json").read_text())["pairs"]
    assert len(listed) == 22
    for row in listed:
        policy = sides(row["policy_tokenizer"], row["policy_template"])
        rm = sides(row["rm_tokenizer"], row["rm_template"])
        label = [row[key] for key in ("policy_tokenizer", "policy_template", "rm_tokenizer", "rm_template")]
        text = tokens.canonical(policy)
        assert text == row["policy_text"], label
        assert tokens.encode(policy.side.tokenizer, text) == row["policy_ids"], label
        read = tokens.encode(rm.side.tokenizer, text)
        assert len(read) == row["policy_text_in_rm_tokens"], label
        assert tokens.double_bos(policy) == row["policy_double_bos"], label
        assert tokens.seam_merges(policy) == row["seam_merge"], label
        assert bool(tokens.k010(policy)) == any(row["seam_merge"].values()), label
        both = pair.Pair(policy, rm)
        counts = pair.marker_pieces(both)
        for marker, stated in row["policy_markers"].items():
            assert counts[marker]["rm"] == stated["rm_pieces"], (label, marker)
            # The file says "not atomic" of GPT-2's <|endoftext|>, which is also its unk token; the ids of the same row
            # hold it as the one id 50256.
            atomic = stated["policy_atomic"] or row["policy_tokenizer"] == "gpt2"
            assert (counts[marker]["policy"] == 1) == atomic, (label, marker)
        valid = max(row["policy_ids"]) < rm.side.tokenizer.get_vocab_size()
        assert valid == row["policy_ids_valid_in_rm"], label
        if row.get("rm_text") is not None:
            assert tokens.canonical(rm) == row["rm_text"], label
            assert tokens.encode(rm.side.tokenizer, row["rm_text"]) == row["rm_ids"], label
            assert tokens.double_bos(rm) == row["rm_double_bos"], label


def test_drift_agrees_with_the_index(shared: Path, sides: Any) -> None:
    for entry in json.loads((shared / "tokenizers" / "index.json").read_text())["tokenizers"]:
        side = sides(entry["name"], None).side
        if entry["name"] == "llama-2-class-override":
            continue  # measured with the class's pre-tokenizer, see K014
        stated = {
            probe["text"] for probe in entry["roundtrip"] if probe["halves_drift"] or probe["canonical_drift"]
        }
        assert set(tokens.drifts(side.tokenizer)) == stated, entry["name"]
        assert side.adds_before == entry["encode_prefix"], entry["name"]
        assert side.adds_after == entry["encode_suffix"], entry["name"]
        assert max(side.tokenizer.get_vocab().values()) == entry["max_id"], entry["name"]


def test_class_override_is_found(sides: Any) -> None:
    assert tokens.k014(sides("llama-2", "llama-2-chat")) is None
    found = tokens.k014(sides("llama-2-class-override", "llama-2-chat"))
    assert found is not None
    assert found.evidence["class"] == "LlamaTokenizer"


def ids(report: Any, side: str) -> set[str]:
    return {found.id for found in report.findings if found.side == side}


def test_qwen_policy_llama_reward_model(sides: Any) -> None:
    qwen, llama = (
        sides(name, template).side
        for name, template in (("qwen2", "qwen2.5-7b-instruct"), ("llama-3-8b-instruct", None))
    )
    report = inspect(qwen, llama, Options(clock=CLOCK))
    assert report.exit_code == 3
    assert {"K007", "P001", "P003", "P006", "P011"} <= ids(report, "pair")
    (k007,) = [found for found in report.findings if found.id == "K007"]
    assert k007.evidence["markers"]["<|im_start|>"] == {"policy": 1, "rm": 6}
    assert (k007.evidence["policy_tokens"], k007.evidence["rm_tokens"]) == (44, 68)
    assert inspect(qwen, llama, Options(clock=CLOCK, bridge=True)).exit_code == 0


def test_other_token_findings(sides: Any, shared: Path) -> None:
    bert = inspect(
        load_side(shared / "tokenizers" / "bert-base-uncased", shared / "chat-templates" / "chatml.jinja")
    )
    assert "K013" in ids(bert, "policy")
    phi = inspect(sides("phi-3", "phi-3-mini-4k").side)
    assert "K016" in ids(phi, "policy")
    none = inspect(sides("gpt2", None).side)
    assert [found.id for found in none.findings if found.severity == "error"] == ["T001"]
    assert none.exit_code == 3


def test_tokenizer_larger_than_embedding(shared: Path, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((shared / "tokenizers" / "gpt2" / file).read_bytes())
    for config in ('{"vocab_size": 50000}', '{"text_config": {"vocab_size": 50000}}'):
        (tmp_path / "config.json").write_text(config)
        report = inspect(load_side(tmp_path, shared / "chat-templates" / "chatml.jinja"))
        (found,) = [f for f in report.findings if f.id == "K009"]
        assert found.evidence == {"max_id": 50256, "rows": 50000}
    assert "K009" not in ids(inspect(load_side(shared / "models" / "stories260k")), "policy")


def test_terminator_that_generation_config_does_not_list(shared: Path, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((shared / "tokenizers" / "phi-3" / file).read_bytes())
    template = shared / "chat-templates" / "phi-3-mini-4k-first.jinja"

    def k003() -> list[str]:
        return [f.severity for f in inspect(load_side(tmp_path, template)).findings if f.id == "K003"]

    assert k003() == ["warning"]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 32000}')
    assert k003() == ["error"]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [32000, 32007]}')
    assert k003() == []
