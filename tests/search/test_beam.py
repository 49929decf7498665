"""The search itself: what is kept, what is chosen, and that an oracle finds what is there."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from rlhfctl.errors import Refused
from rlhfctl.rollout.delimiters import Delimiters
from rlhfctl.rollout.engine import HfEngine
from rlhfctl.rollout.types import Sampling
from rlhfctl.search.beam import Beam, Candidate, beam_search
from rlhfctl.search.best_of_n import best_of
from rlhfctl.templates.encode import ChatEncoder


def test_delimiters_end_between_tokens() -> None:
    pieces = ["a", ".", " The", "\n", ". ", "$"]
    delimiters = Delimiters(["\n", ". "], lambda ids: "".join(pieces[i] for i in ids))
    # "a" "." " The": complete with " The"; then a newline; then ". " by itself
    assert delimiters.ends([0, 1, 2, 3, 0, 4, 1, 0]) == [2, 3, 5]
    assert delimiters.split("a. b\nc\n\n") == ["a", "b", "c"]


@pytest.mark.parametrize("ends", ["\u0964", "\u2028", "\n\n### Next step\n"])
def test_a_delimiter_that_many_tokens_spell(ends: str) -> None:
    """One token a byte: a danda takes three, which are no text before the last one."""
    written = f"a\u00e9{ends}b{ends}{ends}\u0964c\ufffd".encode()
    delimiters = Delimiters([ends], lambda ids: bytes(ids).decode(errors="replace"))
    found = delimiters.ends(list(written))
    size = len(ends.encode())
    borders = [place + size for place in range(len(written)) if written.startswith(ends.encode(), place)]
    assert len(borders) >= 3
    assert [place + 1 for place in found] == borders


@pytest.mark.parametrize("name", ["gpt2", "deepseek-llm", "llama-2", "phi-3"])
def test_delimiters_of_real_vocabularies(shared: Path, name: str) -> None:
    tokenizer = Tokenizer.from_file(str(shared / "tokenizers" / name / "tokenizer.json"))
    for ends in ("\n", "\n\n", ". ", "\u3002", "\u0964", "\n\n### Next step of the solution\n"):
        ids = tokenizer.encode(f"One is{ends}Two is{ends}Three", add_special_tokens=False).ids
        delimiters = Delimiters([ends], lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)))
        assert len(delimiters.ends(ids)) == 2, (name, ends)


def test_best_of() -> None:
    assert best_of([1.0, 3.0, 3.0], [0.0, 0.0, 0.0], 0.0) == 1
    assert best_of([1.0, 3.0], [-1.0, -6.0], 0.5) == 0  # 0.5 against 0


@pytest.fixture(scope="module")
def policy(chains: Path) -> tuple[HfEngine, ChatEncoder]:
    from rlhfctl.models.load import load_causal_lm
    from rlhfctl.recipe.sections import Policy

    model = Policy(from_config=str(chains / "model"), tokenizer=str(chains / "model"))
    return HfEngine(load_causal_lm(model, torch.device("cpu"), 3)), ChatEncoder.from_path(chains / "model")


def sampling(encoder: ChatEncoder, longest: int = 40) -> Sampling:
    return Sampling(longest, 1.0, 1.0, encoder.stop_ids, 0, 0, 8192)


def test_an_oracle_steers_the_search(policy: tuple[HfEngine, ChatEncoder]) -> None:
    """V = the share of digits 7 in the response: wide beams find more of them than single samples hold."""
    engine, encoder = policy
    seven = encoder.encode_text("7")[0]
    prompts = [encoder.encode_text(text) for text in ("3+8*2?", "1-5?", "9*9+1?")]

    def value(candidates: list[Candidate]) -> list[float]:
        return [each.ids.count(seven) / len(each.ids) for each in candidates]

    delimiters = Delimiters(["\n"], encoder.tokenizer.decode)

    def search(width: int) -> float:
        beam = Beam(width, 4, 0.0)
        trees = beam_search(engine, prompts, value, beam, sampling(encoder), delimiters)
        for tree in trees:
            for place, each in enumerate(tree.candidates):
                assert (each.parent is None) == (each.depth == 0)
                if each.parent is not None:
                    parent = tree.candidates[each.parent]
                    assert parent.kept
                    assert parent.finish == "delimiter"
                    assert each.ids[: each.step] == parent.ids
                if each.finish == "delimiter":
                    assert encoder.tokenizer.decode(each.ids[each.step :]).endswith("\n")
                assert place <= len(tree.candidates)
            per_depth = [sum(each.depth == depth for each in tree.candidates) for depth in range(4)]
            assert per_depth[0] == width
            assert all(count % width == 0 and count <= width * width for count in per_depth)
        return sum(tree.answer.value for tree in trees) / len(trees)

    assert search(6) > search(1)


def test_the_same_search_twice_is_the_same(policy: tuple[HfEngine, ChatEncoder]) -> None:
    engine, encoder = policy
    prompts = [encoder.encode_text("3+8*2?")]

    def found(alpha: float) -> list[list[int]]:
        def value(candidates: Sequence[Candidate]) -> list[float]:
            return [0.0 for _ in candidates]

        (tree,) = beam_search(
            engine, prompts, value, Beam(3, 3, alpha), sampling(encoder),
            Delimiters(["\n"], encoder.tokenizer.decode),
        )  # fmt: skip
        assert [each.score for each in tree.candidates] == [alpha * each.logprob for each in tree.candidates]
        return [each.ids for each in tree.candidates]

    assert found(0.5) == found(0.5)


def test_a_delimiter_that_never_occurs_is_refused(policy: tuple[HfEngine, ChatEncoder]) -> None:
    engine, encoder = policy
    prompts = [encoder.encode_text("3+8?")]
    with pytest.raises(Refused, match="none of 2 answers holds the delimiter '§'"):
        beam_search(
            engine, prompts, lambda made: [0.0] * len(made), Beam(2, 3, 0.0), sampling(encoder),
            Delimiters(["§"], encoder.tokenizer.decode),
        )  # fmt: skip
