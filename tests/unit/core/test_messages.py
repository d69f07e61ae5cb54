from __future__ import annotations

import msgspec
import pytest

from python_backends.core.errors import TritonCode
from python_backends.core.messages import (
    Abort,
    BlockEvents,
    FromWorker,
    Look,
    Outputs,
    ReleaseLease,
    RequestFailed,
    Resync,
    RouterHeartbeat,
    TokenChunk,
    ToWorker,
    encode,
    from_worker_decoder,
    to_worker_decoder,
)
from python_backends.core.types import Epoch, FinishReason, RequestId, TokenLogprob, WorkerId


@pytest.mark.parametrize(
    "message",
    [
        Outputs(
            WorkerId("decode"),
            Epoch(2**63 + 1),
            [
                TokenChunk(RequestId("a"), [1, 2], 0, [TokenLogprob(1, -0.5, [(1, -0.5)])], FinishReason.STOP),
                RequestFailed(RequestId("b"), TritonCode.UNAVAILABLE, "busy", True),
            ],
        ),
        BlockEvents(WorkerId("decode"), Epoch(1), 3, [b"\0" * 16], [], reset=True),
    ],
)
def test_worker_messages_survive_the_channel(message: FromWorker) -> None:
    assert from_worker_decoder.decode(encode(message)) == message


@pytest.mark.parametrize(
    "message", [RouterHeartbeat("r", 1, "host", "place", False), Abort([RequestId("a")]), ReleaseLease(["l"]), Resync(), Look()]
)
def test_router_messages_survive_the_channel(message: ToWorker) -> None:
    assert to_worker_decoder.decode(encode(message)) == message


def test_message_for_the_other_direction_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        from_worker_decoder.decode(encode(Resync()))
    with pytest.raises(msgspec.ValidationError):
        to_worker_decoder.decode(encode(BlockEvents(WorkerId("d"), Epoch(1), 1, [], [])))
