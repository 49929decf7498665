"""Special tokens and ids: what the declared tokens say, and what the tokenizer does with a rendered conversation."""

from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from rlhfctl.templates.catalogue import Found
from rlhfctl.templates.probe import MARKER, Probe, assistant, user

QUESTION, ANSWER = "What is 2 + 2?", "It is 4."
STARTS = ("Hello", " Hello", "\nHello", "1", "**b**", ". ok", "\u7684")  # how responses begin
DRIFT = (
    "Hello world", "tokenization matters", "12345", "  two  spaces", "na\u00efve caf\u00e9", 'print("x")\n\n',
    "\u00dcn\u00efc\u00f6d\u00e9", "\u7b54\u6848\u662f\u56db",
)  # fmt: skip
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")


class CannotEncode(Exception):
    """A closed vocabulary without an unknown token lacks a character: what needs these ids cannot be said."""


def encode(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """special: with the tokens that the tokenizer adds by default. Raises CannotEncode."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=special).ids)
    except Exception as error:  # the binding raises bare Exception
        raise CannotEncode(str(error)) from None


def canonical(probe: Probe, prompt: bool = False) -> str | None:
    """The conversation that all token counts refer to; prompt: up to where the response begins."""
    messages = [user(QUESTION)] if prompt else [user(QUESTION), assistant(ANSWER)]
    return probe.text(messages, prompt)


def double_bos(probe: Probe) -> bool | None:
    """Whether the default way of encoding puts two BOS ids first; None: there is no tokenizer, or no BOS."""
    tokenizer, bos, text = probe.side.tokenizer, probe.side.token_id("bos_token"), canonical(probe)
    if tokenizer is None or text is None:
        return None
    return bos is not None and encode(tokenizer, text, special=True)[:2] == [bos, bos]


def k001(probe: Probe) -> Found | None:
    if probe.bos is None or not probe.side.adds_bos or probe.basic is None or probe.bos not in probe.basic:
        return None
    return Found(
        f"template and tokenizer both add {probe.bos}", {"bos": probe.bos, "double_bos": double_bos(probe)}
    )


def k002(probe: Probe) -> Found | None:
    if probe.bos is None or not probe.side.adds_bos or probe.basic is None or probe.bos in probe.basic:
        return None
    return Found(f"the tokenizer adds {probe.bos}, the template does not", {"bos": probe.bos})


def k003(probe: Probe) -> Found | None:
    eos = probe.side.tokens.get("eos_token")
    if "eos" not in probe.side.known or eos is None or probe.eot is None or probe.eot == eos:
        return None
    listed = probe.side.generation_eos
    tokenizer = probe.side.tokenizer
    if listed is not None and tokenizer is not None:
        if tokenizer.token_to_id(probe.eot) in listed:
            return None
        final = MARKER.match(probe.after_final)
        if final is None or not probe.after_final.lstrip().startswith(eos):
            detail = f"turns end in {probe.eot}, eos is {eos}, and generation_config.json does not list {probe.eot}"
            return Found(detail, {"eos": eos, "eot": probe.eot, "listed": list(listed)}, "error")
    return Found(f"turns end in {probe.eot}, eos is {eos}", {"eos": eos, "eot": probe.eot})


def k004(probe: Probe) -> Found | None:
    pad, eos = probe.side.tokens.get("pad_token"), probe.side.tokens.get("eos_token")
    if not {"pad", "eos"} <= probe.side.known or pad is None or pad != eos:
        return None
    return Found(f"both are {pad}", {"token": pad})


def k005(probe: Probe) -> Found | None:
    if "pad" not in probe.side.known or probe.side.tokens.get("pad_token") is not None:
        return None
    return Found("frameworks then pad with eos without saying so", {})


def k006(probe: Probe) -> Found | None:
    bos, eos = probe.bos, probe.side.tokens.get("eos_token")
    if "eos" not in probe.side.known or bos is None or bos != eos:
        return None
    return Found(f"both are {bos}", {"token": bos})


def largest_id(tokenizer: Tokenizer) -> int:
    """The base vocabulary is read whole only if its ids have gaps."""
    added = tokenizer.get_added_tokens_decoder()
    base = tokenizer.get_vocab_size(with_added_tokens=False)
    dense = tokenizer.id_to_token(base - 1) is not None and (
        base in added or tokenizer.id_to_token(base) is None
    )
    largest = base - 1 if dense else max(tokenizer.get_vocab().values(), default=-1)
    return max([largest, *added])


def same_vocabulary(left: Tokenizer, right: Tokenizer) -> bool:
    return left.get_vocab_size() == right.get_vocab_size() and left.get_vocab() == right.get_vocab()


def k009(probe: Probe) -> Found | None:
    tokenizer, rows = probe.side.tokenizer, probe.side.rows
    if tokenizer is None or rows is None:
        return None
    largest = largest_id(tokenizer)
    if largest < rows:
        return None
    return Found(f"token id {largest} against {rows} rows", {"max_id": largest, "rows": rows})


def seam_merges(probe: Probe) -> dict[str, bool] | None:
    """For each way a response may begin: whether encoding prompt + response changes the prompt's ids."""
    tokenizer, prompt = probe.side.tokenizer, canonical(probe, prompt=True)
    if tokenizer is None or prompt is None:
        return None
    ids = encode(tokenizer, prompt)
    return {start: encode(tokenizer, prompt + start)[: len(ids)] != ids for start in STARTS}


def k010(probe: Probe) -> Found | None:
    merges = seam_merges(probe)
    if merges is None or not any(merges.values()):
        return None
    which = ", ".join(repr(start) for start, merged in merges.items() if merged)
    return Found(f"responses that begin with {which} change the prompt's last token", {"seam_merge": merges})


def drifts(tokenizer: Tokenizer) -> list[str]:
    """Texts whose ids change on the way ids -> text -> ids: the ids of the text, and of its two halves put together."""
    drifted = []
    for text in DRIFT:
        middle = len(text) // 2
        halves = encode(tokenizer, text[:middle]) + encode(tokenizer, text[middle:])
        for ids in (encode(tokenizer, text), halves):
            if encode(tokenizer, tokenizer.decode(ids, skip_special_tokens=False)) != ids:
                drifted.append(text)
                break
    return drifted


def k011(probe: Probe) -> Found | None:
    if probe.side.tokenizer is None:
        return None
    drifted = drifts(probe.side.tokenizer)
    if not drifted:
        return None
    return Found(f"{len(drifted)} of {len(DRIFT)} probe texts, e.g. {drifted[0]!r}", {"texts": drifted})


def k012(probe: Probe) -> Found | None:
    tokenizer, eot = probe.side.tokenizer, probe.eot
    marker = tokenizer.token_to_id(eot) if tokenizer is not None and eot is not None else None
    if tokenizer is None or marker is None:
        return None
    plain, forged = probe.text([user("a b"), assistant()]), probe.text([user(f"a {eot} b"), assistant()])
    if plain is None or forged is None:
        return None
    if encode(tokenizer, forged).count(marker) <= encode(tokenizer, plain).count(marker):
        return None
    return Found(
        f"{eot} inside a user message becomes the token that ends a turn", {"marker": eot, "id": marker}
    )


def k013(probe: Probe) -> Found | None:
    after = probe.side.adds_after
    if not after or probe.side.tokenizer is None:
        return None
    names = [probe.side.tokenizer.id_to_token(i) for i in after]
    return Found(f"it appends {' '.join(map(str, names))}", {"tokens": names})


def k014(probe: Probe) -> Found | None:
    """transformers 5 rebuilds the Llama class's pre-tokenizer whatever tokenizer.json says: compare both."""
    side = probe.side
    if side.tokenizer is None or side.tokenizer_config.get("tokenizer_class") not in LLAMA:
        return None
    rebuilt = Tokenizer.from_str(side.tokenizer.to_str())
    legacy = side.tokenizer_config.get("legacy", True)
    rebuilt.normalizer = normalizers.Sequence([])
    scheme = "always" if legacy else "first"
    rebuilt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    texts = [*DRIFT, canonical(probe) or "", "<s> x</s> y\n\n z"]
    changed = [text for text in texts if encode(rebuilt, text) != encode(side.tokenizer, text)]
    if not changed:
        return None
    name = side.tokenizer_config["tokenizer_class"]
    return Found(
        f"{name} gives other ids for {len(changed)} of {len(texts)} texts", {"class": name, "texts": changed}
    )


def k015(probe: Probe) -> Found | None:
    names = {"bos": "bos_token", "eos": "eos_token"}
    declared = {name: probe.side.tokens.get(name) for key, name in names.items() if key in probe.side.known}
    neutral: dict[str, str | None] = {**probe.tokens, **{name: f"{{{name}}}" for name in declared}}
    text = probe.text([user(), assistant(), user()], tokens=neutral)
    literal = [token for token in declared.values() if token and text is not None and token in text]
    return Found(f"{literal[0]} stays whatever the tokenizer says", {"literal": literal}) if literal else None


def k016(probe: Probe) -> Found | None:
    tokenizer, text = probe.side.tokenizer, canonical(probe)
    if tokenizer is None or text is None:
        return None
    tokens = tokenizer.get_added_tokens_decoder().values()
    stripping = sorted(t.content for t in tokens if (t.lstrip or t.rstrip) and t.content in text)
    if not stripping:
        return None
    return Found(f"{', '.join(stripping)}: whitespace beside it is not encoded", {"markers": stripping})


def facts(probe: Probe) -> dict[str, Any]:
    """Token facts of one side for the report; nothing without a tokenizer, null where it cannot encode the probe."""
    tokenizer = probe.side.tokenizer
    if tokenizer is None:
        return {}
    result: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size(), "embedding_rows": probe.side.rows}
    for name, ask in (
        ("render_tokens", render_tokens),
        ("double_bos", double_bos),
        ("seam_merge", seam_merges),
    ):
        try:
            result[name] = ask(probe)
        except CannotEncode:
            result[name] = None
    return result


def render_tokens(probe: Probe) -> int | None:
    text = canonical(probe)
    return (
        len(encode(probe.side.tokenizer, text))
        if probe.side.tokenizer is not None and text is not None
        else None
    )


CHECKS = {
    "K001": k001, "K002": k002, "K003": k003, "K004": k004, "K005": k005, "K006": k006, "K009": k009, "K010": k010,
    "K011": k011, "K012": k012, "K013": k013, "K014": k014, "K015": k015, "K016": k016,
}  # fmt: skip
