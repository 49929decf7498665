"""The tokenizer of a GGUF file, rebuilt from its metadata for the tokenizers library.

Two kinds can be rebuilt exactly. Byte-level BPE (`tokenizer.ggml.model` gpt2) stores its merges, and the name of the
rule that cuts text into words. SentencePiece BPE (llama) stores a score for each piece, from which the merges follow.
Every other kind is refused with a reason, so that no finding is made from ids that are nearly right.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
WORD_START = "\u2581"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST,)
# Each rule cuts what the ones before it left. "default" is what llama.cpp does with a file whose converter did not know
# the model: not GPT-2's rule, punctuation and digits are cut finer.
SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (GPT2,),
    "qwen2": (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST,),
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
}
STRIPPING = ("phi3",)  # its markers swallow whitespace, which no key of the file says


class CannotRebuild(Exception):
    """Why the ids would not be exactly the model's; a clause that follows "its tokenizer"."""


def rebuild(metadata: dict[str, Any]) -> Tokenizer:
    """Raises CannotRebuild for a kind that is not known here; the binding's bare Exception for a vocabulary that
    contradicts itself (a merge of a piece that is not in it)."""
    model = metadata.get(PREFIX + "model")
    if model not in BUILDERS:
        raise CannotRebuild(f"is of the kind {model!r}" if model is not None else "is not in the file")
    if metadata.get("general.architecture") in STRIPPING:
        raise CannotRebuild(
            "belongs to a model whose markers strip whitespace, which the file does not record"
        )
    tokens, types = metadata.get(PREFIX + "tokens"), metadata.get(PREFIX + "token_type")
    if not isinstance(tokens, list) or not isinstance(types, list) or len(types) != len(tokens):
        raise CannotRebuild("has no type for each of its tokens")
    tokenizer = BUILDERS[model](metadata, tokens, types)
    declared = {metadata.get(f"{PREFIX}{name}_token_id") for name in ("bos", "eos", "padding", "unknown")}
    added = []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        special = kind in (CONTROL, UNKNOWN) or index in declared
        if special or kind == USER_DEFINED:
            added.append(AddedToken(token, special=special, normalized=False))
    tokenizer.add_tokens(added)
    tokenizer.post_processor = post_processor(metadata, byte_level=model == "gpt2")
    return tokenizer


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Without the rows that only fill the embedding up: the original tokenizer does not have them."""
    return {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if not (kind == UNUSED and token == f"[PAD{index}]")
    }


def _byte_level(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    pre = metadata.get(PREFIX + "pre", "default")
    merges = metadata.get(PREFIX + "merges")
    if pre not in SPLITS:
        raise CannotRebuild(f"cuts text into words by the rule {pre!r}")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise CannotRebuild("has no merges")
    pairs = [(merge[:cut], merge[cut + 1 :]) for merge in merges if (cut := merge.find(" ", 1)) > 0]
    if len(pairs) < len(merges):
        raise CannotRebuild("has merges that are not two pieces")
    whole = SPLITS[pre] is LLAMA3  # a word that is a token is that token, whatever the merges make of it
    tokenizer = Tokenizer(BPE(_vocabulary(tokens, types), pairs, ignore_merges=whole))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    scores = metadata.get(PREFIX + "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CannotRebuild("has no score for each of its tokens")
    own = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    if any(" " in token or WORD_START in token for token in own):
        raise CannotRebuild("has tokens of its own for runs of spaces")
    vocabulary = _vocabulary(tokens, types)
    if not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        raise CannotRebuild("has no tokens for bytes")
    normal = {token: scores[i] for i, token in enumerate(tokens) if types[i] == NORMAL}
    unknown = metadata.get(PREFIX + "unknown_token_id", 0)
    unk = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    model = BPE(vocabulary, _merges(vocabulary, normal), unk_token=unk, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefixed = metadata.get(PREFIX + "add_space_prefix", True)
    spaces = normalizers.Replace(" ", WORD_START)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(WORD_START), spaces] if prefixed else [spaces]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(WORD_START, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefixed else [])
    )
    return tokenizer


def _merges(vocabulary: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best piece first, in the order of transformers.

    scores: of the pieces that text can be merged into. Raises CannotRebuild where two pieces that are put together have
    one score, since nothing says then which comes first (converters write such scores where they know no better). Runs
    of spaces do have one score: among them only the length matters.
    """
    merges = []
    best: set[float] = set()
    for piece, score in scores.items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found = [(left, right) for left, right in cuts if left in scores and right in scores]
        spaces = not piece.strip(WORD_START)
        if found and not spaces and score in best:
            raise CannotRebuild("has pieces of equal score, so that the order of their merges is not known")
        if found and not spaces:
            best.add(score)
        found.sort(key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
        merges += [(-score, *cut) for cut in found]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def post_processor(metadata: dict[str, Any], byte_level: bool) -> Any:
    """What encoding adds to a text: BOS and EOS as the file says, else as llama.cpp does for the kind."""
    tokens = metadata[PREFIX + "tokens"]
    by_kind = not byte_level or SPLITS.get(metadata.get(PREFIX + "pre", "default")) is LLAMA3
    wanted = {
        "bos": metadata.get(PREFIX + "add_bos_token", by_kind),
        "eos": metadata.get(PREFIX + "add_eos_token", False),
    }
    ids = {name: metadata.get(f"{PREFIX}{name}_token_id") for name in wanted}
    added = [
        {"id": name, "ids": [index], "tokens": [tokens[index]]}
        for name, index in ids.items()
        if wanted[name] and isinstance(index, int) and 0 <= index < len(tokens)
    ]
    names = {entry["id"] for entry in added}
    single = [*(["bos"] if "bos" in names else []), "$A", *(["eos"] if "eos" in names else [])]
    pair = [*single, *(part.replace("$A", "$B") + ":1" for part in single)]
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if byte_level else []
    steps += [processors.TemplateProcessing(single=single, pair=pair, special_tokens=added)] if added else []
    return processors.Sequence(steps)


BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
