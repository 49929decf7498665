"""The chat template of the policy: without a usable one nothing else about the data can be said."""

from collections.abc import Iterator

from rlhfctl.errors import RlhfctlError, TemplateMismatch
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs


def check(inputs: Inputs) -> Iterator[Finding]:
    try:
        _ = inputs.encoder
    except TemplateMismatch as error:
        yield Finding(
            "T000",
            "error",
            "the policy has no usable chat template",
            error.message,
            "set policy.chat_template to a .jinja file",
            "policy",
            exit_code=error.exit_code,
        )
    except RlhfctlError as error:
        yield Finding(
            "T000",
            "error",
            "the policy's tokenizer cannot be read",
            error.message,
            "point policy.path or policy.tokenizer to a directory with tokenizer.json",
            "policy",
            exit_code=5,
        )
