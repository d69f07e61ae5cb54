"""However a request is served, the text is the same text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec
import pytest

from python_backends.core.config import RouterConfig, SloConfig
from python_backends.core.types import FinishReason, SamplingParams
from router.types import Way, Wish
from tests.flow.house import GREEDY, FlowHouse, ask_all, deployment, fake_engine, prompt, reference

SEEDED = SamplingParams(temperature=0.7, seed=7, max_tokens=8)
BOTH = pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])


@pytest.fixture(scope="module")
def house() -> Iterator[FlowHouse]:
    with FlowHouse(deployment(prefill=1, decode=1, aggregated=1)) as house:
        yield house


@BOTH
@pytest.mark.parametrize("length", [1, 15, 16, 17, 48, 300])
def test_every_way_gives_the_same_ids(house: FlowHouse, length: int, sampling: SamplingParams) -> None:
    ids = prompt(length, seed=int(length + 1000 * sampling.temperature))
    expected = reference(ids, sampling)
    for wish in (Wish.REMOTE, Wish.LOCAL, Wish.AGGREGATED, Wish.AUTO, Wish.REMOTE):
        answer = house.ask(ids, sampling, wish)
        assert answer.ids == expected, wish
        assert answer.text == "".join(f"<{token}>" for token in expected)
        assert answer.finish_reason is FinishReason.LENGTH
        assert answer.late == 0
    house.assert_nothing_held()


def test_a_seed_drawn_by_the_router_is_kept_for_the_whole_request(house: FlowHouse) -> None:
    answer = house.ask(prompt(40, 5), SamplingParams(max_tokens=30), Wish.REMOTE)
    assert len(answer.ids) == 30


@BOTH
def test_a_cached_prompt_is_served_by_the_decode_worker_alone(house: FlowHouse, sampling: SamplingParams) -> None:
    ids = prompt(100, seed=int(50 + 10 * sampling.temperature))
    first = house.ask(ids, sampling, Wish.REMOTE)
    again = house.ask(ids, sampling, Wish.LOCAL)  # where others would be quicker is for the policy's tests
    assert again.ids == first.ids == reference(ids, sampling)
    assert again.proof.route == Way.CACHED
    assert (again.proof.kv_tokens_reused, again.proof.kv_tokens_received) == (96, 0)


@pytest.mark.parametrize("transport", ["shm", "inline"])
@pytest.mark.parametrize("workers", [1, 2])
def test_many_at_once(workers: int, transport: Literal["shm", "inline"]) -> None:
    """32 in flight; half of them share a prefix, and each prompt comes twice."""
    prompts = [prompt(64, seed=9)[: 16 * (i % 4)] + prompt(20 + 5 * i, seed=i) for i in range(16)] * 2
    with FlowHouse(deployment(workers, workers, transport=transport)) as house:
        for answer, ids in zip(ask_all(house, prompts, SEEDED), prompts, strict=True):
            assert answer.ids == reference(ids, SEEDED)
            assert answer.proof.transport == transport
            assert answer.proof.kv_tokens_recomputed == 0
        assert len(house.counts.outcomes) == 32
        house.assert_nothing_held()


def test_the_policy_chooses_every_way_and_none_changes_the_text() -> None:
    """A long prompt would make the streams of its decode worker wait too long, so it goes to a prefill worker."""
    router = RouterConfig(slo=SloConfig(itl_ms=15.0), worker_wait_s=5)
    engine = fake_engine(prefill_us_per_token=200, step_us=2000)
    with FlowHouse(deployment(1, 1, engine=engine, router=router)) as house:
        stream = house.begin(prompt(5, 99), msgspec.structs.replace(GREEDY, max_tokens=4000))
        assert stream.first.wait(5)
        prompts = [prompt(length, seed=length) for length in (5, 20, 33, 200, 230, 5, 200, 230)]
        for _ in range(2):
            for ids in prompts:
                assert house.ask(ids).ids == reference(ids, GREEDY)
        house.cancel(stream)
        assert set(house.counts.ways) == {Way.REMOTE, Way.LOCAL, Way.CACHED}


def test_after_eviction() -> None:
    """64 blocks: each prompt of 20 pushes an earlier one out."""
    prompts = [prompt(320, seed=i) for i in range(6)]
    with FlowHouse(deployment(engine=fake_engine(kv_pool_mib=1))) as house:
        for _ in range(2):
            for ids in prompts:
                assert house.ask(ids).ids == reference(ids, GREEDY)
        house.assert_nothing_held()
        assert len(house.service.house.index) <= 128


@pytest.mark.parametrize("mode", ["always-remote", "always-local", "always-aggregated"])
def test_more_requests_than_the_pool_holds(mode: Literal["always-remote", "always-local", "always-aggregated"]) -> None:
    """They wait, are preempted, lose their cached blocks - and say the same."""
    sampling = msgspec.structs.replace(SEEDED, max_tokens=60)
    prompts = [prompt(100 + i, seed=i) for i in range(32)]
    config = deployment(aggregated=1, engine=fake_engine(step_us=50, kv_pool_mib=1), router=RouterConfig(mode=mode))
    with FlowHouse(config) as house:
        for answer, ids in zip(ask_all(house, prompts, sampling), prompts, strict=True):
            assert answer.ids == reference(ids, sampling)
        house.assert_nothing_held()
