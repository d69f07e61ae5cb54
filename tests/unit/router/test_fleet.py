from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.core.messages import StepSample
from python_backends.core.types import Epoch, Role, WorkerId, WorkerLoad
from router.fleet import Charge, Fleet
from tests.unit.router.fleet_views import heartbeat, put

D = WorkerId("decode")


def test_a_worker_is_up_from_its_first_heartbeat() -> None:
    fleet = Fleet()
    assert fleet.get(D) is None
    assert fleet.hear(heartbeat(), now=1.0)
    assert not fleet.hear(heartbeat(sequence=7), now=2.0)
    (worker,) = fleet.up()
    assert (worker.id, worker.epoch, worker.heard, worker.heartbeat.events_sequence) == (D, 1, 2.0, 7)


def test_a_lost_worker_is_known_but_not_up() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(), now=1.0)
    assert fleet.lose(D)
    assert not fleet.lose(D)
    assert not fleet.lose(WorkerId("nobody"))
    assert fleet.up() == []
    assert [worker.up for worker in fleet] == [False]


def test_messages_count_only_in_the_present_life() -> None:
    fleet = Fleet()
    assert not fleet.is_current(D, Epoch(1))
    fleet.hear(heartbeat(epoch=1), now=1.0)
    assert fleet.is_current(D, Epoch(1))
    assert not fleet.is_current(D, Epoch(2))
    fleet.lose(D)
    assert not fleet.is_current(D, Epoch(1))
    fleet.hear(heartbeat(epoch=2), now=2.0)
    assert fleet.is_current(D, Epoch(2))
    assert not fleet.is_current(D, Epoch(1))


def test_a_life_that_is_over_is_known_as_such() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(epoch=1), now=1.0)
    assert not fleet.is_over(Epoch(1))
    fleet.hear(heartbeat(epoch=2), now=2.0)
    assert fleet.is_over(Epoch(1))
    fleet.bury(Epoch(2))
    assert fleet.is_over(Epoch(2))


def test_a_silent_worker_that_speaks_again_is_up_again_and_owes_nothing() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(), now=1.0)
    fleet.charge(D, 10)
    fleet.lose(D)
    assert fleet.hear(heartbeat(), now=9.0)
    assert [(worker.requests, worker.prefill_tokens) for worker in fleet.up()] == [(0, 0)]


def test_silence_is_told_by_the_time_of_the_last_heartbeat() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat("old"), now=1.0)
    fleet.hear(heartbeat("new"), now=5.0)
    assert [worker.id for worker in fleet.silent(since=3.0)] == ["old"]
    fleet.lose(WorkerId("old"))
    assert fleet.silent(since=3.0) == []


def test_charges_count_and_are_undone_once() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(), now=1.0)
    (worker,) = fleet.up()
    first, second = fleet.charge(D, 10, context=30, kv_tokens=20), fleet.charge(D, 5, context=5, kv_tokens=5)
    assert (worker.requests, worker.prefill_tokens, worker.context_tokens, worker.kv_share()) == (2, 15, 35, 25 / 16000)
    assert worker.streams == 0
    for _ in range(2):
        first.prefilled()
    assert (worker.requests, worker.streams, worker.context_tokens) == (2, 1, 35)
    first.grow(7)
    assert worker.context_tokens == 42
    for _ in range(2):
        first.undo()
        second.undo()
    first.grow(7)
    assert (worker.requests, worker.prefill_tokens, worker.context_tokens, worker.kv_share()) == (0, 0, 0, 0)


def test_a_charge_to_an_earlier_life_is_void() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(epoch=1), now=1.0)
    old = fleet.charge(D, 10)
    fleet.hear(heartbeat(epoch=2), now=2.0)
    new = fleet.charge(D, 3)
    old.undo()
    (worker,) = fleet.up()
    assert (worker.requests, worker.prefill_tokens) == (1, 3)
    new.undo()
    fleet.charge(WorkerId("nobody"), 3).undo()


def step(tokens: int, streams: int = 0) -> StepSample:
    return StepSample(tokens, tokens * tokens / 2, streams, 0, ms=1.0 + tokens)


def test_steps_count_the_prompts_down_as_the_engine_shares_them() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(), now=1.0)
    (worker,) = fleet.up()
    oldest, long, short = fleet.charge(D, 1000), fleet.charge(D, 500), fleet.charge(D, 50)
    fleet.stepped(D, [step(200)])
    assert list(worker.prompts.values()) == [900, 449, 1]  # half for the oldest, then the shortest: never quite done
    assert worker.prefill_tokens == 1350
    short.prefilled()
    assert (worker.prefill_tokens, worker.streams) == (1349, 1)
    long.undo()
    oldest.undo()
    short.undo()
    assert (worker.prefill_tokens, worker.requests) == (0, 0)


