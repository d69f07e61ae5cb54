"""How much of a pool its streams will hold together, as they grow and end."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.core.types import WorkerLoad
from router.kv_room import KvRoom

BLOCK = 16


def room(blocks: int = 1000, held: int = 0, made: int = 0) -> KvRoom:
    return KvRoom(WorkerLoad(total_blocks=blocks, held_blocks=held, output_tokens=made), BLOCK)


def load(held: int, made: int) -> WorkerLoad:
    return WorkerLoad(total_blocks=1000, held_blocks=held // BLOCK, output_tokens=made)


def test_of_streams_that_begin_together_all_will_be_held_to_their_ends() -> None:
    kv = room()
    for _ in range(10):
        kv.take(100, 400)
        kv.send(100)
    assert kv.share(10, 0) * 16_000 == 10 * 500


def test_of_streams_that_come_and_go_what_is_held_now_will_do_and_something_for_chance() -> None:
    kv = room()
    for _ in range(100):
        kv.take(10, 100)
        kv.send(10)
    kv.beat(load(held=6000, made=5000), 100, 0)  # half through on average
    held = kv.share(100, 0) * 16_000
    assert 6000 < held <= 7000
    assert held < 0.65 * 100 * 110, "and not all that they will ever hold"


@pytest.mark.parametrize(("streams", "least_used"), [(16, 0.65), (64, 0.82), (128, 0.88)])
def test_a_pool_that_is_filled_by_it_is_well_used_and_seldom_too_small(streams: int, least_used: float) -> None:
    """Streams of a pool that are let in as long as there is room, step by step. Room for every answer to its end would leave
    nearly half of the pool unused."""
    dice, answer, prompt = random.Random(streams), 200, 20
    kv = KvRoom(WorkerLoad(total_blocks=streams * (prompt + answer) // 2), 1)
    live: list[list[int]] = []  # made, left
    used, excess, steps = 0.0, 0.0, 4000
    for step in range(steps):
        made_now = sum(made for made, _ in live)
        kv.beat(WorkerLoad(held_blocks=made_now + prompt * len(live), output_tokens=made_now), len(live), 0)
        while kv.fits(prompt, answer, len(live), 0):
            kv.take(prompt, answer)
            kv.send(prompt)
            live.append([0, max(int(dice.lognormvariate(0, 0.6) * answer / 1.2), 1)])  # 200 on average
        for stream in live:
            stream[0] += 1
            stream[1] -= 1
        for stream in [stream for stream in live if not stream[1]]:
            live.remove(stream)
            kv.give_back(prompt, answer, stream[0], sent=True)
        if step > steps // 4:
            held = sum(prompt + made for made, _ in live)
            used += held / kv.pool_tokens / (steps * 3 / 4)
            excess += max(held / kv.pool_tokens - 1, 0.0) / (steps * 3 / 4)
    assert used > least_used
    assert excess < 0.01


def test_what_others_sent_there_is_seen_and_taken_to_grow_as_ones_own() -> None:
    kv = room()
    kv.take(100, 400)
    kv.send(100)
    alone = kv.share(1, 0)
    kv.beat(load(held=480, made=0), 1, 3)  # 3 more prompts
    assert kv.share(1, 3) * 16_000 == 480 + 4 * 400
    assert kv.share(1, 3) > 3 * alone


def test_a_pool_that_others_have_filled_is_full() -> None:
    kv = room(blocks=100, held=90)
    assert kv.fits(200, 0, 0, 0), "leases alone keep nobody away"
    assert not kv.fits(200, 0, 0, 3)
    assert kv.fits(100, 60, 0, 3)
    assert not kv.fits_another(0, 3), "of 480 tokens, as those are"
    assert room(blocks=100, held=60).fits_another(0, 3)


def test_what_is_leased_and_shared_counts_as_held() -> None:
    kv = room(blocks=100, held=50)
    assert kv.share(0, 0) == 0.5
    kv.take(400, 0)
    kv.send(400)
    kv.beat(WorkerLoad(total_blocks=100, held_blocks=75), 1, 0)
    assert kv.fits(400, 0, 1, 0)
    assert not kv.fits(401, 0, 1, 0)


def test_one_request_always_fits_and_where_no_size_is_known_all_do() -> None:
    assert room(blocks=10).fits(10**6, 10**6, 0, 0)
    unknown = room(blocks=0)
    unknown.take(10**9, 10**9)
    assert unknown.fits(1, 1, 5, 0)
    assert unknown.share(5, 0) == 0.0


def test_a_worker_that_keeps_room_for_whole_answers_is_asked_for_no_more_than_those() -> None:
    """As TensorRT-LLM's: it tells the room that it keeps for output as if that was made."""
    kv = room(blocks=1000)
    for _ in range(10):
        kv.take(100, 300)
        kv.send(100)
    kv.beat(load(held=10 * 1100, made=10 * 1000), 10, 0)
    assert kv.share(10, 0) * 16_000 == pytest.approx(11_000, abs=10)
    assert kv.fits(100, 300, 10, 0)
    assert not kv.fits(16_000 - 11_000 - 299, 300, 10, 0)


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500), st.floats(0, 1)), max_size=20))
def test_after_all_have_left_nothing_is_held(requests: list[tuple[int, int, float]]) -> None:
    kv = room()
    for prompt, output, _ in requests:
        kv.take(prompt, output)
        kv.send(prompt)
    for prompt, output, part in requests:
        assert kv.share(len(requests), 0) >= 0
        kv.give_back(prompt, output, int(part * output), sent=True)
    kv.beat(load(0, 0), 0, 0)
    assert kv.share(0, 0) == 0.0
