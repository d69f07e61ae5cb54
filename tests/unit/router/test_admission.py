from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.core.config import RouterConfig
from python_backends.core.errors import BatonError, DeadlineExceeded, InvalidRequest, QueueFull, Unavailable
from router.admission import Admission, Forecast, Place
from router.clock import Clock
from router.types import Slo, Wish


class Time(Clock):
    def __init__(self) -> None:
        self.seconds = 100.0

    def now(self) -> float:
        return self.seconds


class Workers:
    """Stands for the fleet: as many requests may start as there is room."""

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self.started: list[str] = []


class Visitor:
    """Implements admission.Guest."""

    def __init__(self, workers: Workers, name: str = "", forecast: Forecast | None = Forecast(50, 50)) -> None:  # noqa: B008
        self.workers = workers
        self.name = name
        self.slo = Slo()
        self.verdict: BatonError | float = 60.0
        self.broken: BatonError | None = None
        self.lacks_stream = False
        self._forecast = forecast

    def start(self) -> bool:
        if self.broken is not None:
            raise self.broken
        if not self.workers.room:
            return False
        self.workers.room -= 1
        self.workers.started.append(self.name)
        return True

    def forecast(self) -> Forecast | None:
        return self._forecast

    def give_up(self) -> BatonError | float:
        return self.verdict


def door(max_requests: int = 300, max_queued_tokens: int = 100_000, tokens_per_ms: float = 1.0) -> Admission:
    config = RouterConfig(max_requests=max_requests, max_queued_tokens=max_queued_tokens)
    return Admission(config, Time(), lambda: tokens_per_ms, long_prompt=10_000)


def place(admission: Admission, tokens: int = 100, tenant: str = "", priority: int = 0, wish: Wish = Wish.AUTO) -> Place:
    entered = admission.enter()
    entered.queue(tokens, tenant, priority, wish)
    return entered


def run(scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10))


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# --- the bounds --------------------------------------------------------------------------------------------------------


def test_places_are_counted_and_refused_beyond_the_limit() -> None:
    admission = door(max_requests=2)
    first = admission.enter()
    admission.enter()
    with pytest.raises(QueueFull, match=r"router\.max_requests") as refused:
        admission.enter()
    assert refused.value.retry_after_s is not None
    assert admission.requests == 2
    first.leave()
    admission.enter()


def test_waiting_tokens_are_bounded_but_one_prompt_may_always_wait() -> None:
    admission = door(max_queued_tokens=100, tokens_per_ms=0.01)
    long = admission.enter()
    long.queue(1000)
    short = admission.enter()
    with pytest.raises(QueueFull, match=r"router\.max_queued_tokens.*try again in 90\.1 s") as refused:
        short.queue(1)
    assert refused.value.retry_after_s == pytest.approx(90.1)
    assert admission.queued_tokens == 1000
    short.leave()
    long.first_token()
    assert admission.queued_tokens == 0


def test_a_closed_door_refuses_everybody() -> None:
    admission = door()
    inside = place(admission)
    admission.close()
    with pytest.raises(Unavailable, match="shutting down"):
        admission.enter()
    inside.leave()
    assert admission.requests == 0


def test_one_tenant_can_not_take_all_of_the_queue() -> None:
    admission = door(max_queued_tokens=1000)
    while True:
        try:
            place(admission, 50, tenant="greedy")
        except QueueFull:
            break
    assert admission.queued_tokens == 800
    place(admission, 100, tenant="modest")
    with pytest.raises(QueueFull, match="800 of them of this tenant"):
        place(admission, 50, tenant="greedy")


def test_giving_back_twice_counts_once() -> None:
    admission = door()
    place(admission, 5)
    leaving = place(admission, 7)
    for _ in range(2):
        leaving.first_token()
        leaving.leave()
    assert (admission.requests, admission.queued_tokens) == (1, 5)