def test_what_an_engine_computed_in_another_order_is_set_right_when_a_prompt_ends() -> None:
    """A first-come-first-served engine: the tokens that were counted as done of others are not."""
    fleet = Fleet()
    fleet.hear(heartbeat(), now=1.0)
    (worker,) = fleet.up()
    first, _ = fleet.charge(D, 100), fleet.charge(D, 60)
    fleet.stepped(D, [step(100)])
    assert worker.prefill_tokens == 60
    first.prefilled()
    assert worker.prefill_tokens == pytest.approx(60, abs=2)


@given(st.lists(st.tuples(st.sampled_from(["new", "step", "done", "end"]), st.integers(1, 400)), max_size=60))
def test_the_tokens_ahead_are_those_of_the_prompts(events: list[tuple[str, int]]) -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(step_tokens=60 * 400), now=1.0)  # no prompt here is a long one
    (worker,) = fleet.up()
    charges: list[Charge] = []
    for event, number in events:
        if event == "new":
            charges.append(fleet.charge(D, number, number, number))
        elif event == "step":
            fleet.stepped(D, [step(number)])
        elif charges:
            charge = charges[number % len(charges)]
            charge.prefilled() if event == "done" else charge.undo()
        assert worker.prefill_tokens == sum(worker.prompts.values())
        assert all(left >= 1 for left in worker.prompts.values())
        assert worker.crowd() == (sum(worker.prompts.values()), False)
        assert 0 <= worker.streams <= worker.requests
    for charge in charges:
        charge.undo()
    assert (worker.requests, worker.prefill_tokens, worker.context_tokens, worker.kv_share()) == (0, 0, 0, 0)


def test_the_least_loaded_come_first_as_loads_change() -> None:
    fleet = Fleet()
    workers = [put(fleet, f"p{i}", Role.PREFILL, prompts=[100 * (5 - i)]) for i in range(5)]
    ranking = fleet.ranked[Role.PREFILL]
    assert [worker.id for worker in ranking] == ["p4", "p3", "p2", "p1", "p0"]
    charge = fleet.charge(workers[4].id, 5000)
    assert [worker.id for worker in ranking] == ["p3", "p2", "p1", "p0", "p4"]
    charge.undo()
    fleet.lose(workers[3].id)
    assert [worker.id for worker in ranking] == ["p4", "p2", "p1", "p0"]
    assert fleet.ranked[Role.DECODE].few(4, lambda worker: True, Random(0)) == []


def test_of_many_near_equals_a_few_are_drawn_and_the_unable_are_skipped() -> None:
    fleet = Fleet()
    for i in range(50):
        put(fleet, f"p{i}", Role.PREFILL)
    put(fleet, "busy", Role.PREFILL, prompts=[900])
    ranking = fleet.ranked[Role.PREFILL]
    drawn = {worker.id for seed in range(40) for worker in ranking.few(4, lambda worker: True, Random(seed))}
    assert len(drawn) > 25
    assert "busy" not in drawn
    assert [worker.id for worker in ranking.few(4, lambda worker: worker.id == "busy", Random(0))] == ["busy"]
    assert len({worker.id for worker in ranking.few(99, lambda worker: True, Random(0))}) == 51


def test_kv_room_is_what_neither_requests_from_here_nor_others_have() -> None:
    fleet = Fleet()
    worker = put(fleet, "d", Role.DECODE, total_blocks=10)  # 160 tokens
    assert worker.has_kv_for(1000)  # one request may always come
    fleet.charge(worker.id, 0, 100, kv_tokens=100)
    assert worker.has_kv_for(60)
    assert not worker.has_kv_for(61)
    fleet.hear(heartbeat("d", load=WorkerLoad(held_blocks=9, total_blocks=10)), 1.0)
    assert not worker.has_kv_for(17)


def test_a_new_life_of_a_worker_knows_what_the_former_has_learned() -> None:
    fleet = Fleet()
    former = put(fleet, "d", Role.DECODE)
    fleet.hear(heartbeat("d", epoch=2), 1.0)
    again = fleet.get(WorkerId("d"))
    assert again is not former
    assert again is not None
    assert again.model is former.model
    fleet.hear(heartbeat("d", epoch=3, fingerprint="other weights"), 1.0)
    anew = fleet.get(WorkerId("d"))
    assert anew is not None
    assert anew.model is not former.model


def test_a_worker_that_tells_nothing_is_taken_to_be_like_the_others() -> None:
    fleet = Fleet()
    known = put(fleet, "d0", Role.DECODE)
    known.model.samples = 1
    fleet.hear(heartbeat("d1"), 1.0)
    silent = fleet.get(WorkerId("d1"))
    assert silent is not None
    assert silent.model.coefficients == known.model.coefficients
    assert silent.model is not known.model


