"""The form of every answer."""

import json
from typing import Any

from fastapi.responses import JSONResponse

from rlhfctl.serving.protocol import SCHEMA


class Json(JSONResponse):
    """In ASCII, so that half a surrogate pair in some text is no reason to fail; NaN is no JSON and raises."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class Rejected(Exception):
    """An answer of 4xx or 5xx. fields: [{"field", "problem"}] of what is wrong with the request."""

    def __init__(
        self,
        status: int,
        message: str,
        fields: list[dict[str, str]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.fields, self.headers = status, message, fields or [], headers


def rejection(error: Rejected) -> Json:
    return Json(
        {"schema": SCHEMA, "error": {"message": error.message, "fields": error.fields}},
        error.status,
        error.headers,
    )


def broken(error: Exception) -> Json:
    return rejection(Rejected(500, f"a bug in the service: {type(error).__name__}: {error}"))
