"""What one worker has computed, no other one computes again: whole requests over the store tiers, and how they end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from python_backends.core.config import RemoteStoreConfig, RouterConfig, StoreConfig
from python_backends.core.types import SamplingParams, WorkerId
from router.types import Way, Wish
from tests.flow.house import GREEDY, TIMEOUT_S, FlowHouse, ask_all, deployment, eventually, fake_engine, prompt, reference
from tests.kv.redis_server import RedisServer

PATIENT = {"read_timeout_s": 1.0, "locate_timeout_s": 1.0}  # a busy machine is not what is tested
NODE = StoreConfig(node_mib=16, read_timeout_s=1.0, locate_timeout_s=1.0)
AUTO = RouterConfig(mode="adaptive", worker_wait_s=10.0, default_deadline_s=TIMEOUT_S)
# Slow enough at prefill that reading always pays.
ENGINE = fake_engine(prefill_us_per_token=200)


def house(prefill: int, decode: int, *, processes: bool = True, restart: bool = False, store: StoreConfig = NODE) -> FlowHouse:
    config = deployment(prefill, decode, engine=ENGINE, router=AUTO, store=store)
    return FlowHouse(config, processes=processes, restart=restart)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


def remote(server: RedisServer, **options: float) -> StoreConfig:
    return StoreConfig(remote=RemoteStoreConfig(servers=(server.url,)), **(PATIENT | options))  # type: ignore[arg-type]


def stored(house: FlowHouse, name: str, tier: str = "node") -> int:
    """Blocks of the tier's budget that are in use, as the worker says."""
    view = house.service.house.fleet.get(WorkerId(name))
    return view.heartbeat.stores[tier].used_bytes // view.heartbeat.layout.block_bytes if view is not None else 0


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(seed=5, max_tokens=8)])
def test_a_killed_workers_prompt_is_served_from_the_node_store_by_another(sampling: SamplingParams) -> None:
    with house(prefill=1, decode=1) as first:
        assert first.ask(prompt(200), sampling, Wish.REMOTE).proof.route == Way.REMOTE
        assert eventually(lambda: stored(first, "decode_0") >= 12)
        first.kill("prefill_0")
        first.kill("decode_0")
        assert eventually(lambda: not (first.is_up("decode_0") or first.is_up("prefill_0")), 5)
        first.start("decode_0")  # alone: to a prefill worker that has the store, too, the other way costs nearly the same
        answer = first.ask(prompt(200), sampling)
        assert answer.ids == reference(prompt(200), sampling)
        proof = answer.proof
        assert proof.route == Way.CACHED
        assert "in the stores" in proof.why
        assert (proof.kv_tokens_node, proof.kv_tokens_computed, proof.kv_tokens_reused) == (192, 7, 0)
        assert (proof.kv_tokens_received, proof.kv_tokens_recomputed) == (0, 0)
        assert (proof.prefill_tokens_node, proof.prefill_tokens_computed) == (192, 7)
        assert proof.store_bytes == 12 * 16_384
        first.assert_nothing_held()


def test_all_workers_restarted_at_once_find_what_they_had() -> None:
    """The router holds the memory meanwhile."""
    with house(prefill=1, decode=1, restart=True) as flow:
        flow.ask(prompt(200))
        assert eventually(lambda: stored(flow, "decode_0") >= 12)
        epochs = {name: flow.epoch(name) for name in ("prefill_0", "decode_0")}
        for name in epochs:
            flow.kill(name)
        assert eventually(lambda: all(flow.is_up(name, epoch) for name, epoch in epochs.items()), TIMEOUT_S)
        proof = flow.ask(prompt(200)).proof
        assert (proof.route, proof.kv_tokens_node) == (Way.CACHED, 192)


def test_a_longer_prompt_is_prefilled_from_where_the_store_ends() -> None:
    with house(processes=False, prefill=2, decode=1) as flow:
        flow.ask(prompt(200))
        assert eventually(lambda: stored(flow, "decode_0") >= 12)
        one, two = (flow.ask([*prompt(200)[:192], *prompt(100, seed)], wish=Wish.REMOTE) for seed in (1, 2))
        for answer in (one, two):
            assert answer.proof.prefill_tokens_computed + answer.proof.kv_tokens_computed <= 100
            assert answer.proof.prefill_tokens_node + answer.proof.prefill_tokens_reused == 192


def test_tenants_and_wishes_are_respected() -> None:
    with house(processes=False, prefill=1, decode=2) as flow:
        flow.ask(prompt(200))
        assert eventually(lambda: stored(flow, "decode_0") >= 12)
        other = flow.begin(prompt(200), salt="another tenant").wait().proof
        assert (other.kv_tokens_node, other.prefill_tokens_node) == (0, 0)
        assert other.prefill_tokens_computed >= 199
        remote = flow.ask(prompt(200), wish=Wish.REMOTE).proof
        assert remote.route == Way.REMOTE


