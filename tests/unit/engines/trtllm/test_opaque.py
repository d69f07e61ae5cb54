from __future__ import annotations

import enum
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from python_backends.core.errors import HandoffRefused, RefusalReason
from python_backends.engines.trtllm.opaque import pack, unpack


class Style(enum.IntEnum):
    CONTEXT_FIRST = 0
    GENERATION_FIRST = 1


@dataclass(slots=True)
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass(slots=True, kw_only=True)
class Params12:
    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    multimodal_embedding_handles: list[dict[str, Any]] | None = None


@dataclass(slots=True, kw_only=True)
class Params13(Params12):
    disagg_request_id: int | None = None
    ctx_dp_rank: int | None = None
    ctx_info_endpoint: str | None = None
    schedule_style: Style | None = None
    ctx_usage: dict[str, int] | None = None
    first_gen_log_probs: list[dict[int, Logprob]] | None = None
    first_gen_logits: Any = field(default=None)


BASIC: dict[str, Any] = {"first_gen_tokens": [17], "ctx_request_id": 2**63 - 1, "opaque_state": b"\0\xff\x80state"}


def context(kind: type[Params12] = Params12, **fields: Any) -> Params12:
    return kind(request_type="context_only", **{**BASIC, **fields})


def refusal(packed: bytes) -> HandoffRefused:
    with pytest.raises(HandoffRefused) as refused:
        unpack(packed, Params12, Logprob)
    assert refused.value.reason is RefusalReason.MALFORMED
    return refused.value


def test_the_other_half_has_all_of_it_and_a_type_of_its_own() -> None:
    assert unpack(pack(context(draft_tokens=[1, 2])), Params12, Logprob) == Params12(
        request_type="generation_only", draft_tokens=[1, 2], **BASIC
    )


def test_every_kind_of_field_of_later_releases() -> None:
    fields: dict[str, Any] = {
        "disagg_request_id": 2**62 + 5,
        "ctx_dp_rank": 3,
        "ctx_info_endpoint": "tcp://10.0.0.1:5555",
        "schedule_style": Style.GENERATION_FIRST,
        "ctx_usage": {"prompt_tokens": 9},
        "first_gen_log_probs": [{17: Logprob(-0.25, 1), 4: Logprob(-2.0, None)}],
    }
    received = unpack(pack(context(Params13, **fields)), Params13, Logprob)
    assert received == Params13(request_type="generation_only", **BASIC, **fields)
    assert isinstance(received.first_gen_log_probs[0][17], Logprob)


def test_releases_with_more_and_with_fewer_fields_understand_each_other() -> None:
    newer = pack(context(Params13, disagg_request_id=2**50, schedule_style=Style.CONTEXT_FIRST))
    assert unpack(newer, Params12, Logprob) == Params12(request_type="generation_only", **BASIC)
    assert unpack(pack(context()), Params13, Logprob) == Params13(request_type="generation_only", **BASIC)


def test_tensors_and_multimodal_handles_do_not_travel() -> None:
    packed = pack(context(Params13, first_gen_logits=[object()], multimodal_embedding_handles=[{"handle": 1}]))
    received = unpack(packed, Params13, Logprob)
    assert received.first_gen_logits is received.multimodal_embedding_handles is None


def test_a_field_that_is_no_plain_data_is_not_guessed_at() -> None:
    with pytest.raises(TypeError):
        pack(context(Params13, ctx_usage={"x": object()}))


@pytest.mark.parametrize("missing", list(BASIC))
def test_what_every_release_needs_must_be_there(missing: str) -> None:
    absent: dict[str, Any] = {missing: None}
    refusal(pack(context(**absent)))


@pytest.mark.parametrize(
    "fields",
    [
        {"first_gen_tokens": []},
        {"opaque_state": "text"},
        {"ctx_request_id": "7"},
        {"first_gen_tokens": ["x"]},
        {"first_gen_tokens": b"\x07"},
    ],
)
def test_wrong_types_are_refused(fields: dict[str, Any]) -> None:
    refusal(pack(context(**fields)))


def test_another_version_is_refused() -> None:
    packed = msgspec.msgpack.encode({"version": 2, "fields": dict(BASIC)})
    assert "version 2" in str(refusal(packed))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(st.binary(max_size=200))
def test_nonsense_is_refused(packed: bytes) -> None:
    refusal(packed)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(st.dictionaries(st.sampled_from([*BASIC, "draft_tokens", "other"]), st.none() | st.integers() | st.binary() | st.text()))
def test_well_formed_nonsense_is_refused_or_harmless(fields: dict[str, Any]) -> None:
    try:
        packed = msgspec.msgpack.encode({"version": 1, "fields": fields})
    except OverflowError:
        return
    with suppress(HandoffRefused):
        assert isinstance(unpack(packed, Params12, Logprob).opaque_state, bytes)