@given(st.lists(st.tuples(st.sampled_from(["enter", "queue", "first", "leave"]), st.integers(0, 7), st.integers(1, 60))))
def test_the_counts_never_drift(steps: list[tuple[str, int, int]]) -> None:
    admission = door(max_requests=4, max_queued_tokens=100)
    places: list[tuple[Place, set[str]]] = []
    for step, which, tokens in steps:
        if step == "enter":
            if admission.requests < 4:
                places.append((admission.enter(), set()))
            continue
        if not places:
            continue
        place, done = places[which % len(places)]
        if step == "queue" and not done:
            try:
                place.queue(tokens, tenant="ab"[which % 2])
            except QueueFull:
                place.leave()
                done.add("leave")
            done.add("queue")
        elif step == "first":
            place.first_token()
        elif step == "leave":
            place.leave()
            done.update(("queue", "leave"))
        assert admission.requests == sum("leave" not in done for _, done in places)
        assert admission.queued_tokens >= 0
    for place, _ in places:
        place.leave()
    assert (admission.requests, admission.queued_tokens) == (0, 0)
    assert not admission._tenants


# --- turns -------------------------------------------------------------------------------------------------------------


def test_who_finds_room_goes_at_once() -> None:
    async def scenario() -> None:
        admission, workers = door(), Workers(room=1)
        await place(admission).turn(Visitor(workers, "a"))
        assert workers.started == ["a"]
        assert admission.waiting == 0

    run(scenario)


def test_the_others_go_in_turn_when_there_is_room() -> None:
    async def scenario() -> None:
        admission, workers = door(), Workers()
        waiting = [
            asyncio.create_task(place(admission, tenant=tenant, priority=priority).turn(Visitor(workers, name)))
            for name, tenant, priority in (("low", "x", 1), ("x1", "x", 0), ("x2", "x", 0), ("y1", "y", 0))
        ]
        await turns()
        assert admission.waiting == 4
        workers.room = 1
        admission.room_changed()
        await turns()
        assert workers.started == ["x1"]
        workers.room = 9
        admission.room_changed()
        await asyncio.gather(*waiting)
        assert sorted(workers.started[1:3]) == ["x2", "y1"]
        assert workers.started[3] == "low"
        assert admission.waiting == 0

    run(scenario)


def test_nobody_overtakes_those_who_wait_but_the_more_important() -> None:
    async def scenario() -> None:
        admission, workers = door(), Workers()
        early = asyncio.create_task(place(admission).turn(Visitor(workers, "early")))
        await turns()
        workers.room = 1
        late = asyncio.create_task(place(admission).turn(Visitor(workers, "late")))
        await turns()
        assert workers.started == ["early"]
        await early
        workers.room = 1
        await place(admission, priority=-1).turn(Visitor(workers, "important"))
        assert workers.started == ["early", "important"]
        late.cancel()
        await asyncio.wait({late})
        assert admission.waiting == 0

    run(scenario)


def test_who_lost_a_worker_waits_before_all_others_and_is_not_refused() -> None:
    async def scenario() -> None:
        admission, workers = door(tokens_per_ms=0.001), Workers()
        waiting = asyncio.create_task(place(admission, priority=-5).turn(Visitor(workers, "important")))
        await turns()
        again = Visitor(workers, "again", Forecast(1e9, 1e9))
        again.slo = Slo(ttft_ms=1.0)
        retrying = asyncio.create_task(place(admission).turn(again, again=True))
        await turns()
        workers.room = 2
        admission.room_changed()
        await asyncio.gather(waiting, retrying)
        assert workers.started == ["again", "important"]

    run(scenario)


def test_requests_that_force_a_way_do_not_hold_up_the_others() -> None:
    async def scenario() -> None:
        admission, remote, anywhere = door(), Workers(), Workers()
        forced = asyncio.create_task(place(admission, wish=Wish.REMOTE).turn(Visitor(remote)))
        await turns()
        anywhere.room = 1
        waiting = asyncio.create_task(place(admission).turn(Visitor(anywhere)))
        await asyncio.wait_for(waiting, 1)
        assert not forced.done()
        remote.room = 1
        admission.room_changed()
        await forced

    run(scenario)


def test_an_error_at_the_turn_goes_to_the_request() -> None:
    async def scenario() -> None:
        admission, workers = door(), Workers()
        visitor = Visitor(workers)
        waiting = asyncio.create_task(place(admission).turn(visitor))
        await turns()
        visitor.broken = InvalidRequest("too long for the workers that are left")
        admission.room_changed()
        with pytest.raises(InvalidRequest, match="too long"):
            await waiting
        assert admission.waiting == 0

    run(scenario)


