"""What the house makes of what workers say about their stores."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import cast

import msgspec
import pytest

from python_backends.core.config import Deployment, WorkerConfig
from python_backends.core.messages import Heartbeat, Lent, Located, Outputs, Work
from python_backends.core.types import BlockHash, LeaseEnd, RequestId, Role, StoreCounts, WorkerId
from router.house import House, _has_stores_of
from router.tokenizer import Tokenizer
from router.types import RouteDecision, Slo, Way, Wish
from tests.flow.house import Counts, NumberTokenizer
from tests.unit.router.fleet_views import heartbeat

PROMPT = list(range(100))
FULL_BLOCKS = 6


class Calls:
    """Workers that find so many blocks in their stores. Implements router.seams.Calls."""

    def __init__(self, blocks: int | None) -> None:
        """None: they don't answer."""
        self._blocks = blocks
        self.house: House | None = None
        self.asked: list[tuple[WorkerId, int]] = []
        self.aborted: list[RequestId] = []

    def locate(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None:
        assert self.house is not None
        self.asked.append((worker, len(hashes)))
        view = self.house.fleet.get(worker)
        if self._blocks is not None and view is not None:
            self.house.hear_outputs(Outputs(worker, view.epoch, [Located(request_id, self._blocks)]))

    def lend(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None: ...

    def submit(self, worker: WorkerId, work: Work) -> None: ...

    def abort(self, worker: WorkerId, request_id: RequestId) -> None:
        self.aborted.append(request_id)

    def release(self, worker: WorkerId, lease_id: str, end: LeaseEnd) -> None: ...


def decide(calls: Calls, *beats: Heartbeat) -> tuple[RouteDecision, dict[WorkerId, int]]:
    """Where a request goes after the stores were asked, and what they are taken to have."""
    config = Deployment(workers=(WorkerConfig(Role.DECODE),))

    async def decided() -> tuple[RouteDecision, dict[WorkerId, int]]:
        house = House(config, cast(Tokenizer, NumberTokenizer()), calls, Counts(), random=Random(0))
        calls.house = house
        for beat in beats:
            house.hear_heartbeat(beat, 0.0)
        try:
            prompt = house.prompt(PROMPT, "")
            stored = await house.look_in_stores(prompt, WorkerId("decode")) if house.has_stores else {}
            choice = house.choose(prompt, Wish.AUTO, Slo(), 16, set(), stored)
            assert choice is not None
            return choice.decision, stored
        finally:
            house.close()

    return asyncio.run(decided())


def beat(name: str, role: Role = Role.DECODE, *, host: str = "here", **fields: object) -> Heartbeat:
    return msgspec.structs.replace(heartbeat(name, role, **fields), host=host)  # type: ignore[arg-type]


PREFILL = beat("prefill", Role.PREFILL)


def test_without_stores_nobody_is_asked() -> None:
    calls = Calls(FULL_BLOCKS)
    assert decide(calls, PREFILL, beat("decode"))[1] == {}
    assert calls.asked == []


@pytest.mark.parametrize("blocks", [FULL_BLOCKS, 2, 0, None])
def test_what_the_stores_have_is_not_computed(blocks: int | None) -> None:
    calls = Calls(blocks)
    decision, stored = decide(calls, PREFILL, beat("decode", stores=["remote"]), beat("other"))
    tokens = 16 * (blocks or 0)
    assert stored == ({"decode": tokens} if tokens else {})
    assert calls.asked == [("decode", FULL_BLOCKS)]
    if blocks == FULL_BLOCKS:
        assert (decision.way, decision.decode, decision.prefill_tokens) == (Way.CACHED, "decode", 4)
        assert "96 of 100 tokens in the stores" in decision.why


class _Lender(Calls):
    """Lends when the test says so, and keeps what is given back."""

    def __init__(self) -> None:
        super().__init__(0)
        self.questions: list[RequestId] = []
        self.released: list[str] = []

    def lend(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None:
        self.questions.append(request_id)

    def release(self, worker: WorkerId, lease_id: str, end: LeaseEnd) -> None:
        self.released.append(lease_id)


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_loan_that_comes_together_with_the_cancellation_is_given_back(turns: int) -> None:
    """turns: of the event loop that lie between the two."""
    calls = _Lender()

    async def borrow() -> None:
        house = House(Deployment(workers=(WorkerConfig(Role.DECODE),)), cast(Tokenizer, NumberTokenizer()), calls, Counts())
        house.hear_heartbeat(PREFILL, 0.0)
        task = asyncio.create_task(house.borrow(WorkerId("prefill"), house.prompt(PROMPT, "")))
        while not calls.questions:
            await asyncio.sleep(0)
        house.hear_outputs(Outputs(PREFILL.worker, PREFILL.epoch, [Lent(calls.questions[0], 32, b"ticket", "lease")]))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        house.close()
        if isinstance(outcome, asyncio.CancelledError):
            assert calls.released == ["lease"]
        else:
            assert isinstance(outcome, Lent)

    asyncio.run(asyncio.wait_for(borrow(), 10))


@pytest.mark.parametrize(("place", "host", "shares"), [("/a", "here", True), ("/a", "there", False), ("/b", "here", False)])
def test_a_node_store_is_of_its_host_alone(place: str, host: str, shares: bool) -> None:
    one = msgspec.structs.replace(beat("one", stores=["node", "remote"]), node_place="/a")
    other = msgspec.structs.replace(beat("other", stores=["node", "remote"], host=host), node_place=place)
    assert _has_stores_of(one, other) is shares
    assert _has_stores_of(one, one)
    afar = msgspec.structs.replace(one, stores={"remote": StoreCounts()}, node_place="")
    assert _has_stores_of(afar, other), "a remote store is everybody's"
    assert not _has_stores_of(one, msgspec.structs.replace(other, fingerprint="another"))


def test_of_workers_that_left_for_good_the_last_ones_are_remembered() -> None:
    """Each pod that ever was has a name of its own."""
    calls = Calls(0)

    async def come_and_go() -> None:
        house = House(Deployment(workers=(WorkerConfig(Role.DECODE),)), cast(Tokenizer, NumberTokenizer()), calls, Counts())
        for index in range(300):
            pod = beat(f"decode_{index}")
            house.hear_heartbeat(pod, 0.0)
            with house.mailroom.box(RequestId(f"r{index}"), pod.worker):
                house.lose(pod.worker, "its pod has gone")
            house.forget(pod.worker)
        for index in (0, 299):
            house.hear_heartbeat(beat(f"decode_{index}"), 1.0)
        house.close()

    asyncio.run(come_and_go())
    assert calls.aborted == ["r299"], "it was only cut off, and stops what nobody waits for"