def test_room_is_told_when_there_may_be_some() -> None:
    fleet = Fleet()
    told: list[None] = []
    fleet.on_room = lambda: told.append(None)
    fleet.hear(heartbeat(), 1.0)
    charge = fleet.charge(D, 10)
    events: list[Callable[[], object]] = [
        lambda: fleet.stepped(D, [step(5)]),
        charge.prefilled,
        charge.undo,
        lambda: fleet.hear(heartbeat(load=WorkerLoad(running_requests=2)), 2.0) or fleet.hear(heartbeat(), 3.0),
        lambda: fleet.lose(D),
    ]
    for event in events:
        told.clear()
        event()
        assert told


def test_who_waits_is_woken_by_every_change() -> None:
    async def scenario() -> None:
        fleet = Fleet()
        changes: list[Callable[[], object]] = [
            lambda: fleet.hear(heartbeat(), 1.0),
            lambda: fleet.lose(D),
            lambda: fleet.hear(heartbeat(epoch=2), 1.0),
        ]
        for change in changes:
            waiting = [asyncio.create_task(fleet.wait_for_change(60)) for _ in range(3)]
            await asyncio.sleep(0)
            change()
            await asyncio.wait_for(asyncio.gather(*waiting), 1)

    asyncio.run(scenario())


def test_waiting_ends_with_the_time() -> None:
    async def scenario() -> None:
        fleet = Fleet()
        began = time.monotonic()
        await fleet.wait_for_change(0.02)
        await fleet.wait_for_change(-1)
        assert 0.015 < time.monotonic() - began < 1

    asyncio.run(scenario())


def test_a_change_does_not_swallow_a_cancellation() -> None:
    """Both in one turn of the loop: the request was cancelled, whoever came up."""

    async def scenario() -> None:
        fleet = Fleet()
        waiting = asyncio.create_task(fleet.wait_for_change(60))
        await asyncio.sleep(0.01)
        fleet.hear(heartbeat(), 1.0)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting}, timeout=1)
        assert waiting.cancelled()

    asyncio.run(scenario())


def test_what_others_have_sent_to_a_worker_is_in_the_way_too() -> None:
    """Several routers share it: its heartbeats tell of more than this one knows."""
    fleet = Fleet()
    fleet.hear(heartbeat(), now=1.0)
    (worker,) = fleet.up()
    fleet.charge(D, 100).sent()
    alone = worker.load_ms
    told = WorkerLoad(queued_requests=1, queued_tokens=400, running_requests=3, total_blocks=1000)
    fleet.hear(heartbeat(load=told), now=2.0)
    assert (worker.foreign_tokens, worker.foreign_requests) == (300, 3)
    assert worker.tokens_before(50, contended=False) == 300 + 50
    assert worker.load_ms > alone
    fleet.stepped(D, [step(200)])  # of both, in their shares
    assert (worker.foreign_tokens, worker.prefill_tokens) == (150, 50)
    fleet.hear(heartbeat(load=WorkerLoad(total_blocks=1000)), now=3.0)
    assert (worker.foreign_tokens, worker.foreign_requests) == (0, 0)


def test_what_is_promised_to_a_worker_and_not_sent_yet_does_not_hide_what_others_have_there() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(), now=1.0)
    (worker,) = fleet.up()
    charges = [fleet.charge(D, 0, 1600, 1600) for _ in range(3)]  # their prompts are computed elsewhere
    others = WorkerLoad(running_requests=2, held_blocks=400, total_blocks=1000)
    fleet.hear(heartbeat(load=others), now=2.0)
    assert worker.foreign_requests == 2
    assert worker.kv_share() == pytest.approx(0.4 + 0.3)
    for charge in charges:
        charge.sent()
    with_ours = WorkerLoad(running_requests=5, held_blocks=700, total_blocks=1000)
    fleet.hear(heartbeat(load=with_ours), now=3.0)
    assert worker.foreign_requests == 2
    assert worker.kv_share() == pytest.approx(0.7)
    charges[0].undo()
    charges[1].undo()
    fleet.hear(heartbeat(load=WorkerLoad(running_requests=1, held_blocks=100, total_blocks=1000)), now=4.0)
    assert worker.foreign_requests == 0
    assert worker.kv_share() == pytest.approx(0.1)


def test_how_much_a_worker_is_given_in_advance_is_its_own_affair() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat("small", step_tokens=100, max_batch=2), now=1.0)
    fleet.hear(heartbeat("large", step_tokens=8192, max_batch=64), now=1.0)
    for name in ("small", "large"):
        for _ in range(2):
            fleet.charge(WorkerId(name), 300)
    small, large = fleet.up()
    assert (small.takes_prompt(), small.takes_stream(1)) == (False, False)
    assert (large.takes_prompt(), large.takes_stream(1)) == (True, True)


