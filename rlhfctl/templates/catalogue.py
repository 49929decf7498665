"""Every finding id: what it means, how bad it is on which side, and what to do about it. docs/templates.md says more."""

# ruff: noqa: E501 - the table below has one finding a line

from dataclasses import dataclass
from typing import Any

from rlhfctl.preflight.finding import Finding, Severity

DOCS = "docs/templates.md"


@dataclass(frozen=True, slots=True)
class Entry:
    """policy, rm: the severity on that side (pair findings have one severity, kept in both)."""

    title: str
    policy: Severity
    rm: Severity
    fix: str


def _same(title: str, severity: Severity, fix: str) -> Entry:
    return Entry(title, severity, severity, fix)


ENTRIES: dict[str, Entry] = {
    "T001": _same("no chat template", "error", "give the template it was trained with as a .jinja file"),
    "T002": _same("the template does not compile", "error", "repair the file, or give another template"),
    "T003": _same("a plain user/assistant conversation cannot be rendered", "error", "pass the variables it needs as template_kwargs, or give another template"),
    "T004": _same("several files hold a template and they disagree", "warning", "delete the stale one, or name the right one with a .jinja file"),
    "T005": _same("the template is not the one the checkpoint was trained with", "warning", "use the template of template.lock.json, or train on and accept the change"),
    "T006": _same("other Jinja settings than transformers' render it differently", "warning", "make every engine that renders it use trim_blocks and lstrip_blocks, as transformers does"),
    "T007": _same("string content is lost or list content is printed as a Python value", "error", "wrap the content as a list for this side (the bridge does)"),
    "T008": _same("the render begins with stray whitespace, or the BOS is not first", "warning", "join the template's lines or use {%- -%}, if the model was trained on the joined text"),
    "T009": _same("the file has CRLF line ends or ends in a newline", "info", "save it with LF line ends and without the last newline"),
    "T010": _same("the system role is rejected", "warning", "set template.fold_system: true, or leave system messages out"),
    "T011": _same("the system message is silently dropped", "error", "set template.fold_system: true, or leave system messages out"),
    "T012": _same("a system prompt is injected when none is given", "warning", "write the system message into the data, so that both sides render the same one"),
    "T013": _same("the render depends on the date", "warning", "pin the date: --clock here, template_kwargs (e.g. date_string) in the recipe"),
    "T014": _same("strict user/assistant alternation is enforced", "warning", "set template.merge_roles: true if the data repeats a role"),
    "T015": _same("the system text is moved into a user turn", "info", "nothing to do for single-turn data"),
    "T016": _same("tools or tool messages are not rendered", "info", "use a template with tool support for data with tools"),
    "T017": _same("trailing whitespace of a continued message is trimmed", "info", "do not rely on the last space of a partial answer"),
    "T018": _same("a message with an unknown role is silently lost", "warning", "map the roles of the data to user, assistant, system and tool"),
    "T019": _same("roles are taken from the position, not from the role field", "error", "set template.fold_system: true; a system message shifts user and assistant"),
    "T020": _same("add_generation_prompt has no effect, but the user turn itself opens the assistant turn", "info", "nothing to do"),
    "T021": Entry("add_generation_prompt has no effect and the prompt is not a prefix of prompt and response", "error", "info", "give a template with a generation prompt"),
    "T022": Entry("an assistant header is appended after the final response", "warning", "error", "give a template without the dangling header: the score would be read at it"),
    "T023": Entry("the generation prompt opens or closes a reasoning block", "warning", "info", "prepend the tag to the response before a reward parses it (the bridge does)"),
    "T024": Entry("the prompt is not a prefix of prompt and response", "error", "info", "give a template whose generation prompt is what its conversations contain"),
    "T025": Entry("text is inserted or removed at the seam of prompt and response", "warning", "info", "train on the sampled ids; SFT masks begin at the prompt's end"),
    "T026": _same("leaving enable_thinking unset suppresses reasoning", "warning", "set template_kwargs.enable_thinking explicitly for each model"),
    "T027": _same("the two sides render another number of turns", "info", "see the renders; one side merges turns of one role"),
    "T030": _same("earlier turns are rendered differently once later turns exist", "warning", "train multi-turn data one row per turn, or use a prefix-preserving training template"),
    "T031": _same("the reasoning of earlier assistant turns is stripped", "warning", "train multi-turn data one row per turn, or use a training template that keeps it"),
    "T032": _same("reasoning is stripped from the final assistant turn too", "error", "give a template that keeps it, or pass it as reasoning_content"),
    "T033": _same("an empty reasoning block is inserted into turns that have none", "warning", "use the same template on both sides, or set template_kwargs.enable_thinking"),
    "T034": _same("message whitespace is trimmed", "info", "do not reward leading or trailing whitespace"),
    "T035": _same("newlines inside the content are rewritten", "warning", "do not train on code or layout with this template"),
    "T036": _same("the final assistant turn is not terminated", "warning", "give a template that ends the last turn: SFT never learns to stop, a reward model reads the score at arbitrary text"),
    "T037": _same("the final assistant turn ends differently from earlier ones", "warning", "list both end tokens as eos_token_id in generation_config.json"),
    "T038": _same("no {% generation %} markers", "info", "nothing to do: rlhfctl finds the trained text itself"),
    "T039": _same("tools=[] renders differently from tools=None", "info", "pass None where there are no tools"),
    "K001": _same("double BOS if the rendered text is encoded with add_special_tokens=True", "warning", "encode rendered text without special tokens, as rlhfctl does"),
    "K002": _same("no BOS, although the tokenizer normally adds one", "warning", "put {{ bos_token }} into the template if the model was trained with it"),
    "K003": _same("the eos token is not the end-of-turn marker", "warning", "list the marker as eos_token_id in generation_config.json"),
    "K004": _same("the pad token is the eos token", "warning", "set a pad token of its own; a mask built from ids != pad would drop the stop token"),
    "K005": _same("no pad token", "warning", "set a pad token (a reserved one of the vocabulary)"),
    "K006": _same("bos and eos are the same token", "warning", "do not stop at the first occurrence of eos inside a prompt"),
    "K007": _same("a marker of the policy is one token in its vocabulary and several in the reward model's", "error", "score through the bridge"),
    "K008": _same("a marker becomes an unknown token", "error", "score through the bridge; on one side: add the marker to the tokenizer"),
    "K009": _same("the tokenizer has more tokens than the embedding has rows", "error", "resize the embedding, or use the tokenizer the model was trained with"),
    "K010": _same("tokens merge across the seam of prompt and response", "warning", "encode prompt and response apart, train on the sampled ids (rlhfctl does)"),
    "K011": _same("decoding and encoding again gives other ids", "warning", "pass token ids, not text, from the sampler to the loss (rlhfctl does)"),
    "K012": _same("special-token strings inside content are read as control tokens", "warning", "remove them from untrusted data: a user or a policy can forge turns with them"),
    "K013": _same("the tokenizer appends a token at the end", "error", "encode prompts without special tokens (rlhfctl does)"),
    "K014": _same("tokenizer_class makes transformers build another tokenizer than tokenizer.json", "warning", "set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json"),
    "K015": _same("bos or eos is written literally in the template", "info", "use {{ bos_token }} and {{ eos_token }}, so that the template follows the tokenizer"),
    "K016": _same("a marker swallows the whitespace beside it", "info", "compare ids, not text, at the seam"),
    "K017": _same("conversations are longer than the side's maximum", "error", "shorten the prompts or raise the limit: what is cut is where the score is read"),
    "P001": _same("the reward model's own template renders the same messages differently", "error", "score through the bridge (template.bridge: true, or --bridge)"),
    "P003": _same("token ids mean other words in the other vocabulary", "error", "pass messages, never ids (the bridge does)"),
    "P004": _same("the templates agree, the special tokens do not", "warning", "score through the bridge"),
    "P005": _same("the two renders differ only in whitespace", "error", "score through the bridge"),
    "P006": _same("the default system prompts differ", "warning", "write the system message into the data, so that both sides render the same one"),
    "P007": _same("the reward model's template rejects the system role that the policy accepts", "error", "set template.fold_system: true (--fold-system), or leave system messages out"),
    "P008": _same("the reward model's template drops the system message that the policy renders", "error", "set template.fold_system: true (--fold-system), or leave system messages out"),
    "P009": _same("the reward model's template enforces alternation, the policy's does not", "warning", "set template.merge_roles: true (--merge-roles) if the data repeats a role"),
    "P010": _same("the reward model's template deletes reasoning from the response it should score", "error", "give the reward model a template that keeps it, or allow it if only the answer is to be scored"),
    "P011": _same("the policy's terminator is no token of the reward model and leaks into the scored text", "error", "score through the bridge: it cuts stop tokens by id"),
    "P013": _same("the reward model's template cannot render: there is no bridge", "error", "give the reward model a template that renders"),
    "P014": _same("the policy's template_kwargs change the reward model's render", "warning", "give each model its own template_kwargs"),
    "P015": _same("the reward model reads its score at a special trailing token", "error", "score through the bridge: it appends the token by id"),
    "P016": _same("the reward model's render does not terminate the response it scores", "warning", "check how the reward model was trained; give a template that ends the turn"),
    "P018": _same("prompts change when they are encoded and decoded: a label found by prompt text would be missed", "error", "rows carry their own label in rlhfctl; key other services by id"),
}  # fmt: skip


@dataclass(slots=True)
class Found:
    """What a check saw. severity replaces the catalogue's where the check knows better."""

    detail: str
    evidence: dict[str, Any]
    severity: Severity | None = None


def finding(id: str, side: str, found: Found) -> Finding:
    """side: policy | rm | pair."""
    entry = ENTRIES[id]
    severity = found.severity or (entry.rm if side == "rm" else entry.policy)
    return Finding(
        id=id,
        severity=severity,
        title=entry.title,
        detail=found.detail,
        fix=f"{entry.fix} ({DOCS}#{id.lower()})",
        side=side,
        evidence=found.evidence,
        exit_code=3,
    )