def test_waiting_in_vain_ends_with_its_reason() -> None:
    async def scenario() -> None:
        admission, workers = door(), Workers()
        visitor = Visitor(workers)
        visitor.verdict = 0.01
        waiting = asyncio.create_task(place(admission).turn(visitor))
        await asyncio.sleep(0.03)
        assert not waiting.done()
        visitor.verdict = DeadlineExceeded("too late")
        with pytest.raises(DeadlineExceeded):
            await waiting
        assert admission.waiting == 0

    run(scenario)


def test_a_cancellation_in_the_very_turn_loses_nothing() -> None:
    async def scenario() -> None:
        admission, workers = door(), Workers()
        entered = place(admission)
        waiting = asyncio.create_task(entered.turn(Visitor(workers, "a")))
        await turns()
        workers.room = 1
        admission._pump()
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        assert workers.started == ["a"]  # the lifecycle says to give that back
        entered.leave()
        assert (admission.requests, admission.queued_tokens, admission.waiting) == (0, 0, 0)

    run(scenario)


# --- predicted waits ---------------------------------------------------------------------------------------------------


def with_slo(workers: Workers, ttft_ms: float, forecast: Forecast | None) -> Visitor:
    visitor = Visitor(workers, forecast=forecast)
    visitor.slo = Slo(ttft_ms=ttft_ms)
    return visitor


def test_who_would_wait_too_long_is_refused_at_once_with_a_hint() -> None:
    async def scenario() -> None:
        admission, workers = door(tokens_per_ms=2.0), Workers()
        crowd = [asyncio.create_task(place(admission, 500).turn(Visitor(workers))) for _ in range(4)]
        await turns()
        # 1050 ms, and a quarter more for what is not known yet
        with pytest.raises(QueueFull, match="first token would come in 1312 ms, and the target is 800 ms") as refused:
            await place(admission).turn(with_slo(workers, 800, Forecast(50, 50)))
        assert refused.value.retry_after_s == pytest.approx(0.5125)
        assert admission.waiting == 4
        accepted = asyncio.create_task(place(admission).turn(with_slo(workers, 1400, Forecast(50, 50))))
        await turns()
        assert admission.waiting == 5
        for task in (*crowd, accepted):
            task.cancel()
        await asyncio.wait({*crowd, accepted})

    run(scenario)


def test_another_tenant_is_not_refused_for_the_crowd_of_the_first() -> None:
    async def scenario() -> None:
        admission, workers = door(tokens_per_ms=2.0), Workers()
        crowd = [asyncio.create_task(place(admission, 500, "crowd").turn(Visitor(workers))) for _ in range(4)]
        await turns()
        other = asyncio.create_task(place(admission, 100, "other").turn(with_slo(workers, 800, Forecast(50, 50))))
        await turns()
        assert not other.done()
        for task in (*crowd, other):
            task.cancel()
        await asyncio.wait({*crowd, other})

    run(scenario)


def test_what_can_not_be_on_time_even_alone_may_wait_a_little() -> None:
    async def scenario() -> None:
        admission, workers = door(tokens_per_ms=1.0), Workers()
        first = asyncio.create_task(place(admission, 70).turn(Visitor(workers)))
        await turns()
        second = asyncio.create_task(place(admission, 100).turn(with_slo(workers, 1000, Forecast(5000, 5000))))
        await turns()
        assert not second.done()
        with pytest.raises(QueueFull):
            await place(admission, 100).turn(with_slo(workers, 1000, Forecast(5000, 5000)))
        for task in (first, second):
            task.cancel()
        await asyncio.wait({first, second})

    run(scenario)


