from __future__ import annotations

import asyncio

import pytest

from python_backends.core.errors import TritonCode
from python_backends.core.messages import Output, RequestFailed, TokenChunk
from python_backends.core.types import RequestId, WorkerId
from router.mailroom import Box, Mailroom

R1, R2 = RequestId("r1"), RequestId("r2")
D0, D1 = WorkerId("d0"), WorkerId("d1")


def chunk(request_id: RequestId, token: int = 1) -> TokenChunk:
    return TokenChunk(request_id, [token], 0)


def contents(box: Box) -> list[Output]:
    async def take() -> list[Output]:
        taken = []
        while not box._outputs.empty():
            taken.append(await asyncio.wait_for(box.get(), 1))
        return taken

    return asyncio.run(take())


def test_outputs_find_their_box_in_order() -> None:
    mailroom = Mailroom()
    with mailroom.box(R1, D0) as first, mailroom.box(R2, D0) as second:
        assert mailroom.deliver([chunk(R1, 1), chunk(R2, 2), chunk(R1, 3)]) == []
        assert contents(first) == [chunk(R1, 1), chunk(R1, 3)]
        assert contents(second) == [chunk(R2, 2)]


def test_what_nobody_waits_for_is_handed_back() -> None:
    mailroom = Mailroom()
    with mailroom.box(R1, D0):
        assert mailroom.deliver([chunk(R2), chunk(R1)]) == [chunk(R2)]
    assert mailroom.deliver([chunk(R1)]) == [chunk(R1)]


def test_the_box_goes_with_whoever_waited_also_by_an_error() -> None:
    mailroom = Mailroom()
    with pytest.raises(RuntimeError), mailroom.box(R1, D0):
        raise RuntimeError
    assert mailroom.deliver([chunk(R1)]) == [chunk(R1)]


def test_a_lost_worker_is_told_to_all_who_wait_for_it() -> None:
    mailroom = Mailroom()
    with mailroom.box(R1, D0) as first, mailroom.box(R2, D1) as second:
        mailroom.deliver([chunk(R1)])
        mailroom.lose(D0, "d0 died", died=True)
        assert contents(first) == [chunk(R1), RequestFailed(R1, TritonCode.UNAVAILABLE, "d0 died", retryable=True)]
        assert contents(second) == []


def test_work_not_handed_over_is_told_if_somebody_still_waits() -> None:
    mailroom = Mailroom()
    with mailroom.box(R1, D0) as box:
        mailroom.fail([R1, R2], "not loaded")
        assert contents(box) == [RequestFailed(R1, TritonCode.UNAVAILABLE, "not loaded", retryable=True)]
