"""Characters of a response by token, on real tokenizers: however the text was cut into ids, nothing is lost."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.templates.response_offsets import response_offsets

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def encoder_of(tokenizer: Tokenizer, **tokens: str) -> ChatEncoder:
    return ChatEncoder(TEMPLATE, tokens, tokenizer)


def words(*tokens: str, decoder=None) -> ChatEncoder:
    """A closed vocabulary: token i is tokens[i]; <eos> is the last."""
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate([*tokens, "<eos>"])}, tokens[0])
    )
    tokenizer.decoder = decoder or decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return encoder_of(tokenizer, eos_token="<eos>")


def pieces(encoder: ChatEncoder, ids: list[int]) -> list[str]:
    text = encoder.decode_response(ids)
    offsets = response_offsets(encoder, ids, text)
    ends = [end for _, end in offsets]
    assert [start for start, _ in offsets] == [0, *ends[:-1]]
    assert ends[-1] == len(text)
    return [text[start:end] for start, end in offsets]


def test_stop_tokens_and_special_tokens() -> None:
    encoder = words("ab", "c", "\n")
    assert pieces(encoder, [0, 2, 1, 3]) == ["ab", "\n", "c", ""]
    assert pieces(encoder, [0, 3, 1]) == ["ab", "<eos>", "c"]  # inside the response it stays as text
    assert pieces(encoder, [3]) == [""]


def test_a_leading_space_that_the_decoder_strips() -> None:
    encoder = words("\u2581to", "\u2581be", "!", decoder=decoders.Metaspace())
    assert pieces(encoder, [0, 1, 2, 0]) == ["to", " be", "!", " to"]


def test_bytes_of_one_character() -> None:
    byte = [f"<0x{value:02X}>" for value in "€".encode()]
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    encoder = words("a", *byte, decoder=decoder)
    assert pieces(encoder, [0, 1, 2, 3, 0]) == ["a", "", "", "€", "a"]
    broken = pieces(encoder, [0, 1, 2, 0])  # a character that was never finished
    assert "".join(broken) == encoder.decode_response([0, 1, 2, 0])
    assert broken[0] == "a"


def tokenizer_files(shared: Path) -> list[Path]:
    return sorted((shared / "tokenizers").rglob("tokenizer.json"))


def test_real_tokenizers_with_text_and_with_random_ids(shared: Path) -> None:
    files = tokenizer_files(shared)
    assert files
    rng = random.Random(0)
    text = "Step 1: 3+4=7\n日本語と emoji 👩‍👩‍👧 naïve\n\n#### 7 "
    for file in files:
        tokenizer = Tokenizer.from_file(str(file))
        encoder = encoder_of(tokenizer)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        written = pieces(encoder, ids)
        assert "".join(written) == encoder.decode_response(ids), file
        sampled = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(60)]
        whole = encoder.decode_response(sampled)
        offsets = response_offsets(encoder, sampled, whole)
        ends = [end for _, end in offsets]
        assert ends == sorted(ends), file
        assert ends[-1] == len(whole), file


@pytest.mark.parametrize("seed", range(5))
def test_offsets_agree_with_those_of_encoding_where_the_ids_are_the_texts_own(
    shared: Path, seed: int
) -> None:
    tokenizer = Tokenizer.from_file(str(shared / "tokenizers/gpt2/tokenizer.json"))
    encoder = encoder_of(tokenizer)
    rng = random.Random(seed)
    text = "".join(rng.choice(["12", "+", " plus", "\n", " is", "x", " the", "é"]) for _ in range(30))
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert encoder.decode_response(encoding.ids) == text
    assert [end for _, end in response_offsets(encoder, encoding.ids, text)] == [
        end for _, end in spans_of_text(tokenizer, encoding.ids)
    ]


def spans_of_text(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[int, int]]:
    """Byte-level tokens are their bytes: characters that each one completes, counted from its own bytes."""
    texts = [tokenizer.decode(ids[: count + 1]).rstrip("\ufffd") for count in range(len(ids))]
    ends = [len(text) for text in texts]
    return list(zip([0, *ends[:-1]], ends, strict=True))