@pytest.mark.parametrize(("took_s", "care"), [(0.5, 2.0), (0.05, 0.99)])
def test_accepted_requests_that_are_late_make_the_door_more_careful(took_s: float, care: float) -> None:
    """Where none is late it becomes a little less careful each time."""

    async def one(admission: Admission, clock: Time) -> None:
        workers = Workers()
        ahead = asyncio.create_task(place(admission, 1).turn(Visitor(workers)))
        await turns()
        entered = place(admission, 100)
        waiting = asyncio.create_task(entered.turn(with_slo(workers, 300, Forecast(10, 10))))
        await turns()
        workers.room = 2
        admission.room_changed()
        await asyncio.gather(ahead, waiting)
        clock.seconds += took_s
        entered.first_token()

    async def scenario() -> None:
        admission = door()
        clock = admission._clock
        assert isinstance(clock, Time)
        for _ in range(30):
            await one(admission, clock)
        assert (admission._margins[7] > care) if care > 1 else (0.9 < admission._margins[7] < care)
        assert admission._margins[12] == 1.0  # of prompts of another size nothing was learned

    run(scenario)


def test_without_workers_nothing_is_predicted_and_nobody_refused() -> None:
    async def scenario() -> None:
        admission, workers = door(), Workers()
        waiting = [asyncio.create_task(place(admission, 5000).turn(with_slo(workers, 1.0, None))) for _ in range(3)]
        await turns()
        assert admission.waiting == 3
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)

    run(scenario)


def test_the_rate_is_measured_while_somebody_waits() -> None:
    async def scenario() -> None:
        admission, workers = door(tokens_per_ms=1.0), Workers()
        clock = admission._clock
        assert isinstance(clock, Time)
        crowd = [asyncio.create_task(place(admission, 100).turn(Visitor(workers))) for _ in range(200)]
        await turns()
        for _ in range(100):
            clock.seconds += 0.5  # 100 tokens in 500 ms
            workers.room = 1
            admission.room_changed()
            await turns()
        assert 0.2 <= admission._rate.tokens_per_ms() < 0.4
        for task in crowd:
            task.cancel()
        await asyncio.wait(crowd)

    run(scenario)


def test_where_streams_have_to_end_first_the_wait_is_told_by_how_long_they_stay() -> None:
    """Ten at workers, of which one ends each second, and prompts that would be computed in no time."""

    async def scenario() -> None:
        admission, workers = door(tokens_per_ms=1000.0), Workers(room=30)
        clock = admission._clock
        assert isinstance(clock, Time)
        inside = [place(admission) for _ in range(10)]
        for each in inside:
            await each.turn(Visitor(workers))
            each.first_token()
        for _ in range(20):
            clock.seconds += 1.0
            inside.pop(0).leave()
            inside.append(place(admission))
            await inside[-1].turn(Visitor(workers))
            inside[-1].first_token()
        workers.room = 0

        async def come(ttft_ms: float) -> asyncio.Task[None]:
            visitor = with_slo(workers, ttft_ms, Forecast(50, 50))
            visitor.lacks_stream = True
            task = asyncio.create_task(place(admission).turn(visitor))
            await turns()
            return task

        first = await come(2000)
        assert not first.done()
        second = await come(2000)
        with pytest.raises(QueueFull, match="the target is 2000 ms"):
            await second
        third = await come(4000)
        assert not third.done()
        assert admission.waiting == 2
        for task in (first, third):
            task.cancel()
        await asyncio.wait({first, third})

    run(scenario)


def test_before_any_stream_has_ended_nobody_is_let_in_to_wait_for_ever() -> None:
    async def scenario() -> None:
        admission, workers = door(tokens_per_ms=1000.0), Workers(room=10)
        clock = admission._clock
        assert isinstance(clock, Time)
        for _ in range(10):
            await place(admission).turn(Visitor(workers))
        clock.seconds += 60.0
        visitor = with_slo(workers, 8000, Forecast(50, 50))
        visitor.lacks_stream = True
        with pytest.raises(QueueFull):
            await place(admission).turn(visitor)

    run(scenario)


def test_refusals_are_unavailable_for_clients() -> None:
    assert isinstance(QueueFull("full", 3.0), Unavailable)
    assert QueueFull("full", 3.0).retry_after_s == 3.0
    assert DeadlineExceeded("late").retry_after_s is None


def test_configuration_has_the_targets() -> None:
    config = msgspec.convert({"slo": {"ttft_ms": 500, "itl_ms": 50}}, RouterConfig)
    assert (config.slo.ttft_ms, config.slo.itl_ms, config.mode) == (500, 50, "adaptive")
