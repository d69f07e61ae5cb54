"""Fields by release: 1.3 has more."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from ._knobs import release


class DisaggScheduleStyle(enum.IntEnum):
    CONTEXT_FIRST = 0
    GENERATION_FIRST = 1


@dataclass(slots=True, kw_only=True)
class _Params12:
    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    multimodal_embedding_handles: list[dict[str, Any]] | None = None
    multimodal_hashes: list[list[int]] | None = None


@dataclass(slots=True, kw_only=True)
class _Params13(_Params12):
    disagg_request_id: int | None = None
    ctx_dp_rank: int | None = None
    ctx_info_endpoint: str | None = None
    schedule_style: DisaggScheduleStyle | None = None
    ctx_usage: dict[str, int] | None = None
    first_gen_log_probs: list[Any] | None = None
    first_gen_logits: list[Any] | None = field(default=None, repr=False)


DisaggregatedParams: Any = _Params13 if release() >= (1, 3) else _Params12
