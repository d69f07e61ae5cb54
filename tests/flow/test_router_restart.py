"""Another router takes the place of one that died: what the old one began is aborted, the new one is served."""

from __future__ import annotations

import time

import msgspec
import pytest
import zmq

from python_backends.core.config import EngineConfig
from python_backends.core.messages import Abort, BlockEvents, Heartbeat, encode
from python_backends.core.types import Epoch, RequestId, Role, SamplingParams
from router.lifecycle import State
from router.types import Wish
from tests.flow.house import Answer, FlowHouse, deployment, eventually, fake_engine, prompt, reference
from tests.unit.router.fleet_views import heartbeat

ENDLESS = SamplingParams(temperature=0, max_tokens=4000)
SAMPLING = SamplingParams(seed=2, max_tokens=40)


@pytest.mark.parametrize(
    ("state", "engine"),
    [(State.PREFILLING, fake_engine(prefill_us_per_token=2000)), (State.DECODING, fake_engine(step_us=2000))],
)
def test_orphans_are_aborted_and_the_new_router_is_served(state: State, engine: EngineConfig) -> None:
    with FlowHouse(deployment(engine=engine, lease_s=1.0)) as house:
        orphans = [house.begin(prompt(150, i), ENDLESS) for i in range(3)]  # as many as are given to a worker at once
        assert eventually(lambda: all(orphan.state is state for orphan in orphans), 5)
        house.replace_router()
        answers = _ask_at_once(house)
        for i, answer in enumerate(answers):
            assert answer.wait(10).ids == reference(prompt(60, 10 + i), SAMPLING)
        house.assert_nothing_held(within=1.0 + 1.0)


def test_again_and_again() -> None:
    """Requests of each router are numbered anew; nothing of an earlier one may be taken for them."""
    with FlowHouse(deployment(engine=fake_engine(step_us=500), lease_s=1.0)) as house:
        for _ in range(6):
            orphans = [house.begin(prompt(50, i), ENDLESS) for i in range(6)]
            assert all(orphan.first.wait(5) for orphan in orphans)
            for orphan in orphans[:3]:
                house.cancel(orphan)
            house.replace_router()
            for i, answer in enumerate(_ask_at_once(house)):
                assert answer.wait(10).ids == reference(prompt(60, 10 + i), SAMPLING)
        house.assert_nothing_held(within=1.0 + 1.0)  # leases of dead routers are released by nobody


@pytest.mark.parametrize("restart", [False, True])
def test_a_router_that_was_held_up_is_given_up_and_goes_on(restart: bool) -> None:
    """Workers stop computing for it. When it is back it neither blames them nor waits for what they gave up."""
    sampling = SamplingParams(temperature=0, max_tokens=300)
    config = deployment(engine=fake_engine(step_us=4000), silent_s=0.4)
    with FlowHouse(config, processes=restart, restart=restart) as house:
        epochs = [house.epoch(name) for name in house.workers]
        answer = house.begin(prompt(50), sampling)
        assert eventually(lambda: answer.state is State.DECODING, 5)
        house.service._loop.call_soon_threadsafe(time.sleep, 1.0)
        if not restart:
            worker = house.workers["decode_0"].worker
            assert eventually(lambda: worker.heartbeat().load.held_blocks == 0, 0.8)
        assert answer.wait(10).ids == reference(prompt(50), sampling)
        assert house.counts.retries >= 1  # a heartbeat read late may cost a second one
        assert [house.epoch(name) for name in house.workers] == epochs
        house.assert_nothing_held()


def test_nonsense_on_the_channel_is_not_heeded() -> None:
    """By workers: a stranger that is no router is not served either."""
    with FlowHouse() as house, zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 500)
        stranger.connect(house.address("decode_0"))
        stranger.send(b"nonsense")
        stranger.send_multipart([b"two", b"frames"])
        stranger.send(b"")
        stranger.send(encode(Abort([RequestId("x")])))
        assert house.ask(prompt(50), SAMPLING, Wish.LOCAL).ids == reference(prompt(50), SAMPLING)
        assert stranger.poll(300) == 0


def test_nonsense_of_a_worker_is_not_heeded() -> None:
    """By the router: it says so in its log, and a worker that nobody configured has no address to speak at."""
    with (
        FlowHouse(deployment(2, 2), workers_up=False) as house,
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as impostor,
    ):
        impostor.bind(house.address("prefill_1"))
        identity, _ = impostor.recv_multipart()
        for payload in (b"nonsense", b"", encode(msgspec.structs.replace(_beat(), epoch=Epoch(5), host="elsewhere"))):
            impostor.send_multipart([identity, payload])
        assert eventually(lambda: house.is_up("strange"), 5)
        house.start("prefill_0", "decode_0")
        assert house.ask(prompt(50), SAMPLING, Wish.LOCAL).ids == reference(prompt(50), SAMPLING)


def test_caches_are_told_once_and_not_asked_for_again() -> None:
    with FlowHouse(deployment(engine=fake_engine(step_us=50))) as house:
        house.ask(prompt(5))
        assert eventually(lambda: len(house.service.house.index._sequence) == 2)
        resets = []
        apply = house.service.house.index.apply

        def watched(events: BlockEvents) -> bool:
            resets.append(events.reset)
            return apply(events)

        house.service.house.index.apply = watched  # type: ignore[method-assign]
        for _ in range(4):
            answers = [house.begin(prompt(100, i), SAMPLING) for i in range(32)]
            for answer in answers:
                answer.wait()
        assert len(resets) >= 4
        assert sum(resets) == 0


def _beat() -> Heartbeat:
    return heartbeat("strange", Role.PREFILL)


def _ask_at_once(house: FlowHouse) -> list[Answer]:
    return [house.begin(prompt(60, 10 + i), SAMPLING) for i in range(8)]