def test_a_decode_worker_that_was_not_there_takes_over() -> None:
    """The one that has the prefix in its pool dies; the other finds it in the store."""
    with house(prefill=1, decode=2) as flow:
        first = flow.ask(prompt(200), wish=Wish.LOCAL).proof.decode_worker
        assert eventually(lambda: stored(flow, first) >= 12)
        flow.kill(first)
        assert eventually(lambda: not flow.is_up(first), 5)
        proof = flow.ask(prompt(200)).proof
        assert proof.decode_worker != first
        assert (proof.route, proof.kv_tokens_node, proof.kv_tokens_computed) == (Way.CACHED, 192, 7)


def test_many_prompts_through_a_small_store_keep_their_text() -> None:
    small = StoreConfig(node_mib=2, read_timeout_s=1.0)
    config = deployment(2, 2, engine=fake_engine(kv_pool_mib=2), router=AUTO, store=small)
    prompts = [prompt(100 + 20 * i, i) for i in range(16)] * 3
    with FlowHouse(config) as flow:
        for answer, ids in zip(ask_all(flow, prompts), prompts, strict=True):
            assert answer.ids == reference(ids, GREEDY)
        flow.assert_nothing_held()


def test_nothing_is_left_of_the_node_store() -> None:
    with house(processes=False, prefill=1, decode=1) as flow:
        flow.ask(prompt(200))
        worker = flow.service.house.fleet.get(WorkerId("decode_0"))
        assert worker is not None
        place = Path(worker.heartbeat.node_place)
        assert len(list(place.iterdir())) == 3  # two workers, and the router that keeps it alive
    assert not place.exists()


# --- the remote store ---------------------------------------------------------------------------------------------------


def test_a_prompt_of_a_house_that_is_gone_is_served_by_another(server: RedisServer) -> None:
    """Another router, other workers, another key: they have only Redis in common."""
    with house(1, 1, store=remote(server)) as first:
        expected = first.ask(prompt(200)).ids
        assert eventually(lambda: server.client().dbsize() >= 12)
        for name in ("prefill_0", "decode_0"):
            first.kill(name)
    with house(1, 1, store=remote(server)) as second:
        answer = second.ask(prompt(200))
        assert answer.ids == expected == reference(prompt(200), GREEDY)
        proof = answer.proof
        assert proof.route == Way.CACHED
        assert (proof.kv_tokens_remote, proof.kv_tokens_node, proof.kv_tokens_computed) == (192, 0, 7)
        assert (proof.prefill_tokens_remote, proof.prefill_tokens_computed) == (192, 7)
        second.assert_nothing_held()


def test_redis_killed_and_restarted_under_load_costs_hits_only(server: RedisServer) -> None:
    prompts = [prompt(100 + 10 * i, i) for i in range(12)] * 6
    over = threading.Event()

    def torment() -> None:
        while not over.wait(0.25):
            server.kill()
            time.sleep(0.1)
            server.start()

    with FlowHouse(deployment(2, 2, engine=fake_engine(kv_pool_mib=2), router=AUTO, store=remote(server))) as flow:
        tormentor = threading.Thread(target=torment)
        tormentor.start()
        try:
            for answer, ids in zip(ask_all(flow, prompts), prompts, strict=True):
                assert answer.error is None, repr(answer.error)
                assert answer.ids == reference(ids, GREEDY)
        finally:
            over.set()
            tormentor.join(20)
        flow.assert_nothing_held()


def test_a_stopped_redis_costs_a_moment_once_and_then_nothing(server: RedisServer) -> None:
    config = deployment(
        1, 1, engine=fake_engine(), router=AUTO, store=remote(server, read_timeout_s=0.3, locate_timeout_s=0.05)
    )
    with FlowHouse(config) as flow:
        flow.ask(prompt(200, 0))
        assert eventually(lambda: server.client().dbsize() >= 12)
        server.signal(signal.SIGSTOP)
        times = []
        for seed in range(1, 8):
            answer = flow.ask(prompt(200, seed))
            assert answer.ids == reference(prompt(200, seed), GREEDY)
            assert answer.proof.kv_tokens_remote == answer.proof.prefill_tokens_remote == 0
            times.append(answer.proof.ttft_ms)
        assert max(times) < 1000
        assert sorted(times)[3] < 150, times
        flow.assert_nothing_held()


def test_redis_that_asks_for_another_password_is_done_without(server: RedisServer) -> None:
    server.client().config_set("requirepass", "secret")
    with house(1, 1, processes=False, store=remote(server)) as flow:
        for _ in range(2):
            assert flow.ask(prompt(200)).ids == reference(prompt(200), GREEDY)
        flow.assert_nothing_held()
        view = flow.service.house.fleet.get(WorkerId("decode_0"))
        assert view is not None
        assert not view.heartbeat.stores["remote"].up
