"""Every error that can reach a client, and how Triton names it.

    BatonError
    ├── InvalidRequest      INVALID_ARG   the request is wrong; the message names the field and the fix
    ├── Unavailable         UNAVAILABLE   try again later: nothing is wrong with the request
    │   ├── QueueFull                     refused at once by admission
    │   ├── WorkerLost                    a worker died or fell silent under the request; a retry may help
    │   └── DeadlineExceeded              the request's own deadline passed
    ├── Cancelled           CANCELLED     the client went away or cancelled
    ├── EngineFailure       INTERNAL      an engine broke while computing
    └── ConfigError         INTERNAL      a deployment file or a model directory is wrong; raised at load only

`HandoffRefused` is not in this tree: it never reaches a client, because a refused handoff costs a recompute
and not an error.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

import msgspec

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what they should be: UTF-8 that is none and endless nesting have their own."""


class TritonCode(str, Enum):
    """Names of the Triton error codes in use here (`pb_utils.TritonError.<name>`)."""

    INVALID_ARG = "INVALID_ARG"
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


class BatonError(Exception):
    """Base of all errors shown to clients. `code` is Triton's; `retryable` says whether another worker may help."""

    code: ClassVar[TritonCode] = TritonCode.INTERNAL
    retryable: ClassVar[bool] = False


class InvalidRequest(BatonError):
    """The client's request can't be served as it is."""

    code = TritonCode.INVALID_ARG


class Unavailable(BatonError):
    """Nothing is wrong with the request, but it can't be served now.

    retry_after_s: when it is worth trying again, as far as that can be told (HTTP's Retry-After).
    """

    code = TritonCode.UNAVAILABLE

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Unavailable):
    """Admission refused the request at once: the bounded queue is full."""


class WorkerLost(Unavailable):
    """The worker that held the request died, fell silent or refused it."""

    retryable = True


class DeadlineExceeded(Unavailable):
    """The request's deadline passed before its last token."""


class Cancelled(BatonError):
    """The client cancelled or disconnected."""

    code = TritonCode.CANCELLED


class EngineFailure(BatonError):
    """The engine failed while computing this request."""

    retryable = True


class ConfigError(BatonError):
    """A deployment file, model directory or environment is wrong. The message says the fix."""


class RefusalReason(str, Enum):
    """Why KV that was handed over is not used. The values label a metric, so there are few of them."""

    BAD_SIGNATURE = "bad_signature"
    MALFORMED = "malformed"
    EXPIRED = "expired"
    REPLAYED = "replayed"
    FOREIGN_FINGERPRINT = "foreign_fingerprint"
    FOREIGN_CONTENT = "foreign_content"
    STALE_EPOCH = "stale_epoch"
    DIGEST_MISMATCH = "digest_mismatch"
    TRANSFER_FAILED = "transfer_failed"
    TRANSFER_TIMEOUT = "transfer_timeout"
    UNSUPPORTED = "unsupported"  # the engine can't hand over a request of this kind


class HandoffRefused(Exception):
    """KV of a handoff must not be used; the decode worker recomputes and counts `reason`."""

    def __init__(self, reason: RefusalReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail
