from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.core.errors import InvalidRequest, TritonCode
from python_backends.core.messages import (
    Abort,
    BlockEvents,
    DecodeWork,
    FromWorker,
    Outputs,
    PrefillWork,
    ReleaseLease,
    RequestFailed,
    Resync,
    RouterHeartbeat,
    TokenChunk,
    ToWorker,
    Work,
    encode,
    from_worker_decoder,
    seal_work,
    to_worker_decoder,
    unseal_work,
)
from python_backends.core.signing import Domain, sign
from python_backends.core.types import Epoch, FinishReason, GenerateRequest, RequestId, SamplingParams, TokenLogprob, WorkerId

KEY = b"k" * 32
REQUEST = GenerateRequest(RequestId("r1"), [1, 2, 3], SamplingParams(seed=1), deadline=9.0)
WORK: list[Work] = [PrefillWork(REQUEST), DecodeWork(REQUEST, b"ticket"), DecodeWork(REQUEST)]


def test_work_survives_the_call() -> None:
    assert unseal_work(seal_work(WORK, KEY), KEY) == WORK


def test_work_of_a_foreign_caller_is_refused_with_the_way_in() -> None:
    with pytest.raises(InvalidRequest, match="send requests to the model 'router'"):
        unseal_work(seal_work(WORK, b"x" * 32), KEY)


def test_every_flipped_byte_of_work_is_refused() -> None:
    sealed = seal_work(WORK, KEY)
    for index in range(len(sealed)):
        forged = bytearray(sealed)
        forged[index] ^= 0xFF
        with pytest.raises(InvalidRequest, match="router"):
            unseal_work(bytes(forged), KEY)


@given(st.binary(max_size=200))
def test_random_bytes_are_no_work(sealed: bytes) -> None:
    with pytest.raises(InvalidRequest, match="router"):
        unseal_work(sealed, KEY)


def test_ticket_is_no_work() -> None:
    body = msgspec.msgpack.encode(WORK)
    with pytest.raises(InvalidRequest, match="router"):
        unseal_work(sign(Domain.HANDOFF, body, KEY), KEY)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"type": "PrefillWork"}),
        msgspec.msgpack.encode([{"type": "SleepWork"}]),
        b"\x90\x90",
    ],
)
def test_signed_work_of_another_version_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="same version"):
        unseal_work(sign(Domain.WORK, body, KEY), KEY)


@pytest.mark.parametrize(
    "message",
    [
        Outputs(
            WorkerId("decode"),
            Epoch(2**63 + 1),
            [
                TokenChunk(RequestId("a"), [1, 2], [TokenLogprob(1, -0.5, [(1, -0.5)])], FinishReason.STOP),
                RequestFailed(RequestId("b"), TritonCode.UNAVAILABLE, "busy", True),
            ],
        ),
        BlockEvents(WorkerId("decode"), Epoch(1), 3, [b"\0" * 16], [], reset=True),
    ],
)
def test_worker_messages_survive_the_channel(message: FromWorker) -> None:
    assert from_worker_decoder.decode(encode(message)) == message


@pytest.mark.parametrize(
    "message", [RouterHeartbeat("r", 1, "host", "place"), Abort([RequestId("a")]), ReleaseLease(["l"]), Resync()]
)
def test_router_messages_survive_the_channel(message: ToWorker) -> None:
    assert to_worker_decoder.decode(encode(message)) == message


def test_message_for_the_other_direction_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        from_worker_decoder.decode(encode(Resync()))
    with pytest.raises(msgspec.ValidationError):
        to_worker_decoder.decode(encode(BlockEvents(WorkerId("d"), Epoch(1), 1, [], [])))