def test_places_of_a_batch_that_other_routers_have_taken_are_not_free() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat("full", max_batch=4), now=1.0)
    fleet.hear(heartbeat("free", max_batch=4), now=1.0)
    fleet.charge(WorkerId("full"), 0, 10).sent()
    others = WorkerLoad(running_requests=4, total_blocks=1000)  # of which one is from here
    fleet.hear(heartbeat("full", max_batch=4, load=others), now=2.0)
    full, free = fleet.up()
    for _ in range(3):
        fleet.charge(WorkerId("free"), 0, 10)
    assert (full.takes_stream(1), free.takes_stream(1)) == (False, True)
    assert list(fleet.ranked[Role.DECODE]) == [free, full]


def test_a_pool_of_unknown_size_is_taken_to_have_room() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(total_blocks=0), now=1.0)
    fleet.charge(D, 0, 100, 10**6)
    (worker,) = fleet.up()
    assert worker.has_kv_for(10**6)


def test_streams_that_guess_ahead_get_their_tokens_sooner() -> None:
    fleet = Fleet()
    fleet.hear(heartbeat(), now=1.0)
    (worker,) = fleet.up()
    for _ in range(200):
        fleet.stepped(D, [StepSample(0, 0.0, 4, 400, ms=20.0, decode_tokens=10)])
    assert worker.tokens_per_step == pytest.approx(2.5, rel=0.01)


def test_a_worker_that_keeps_its_steps_short_computes_less_of_a_prompt_beside_streams() -> None:
    """A step takes 2 ms, a stream 1, a prompt token 0.1."""
    fleet = Fleet()
    assert put(fleet, "free", Role.DECODE, streams=8).chunk(0.0) == 256
    kept = put(fleet, "kept", Role.DECODE, streams=8, step_ms=20.0)
    assert kept.chunk(0.0) == 8 + 100
    assert kept.prefill_rate() < put(fleet, "idle", Role.DECODE, step_ms=20.0).prefill_rate()
    assert put(fleet, "alone", Role.DECODE, step_ms=20.0).chunk(0.0) == 256, "nobody waits"


@pytest.mark.parametrize(
    ("streams", "blocks", "longest_ms", "fill"),
    [
        (4, 0, 0.0, 4 / 8),  # of its batch
        (4, 5, 0.0, 4 * 16 / 80),  # of its pool
        (4, 0, 7.0, 4 / 5),  # a step of 2 ms and 1 for each: of five streams
        (4, 0, 2.5, 4 / 8),  # which no stream keeps, so nobody is kept away for it
        (0, 5, 7.0, 0.0),
        (12, 0, 0.0, 12 / 8),
    ],
)
def test_a_worker_is_as_full_as_what_is_fullest(streams: int, blocks: int, longest_ms: float, fill: float) -> None:
    worker = put(Fleet(), "d", Role.DECODE, total_blocks=blocks)
    worker.requests = streams
    worker.kv.take(16 * streams, 0)
    assert worker.fill(longest_ms) == pytest.approx(fill)


def test_a_worker_whose_steps_are_often_late_is_full_sooner() -> None:
    worker = put(Fleet(), "d", Role.DECODE, streams=4, step_ms=6.0)
    assert worker.fill(7.0) == pytest.approx(4 / 4)
    worker.foreign_requests = 2
    assert worker.fill(7.0) == pytest.approx(6 / 4)


def test_who_has_no_room_for_another_stream_comes_last_however_short_its_steps_are() -> None:
    """Streams that are young have short steps, and their whole answers to come."""
    fleet = Fleet()
    young, old = (
        put(fleet, name, Role.DECODE, total_blocks=120, coefficients=(2.0, 0.1, 0.0, 1.0, 0.01)) for name in ("y", "o")
    )
    for _ in range(4):
        fleet.charge(young.id, 0, 10, kv_tokens=10, output_tokens=400).sent()
    load = WorkerLoad(total_blocks=120, held_blocks=48, running_requests=3, output_tokens=700)
    for _ in range(3):
        fleet.charge(old.id, 0, 250, kv_tokens=10, output_tokens=400).sent()
    fleet.hear(heartbeat("o", total_blocks=120, load=load), 1.0)
    assert old.model.step_ms(0, 0, 3, old.context_tokens) > young.model.step_ms(0, 0, 4, young.context_tokens)
    assert not young.has_kv_for(10, 400)
    assert old.has_kv_for(10, 400)
    assert [worker.id for worker in fleet.ranked[Role.DECODE]] == ["o", "y"]
    assert [worker.id for worker in fleet.ranked[Role.DECODE].few(1, lambda worker: True, Random(0))] == ["o"]
