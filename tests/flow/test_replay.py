"""Signed work that is captured and sent again: computed once, for whom it was meant, and nobody's text changes."""

from __future__ import annotations

import time

import pytest

from python_backends.core.errors import InvalidRequest
from python_backends.core.messages import DecodeWork, PrefillWork, Work
from python_backends.core.orders import OrderBook
from python_backends.core.types import GenerateRequest, RequestId, SamplingParams, WorkerId
from router.seams import Destination
from router.types import Wish
from tests.flow.house import GREEDY, FlowHouse, InProcess, deployment, eventually, fake_engine, prompt, reference

LONG = SamplingParams(temperature=0, max_tokens=60)


class Wire:
    """Records what is sealed on its way to the workers of a house."""

    def __init__(self, house: FlowHouse) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self._house = house
        self._orders = OrderBook(house.key)
        house.service._submit = self._submit

    def _submit(self, worker: Destination, work: Work, failed: object) -> None:
        sealed = self._orders.seal(worker.worker, worker.epoch, [work])
        self.sent.append((worker.model, sealed))
        self._house.workers[worker.model].worker.submit(sealed)


def test_work_sent_again_while_it_runs_and_after_it_ended_is_not_computed() -> None:
    with FlowHouse(deployment(2, 2, engine=fake_engine(step_us=1000))) as house:
        wire = Wire(house)
        answer = house.begin(prompt(40), LONG, Wish.REMOTE)
        assert answer.first.wait(5)
        assert eventually(lambda: len(wire.sent) == 2)
        for _ in range(2):
            for _, sealed in wire.sent:
                for worker in house.workers.values():  # where it was sent, and where it was not
                    assert isinstance(worker, InProcess)
                    with pytest.raises(InvalidRequest, match="work:"):
                        worker.worker.submit(sealed)
            answer.wait()
        assert answer.ids == reference(prompt(40), LONG)
        assert answer.late == 0
        house.assert_nothing_held()


def test_a_restarted_worker_takes_no_work_of_its_earlier_life() -> None:
    with FlowHouse(deployment(0, 1)) as house:
        wire = Wire(house)
        assert house.ask(prompt(40), GREEDY).ids == reference(prompt(40), GREEDY)
        house.workers["decode_0"].close()
        house.start("decode_0")
        with pytest.raises(InvalidRequest, match="earlier life"):
            house.workers["decode_0"].worker.submit(wire.sent[0][1])


def test_work_of_a_router_that_is_gone_is_refused() -> None:
    """It was on its way when the router died: nobody would ever abort it."""
    with FlowHouse() as house:
        assert house.ask(prompt(40)).error is None
        name = house.service.house.name
        house.replace_router()
        worker = house.workers["prefill_0"].worker
        assert eventually(lambda: name not in worker._live)
        request = GenerateRequest(RequestId(f"{name}.77.1p"), prompt(40), SamplingParams(seed=1), time.monotonic() + 600)
        with pytest.raises(InvalidRequest, match="hears nothing from router"):
            worker.submit(OrderBook(house.key).seal(WorkerId("prefill_0"), worker._epoch, [PrefillWork(request)]))
        assert house.ask(prompt(40)).error is None
        house.assert_nothing_held()


def test_a_request_whose_abort_came_first_leaves_no_entry() -> None:
    with FlowHouse(deployment(0, 1)) as house:
        assert house.ask(prompt(40)).error is None
        worker = house.workers["decode_0"].worker
        name = house.service.house.name
        request = GenerateRequest(RequestId(f"{name}.77.1d"), prompt(40), SamplingParams(seed=1), time.monotonic() + 0.2)
        house.on_loop(lambda: house.service.abort(WorkerId("decode_0"), request.request_id))
        assert eventually(lambda: request.request_id in worker._engine._aborted)
        worker.submit(OrderBook(house.key).seal(WorkerId("decode_0"), worker._epoch, [DecodeWork(request)]))
        assert eventually(lambda: not worker._live[name])
        house.assert_nothing_held()
