"""The policy against the reward model."""

import re
from dataclasses import dataclass
from typing import Any

from rlhfctl.templates.catalogue import Found
from rlhfctl.templates.checks import roles
from rlhfctl.templates.checks.history import t032, t036
from rlhfctl.templates.checks.source import t001, t002, t003, t007
from rlhfctl.templates.checks.tokens import canonical, encode, same_vocabulary
from rlhfctl.templates.probe import A2, U1, U2, Conversation, Probe, assistant, user
from rlhfctl.templates.render import Message

CHAT: list[Message] = [user(), assistant(), user(U2), assistant(A2)]
TEXT_MARKER = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,40}\]")
REWARD_TOKEN = re.compile(r"<\|?/?(reward|score)\|?>|\[(reward|score)\]", re.I)


@dataclass(frozen=True)
class Pair:
    """conversations: of the data, compared besides the probe chat."""

    policy: Probe
    rm: Probe
    conversations: tuple[Conversation, ...] = ()

    def renders(self) -> list[tuple[str, str]]:
        """The same messages on both sides, where both sides render them."""
        found = []
        for messages in ([user(), assistant()], CHAT, *self.conversations):
            left, right = self.policy.text(messages), self.rm.text(messages)
            if left is not None and right is not None:
                found.append((left, right))
        return found

    def neutral_equal(self) -> bool:
        """Whether the renders agree once each side's special tokens have neutral names."""
        names = [*self.policy.tokens, *self.rm.tokens]
        neutral: dict[str, str | None] = {name: f"{{{name}}}" for name in names}
        chats = ([user(), assistant()], CHAT)
        left = [self.policy.text(messages, tokens=neutral) for messages in chats]
        right = [self.rm.text(messages, tokens=neutral) for messages in chats]
        return left == right and left[0] is not None


def tokens_differ(pair: Pair) -> bool:
    """Whether bos or eos, or the vocabularies, are not the same on both sides."""
    policy, rm = pair.policy.side, pair.rm.side
    for key in ("bos", "eos"):
        name = f"{key}_token"
        if key in policy.known and key in rm.known and policy.tokens.get(name) != rm.tokens.get(name):
            return True
    if policy.tokenizer is None or rm.tokenizer is None:
        return False
    if policy.tokenizer_file is not None and policy.tokenizer_file == rm.tokenizer_file:
        return False
    return not same_vocabulary(policy.tokenizer, rm.tokenizer)


