"""What goes over the wire between a trainer and a reward service. Imports pydantic only; both sides share it.

Requests are strict: an unknown field or a wrong type is an error that names the field. Replies are read leniently
where a newer server may say more, and strictly where a score is concerned.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA = 1
MAX_SAMPLES = 4096  # of one request
MAX_BODY_BYTES = 32 * 2**20

Granularity = Literal["sequence", "step", "token"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Score = Annotated[float, Field(allow_inf_nan=False, strict=True)]  # whole numbers too; no text, no true
Offset = Annotated[int, Field(ge=0, strict=True)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Message(BaseModel):
    """role and content; what a template may read beside them (tool_calls, name, ...) passes through."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[Any] | None = None


class Sample(Strict):
    """One response to score. messages: the prompt; label and metadata: whatever the row holds."""

    id: str
    messages: list[Message]
    response: str
    label: Any = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class RewardsRequest(Strict):
    schema_: Literal[1] = Field(1, alias="schema")
    granularity: Granularity = "sequence"
    samples: list[Sample] = Field(min_length=1, max_length=MAX_SAMPLES)

    @model_validator(mode="after")
    def ids_differ(self) -> "RewardsRequest":
        """Answers are matched by id, so no two samples of a request may share one."""
        seen: set[str] = set()
        for place, sample in enumerate(self.samples):
            if sample.id in seen:
                raise ValueError(f"samples.{place}.id: {sample.id!r} stands twice in this request")
            seen.add(sample.id)
        return self


class OpenRlhfRequest(Strict):
    """OpenRLHF's form. query: prompt and response in one text, as its tokenizer decodes them."""

    query: list[str] = Field(min_length=1, max_length=MAX_SAMPLES)
    prompts: list[str] | None = None
    labels: list[Any] | None = None

    @model_validator(mode="after")
    def lengths_agree(self) -> "OpenRlhfRequest":
        for name, given in (("prompts", self.prompts), ("labels", self.labels)):
            if given is not None and len(given) != len(self.query):
                raise ValueError(f"{name}: {len(given)} of them for {len(self.query)} of query")
        return self


class SpanScore(BaseModel):
    """Characters [start, end) of the response."""

    start: Offset
    end: Offset
    score: Score


class Reward(BaseModel):
    """score is a finite number exactly when status is "ok"; error says why it is not."""

    id: str
    status: Literal["ok", "error", "timeout", "missing"]
    score: Score | None = None
    spans: list[SpanScore] = Field(default_factory=list)
    metrics: dict[str, Finite] = Field(default_factory=dict)
    error: str | None = None
    text_sha256: str | None = None

    @model_validator(mode="after")
    def score_and_status_agree(self) -> "Reward":
        if (self.status == "ok") != (self.score is not None):
            raise ValueError(f"status {self.status} with score {self.score}")
        return self


class TemplateInfo(BaseModel):
    """The chat template that messages are rendered through, and the special tokens it uses."""

    sha256: str
    text: str
    tokens: dict[str, str | None]


class HeadInfo(BaseModel):
    status: Literal["loaded"]
    shape: list[int]


class Info(BaseModel):
    """The handshake. fingerprint: a hash of everything that decides a score; equal servers have equal ones.

    mean, std: what raw scores are normalised with, 0 and 1 where the model asks for nothing.
    template, tokenizer_sha256, head, max_length: of a model; None for rules.
    """

    schema_: int = Field(alias="schema")
    kind: Literal["model", "rules"]
    name: str
    version: str
    fingerprint: str
    granularities: list[Granularity]
    template: TemplateInfo | None = None
    tokenizer_sha256: str | None = None
    head: HeadInfo | None = None
    mean: Finite = 0.0
    std: Finite = 1.0
    max_length: int | None = None
    max_samples: int = MAX_SAMPLES
    max_body_bytes: int = MAX_BODY_BYTES


def problems(error: ValidationError) -> list[dict[str, str]]:
    """[{"field": "samples.3.response", "problem": "..."}] of what is wrong with a request, at most ten."""
    found = []
    for each in error.errors(include_url=False, include_input=False, include_context=False)[:10]:
        field = ".".join(str(part) for part in each["loc"])
        message = each["msg"].removeprefix("Value error, ")
        if each["type"] == "extra_forbidden":
            message = "unknown field"
        if not field and ": " in message:  # a rule between fields names its own
            field, _, message = message.partition(": ")
        found.append({"field": field, "problem": message})
    return found
