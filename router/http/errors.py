"""Errors as OpenAI words them: {"error": {"message", "type", "param", "code"}} and a status that clients know to handle."""

from __future__ import annotations

import math
from http import HTTPStatus

import msgspec

from python_backends.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    Unavailable,
)

_RETRY_AFTER_S = 1
_CLIENT_CLOSED = 499  # nobody reads it; nginx's word for a client that went away


class ApiError(Exception):
    """An answer that is an error. `param`: the field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> bytes:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def api_error(error: BatonError) -> ApiError:
    """What a client is told of an error of the router."""
    message = str(error)
    if isinstance(error, InvalidRequest):
        field = message.split(" ", 1)[0].rstrip(":")
        code = "context_length_exceeded" if message.startswith("the prompt has") else None
        return ApiError(HTTPStatus.BAD_REQUEST, message, param=None if field in ("the", "give") else field, code=code)
    if isinstance(error, QueueFull):
        return ApiError(
            HTTPStatus.TOO_MANY_REQUESTS,
            message,
            code="rate_limit_exceeded",
            kind="rate_limit_error",
            retry_after_s=_retry_after_s(error),
        )
    if isinstance(error, DeadlineExceeded):
        return ApiError(HTTPStatus.GATEWAY_TIMEOUT, message, code="timeout", kind="timeout_error")
    if isinstance(error, Cancelled):
        return ApiError(_CLIENT_CLOSED, message, code="cancelled", kind="cancelled")
    if isinstance(error, Unavailable):
        return ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            message,
            code="service_unavailable",
            kind="server_error",
            retry_after_s=_retry_after_s(error),
        )
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, code="internal_error", kind="server_error")


def _retry_after_s(error: Unavailable) -> int:
    """Whole seconds, as HTTP has it; never none, or clients come back at once."""
    return _RETRY_AFTER_S if error.retry_after_s is None else max(math.ceil(error.retry_after_s), 1)