def p001(pair: Pair) -> Found | None:
    if p004(pair) is not None:
        return None
    for left, right in pair.renders():
        if left != right:
            place = next(
                (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
                min(len(left), len(right)),
            )
            near = (left[place : place + 24], right[place : place + 24])
            detail = f"they part at character {place}: {near[0]!r} against {near[1]!r}"
            return Found(detail, {"position": place, "policy": left, "rm": right})
    return None


def p003(pair: Pair) -> Found | None:
    policy, rm, text = pair.policy.side.tokenizer, pair.rm.side.tokenizer, canonical(pair.policy)
    if policy is None or rm is None or text is None or same_vocabulary(policy, rm):
        return None
    ids, size = encode(policy, text), rm.get_vocab_size()
    beyond = sum(i >= size for i in ids)
    decoded = rm.decode([i for i in ids if i < size], skip_special_tokens=False)
    detail = f"{beyond} of {len(ids)} ids are beyond it, the others read {decoded[:40]!r}"
    return Found(detail, {"valid": not beyond, "decoded": decoded})


def p004(pair: Pair) -> Found | None:
    if not tokens_differ(pair) or not pair.neutral_equal():
        return None
    names = [f"{key}_token" for key in ("bos", "eos")]
    both = {name: [pair.policy.side.tokens.get(name), pair.rm.side.tokens.get(name)] for name in names}
    return Found("; ".join(f"{name} {a} against {b}" for name, (a, b) in both.items()), {"tokens": both})


def p005(pair: Pair) -> Found | None:
    found = p001(pair)
    if found is None or any(
        "".join(left.split()) != "".join(right.split()) for left, right in pair.renders()
    ):
        return None
    return Found(found.detail, found.evidence)


def p006(pair: Pair) -> Found | None:
    left, right = roles.default_system(pair.policy), roles.default_system(pair.rm)
    if left == right:
        return None
    return Found(f"{left[:60]!r} against {right[:60]!r}", {"policy": left, "rm": right})


def _keeps_system(probe: Probe) -> bool:
    return not roles.t010(probe) and not roles.t011(probe) and not roles.t019(probe)


def p007(pair: Pair) -> Found | None:
    found = roles.t010(pair.rm)
    return found if found is not None and _keeps_system(pair.policy) else None


def p008(pair: Pair) -> Found | None:
    found = roles.t011(pair.rm)
    return found if found is not None and _keeps_system(pair.policy) else None


def p009(pair: Pair) -> Found | None:
    found = roles.t014(pair.rm)
    return found if found is not None and roles.t014(pair.policy) is None else None


def p010(pair: Pair) -> Found | None:
    return t032(pair.rm)


def p011(pair: Pair) -> Found | None:
    policy, rm = pair.policy, pair.rm
    if "eos" not in rm.side.known and rm.side.tokenizer is None:
        return None
    ends = [policy.side.tokens.get("eos_token") if "eos" in policy.side.known else None, policy.eot]
    known = {rm.eot, *(token for token in rm.side.tokens.values())}
    if rm.side.tokenizer is not None:
        known |= {token.content for token in rm.side.tokenizer.get_added_tokens_decoder().values()}
    leaking = [end for end in dict.fromkeys(ends) if end is not None and end not in known]
    if not leaking:
        return None
    return Found(f"{' and '.join(leaking)} would be scored as text", {"leaking_terminators": leaking})


def p013(pair: Pair) -> Found | None:
    for check in (t001, t002, t003):
        found = check(pair.rm)
        if found is not None:
            return found
    if t007(pair.rm) is not None and pair.rm.list_chat is None:
        return Found("content is lost as a string and as a list", {})
    return None


def p014(pair: Pair) -> Found | None:
    given = pair.policy.side.template_kwargs
    if not given or given == pair.rm.side.template_kwargs:
        return None
    for messages in ([user(), assistant()], CHAT):
        if pair.rm.text(messages) != pair.rm.text(messages, kwargs=given):
            return Found(
                f"{', '.join(sorted(given))} would change what the reward model reads", {"kwargs": given}
            )
    return None


def reward_token(probe: Probe) -> str | None:
    """A token of the vocabulary whose name says that the score is read at it."""
    if probe.side.tokenizer is None:
        return None
    names = {token.content for token in probe.side.tokenizer.get_added_tokens_decoder().values()}
    return min((name for name in names if REWARD_TOKEN.fullmatch(name)), default=None)


def p015(pair: Pair) -> Found | None:
    token = reward_token(pair.rm)
    if token is None or (pair.rm.basic or "").rstrip().endswith(token):
        return None
    return Found(f"{token} is in its vocabulary, and its template does not end in it", {"token": token})


def p016(pair: Pair) -> Found | None:
    return t036(pair.rm)


def k007(pair: Pair) -> Found | None:
    counts = marker_pieces(pair)
    split = {marker: count for marker, count in counts.items() if count["policy"] == 1 and count["rm"] > 1}
    if not split:
        return None
    shown = ", ".join(f"{marker} {count['rm']}" for marker, count in split.items())
    policy, rm, text = pair.policy.side.tokenizer, pair.rm.side.tokenizer, canonical(pair.policy)
    length = [len(encode(t, text)) if t is not None and text is not None else None for t in (policy, rm)]
    return Found(f"{shown} tokens", {"markers": split, "policy_tokens": length[0], "rm_tokens": length[1]})


def k008(pair: Pair) -> Found | None:
    rm = pair.rm.side.tokenizer
    unknown = pair.rm.side.token_id("unk_token")
    if rm is None or unknown is None:
        return None
    lost = [marker for marker in marker_pieces(pair) if unknown in encode(rm, marker)]
    return Found(f"{', '.join(lost)} in the reward model's vocabulary", {"markers": lost}) if lost else None


def marker_pieces(pair: Pair) -> dict[str, dict[str, int]]:
    """Markers in the policy's render, special tokens or plain text, and how many tokens each is on either side."""
    policy, rm, text = pair.policy.side.tokenizer, pair.rm.side.tokenizer, canonical(pair.policy)
    if policy is None or rm is None or text is None:
        return {}
    added = {t.content for t in policy.get_added_tokens_decoder().values() if t.special and t.content in text}
    markers = sorted(added | set(TEXT_MARKER.findall(text)), key=text.index)
    return {m: {"policy": len(encode(policy, m)), "rm": len(encode(rm, m))} for m in markers}


def t027(pair: Pair) -> Found | None:
    merged: dict[str, bool] = {}
    for name, probe in (("policy", pair.policy), ("rm", pair.rm)):
        text, header = probe.text([user(), user(U2)]), probe.user_header.strip()
        if text is None or not header or U1 not in text or U2 not in text:
            return None
        merged[name] = header not in text[text.index(U1) : text.index(U2)]
    if merged["policy"] == merged["rm"]:
        return None
    return Found("one side joins consecutive user turns, the other does not", {"merged": merged})


CHECKS = {
    "P001": p001, "P003": p003, "P004": p004, "P005": p005, "P006": p006, "P007": p007, "P008": p008, "P009": p009,
    "P010": p010, "P011": p011, "P013": p013, "P014": p014, "P015": p015, "P016": p016, "K007": k007, "K008": k008,
    "T027": t027,
}  # fmt: skip


def bridge_mode(pair: Pair, ids: set[str], merge_roles: bool = False) -> dict[str, Any]:
    """How the reward model can be given the policy's conversations; ids: the pair findings."""
    if "P013" in ids:
        return {"mode": "impossible", "lossy": []}
    steps = []
    lossy = []
    if ids & {"P007", "P008"}:
        steps.append("fold-system")
        lossy.append("the system message becomes part of the first user turn")
    if merge_roles:
        steps.append("merge-roles")
        lossy.append("consecutive turns of one role become one turn")
    if pair.rm.wrap:
        steps.append("list-content")
    if "P010" in ids:
        lossy.append("the reward model's template deletes reasoning")
    if not steps and not ids & {"P001", "P004"}:
        return {"mode": "identity", "lossy": lossy}
    return {"mode": "+".join(["re-render", *steps]), "lossy": lossy}
