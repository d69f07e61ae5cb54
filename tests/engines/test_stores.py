"""Engines that write to stores and read from them: what one worker has computed, another one does not compute again."""

from __future__ import annotations

import random
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from python_backends.core.block_hash import block_hashes, chain_root
from python_backends.core.config import (
    Deployment,
    EngineConfig,
    FakeConfig,
    ModelConfig,
    RemoteStoreConfig,
    StoreConfig,
    TransferConfig,
    WorkerConfig,
)
from python_backends.core.errors import RefusalReason
from python_backends.core.types import BlockHash, Epoch, RequestId, Role
from python_backends.engines.base import create_engine
from python_backends.engines.paged.engine import PagedEngine
from python_backends.kv.store.base import StoreTier
from tests.engines.bench import EngineBench, make_request
from tests.engines.paged_sequences import memory_of
from tests.engines.tiny_model import VOCAB, write_tiny_llama
from tests.kv.redis_server import RedisServer

BLOCK = 16


def tokens_of(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(count)]


PROMPT = tokens_of(1, 75)  # 4 full blocks and a partial one
NODE = StoreConfig(node_mib=8, read_timeout_s=2.0)

Make = Callable[..., EngineBench]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["fake", "torch"])
def make(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Make]:
    """Makes engines of one deployment, each with a pool of its own and the stores in common."""
    benches: list[EngineBench] = []
    key = secrets.token_bytes(32)  # its own node store
    epochs = iter(range(1, 1000))

    def make_bench(
        role: Role, store: StoreConfig = NODE, kv_pool_mib: int = 8, faults: dict[str, float] | None = None, model: Path = tiny
    ) -> EngineBench:
        deployment = Deployment(
            model=ModelConfig(path=str(model)),
            workers=(WorkerConfig(role=role, name=role.value, engine=request.param, threads=1),),
            engine=EngineConfig(
                block_size=BLOCK,
                kv_pool_mib=kv_pool_mib,
                step_tokens=64,
                fake=FakeConfig(prefill_us_per_token=200, step_us=200),
            ),
            transfer=TransferConfig(timeout_s=0.3, faults=faults or {}),  # type: ignore[arg-type]
            store=store,
        )
        bench = EngineBench(create_engine(deployment, deployment.workers[0], Epoch(next(epochs)), key))
        benches.append(bench)
        return bench

    yield make_bench
    for bench in benches:
        bench.engine.close()
        bench.engine.close()


def tiers(bench: EngineBench) -> dict[str, StoreTier]:
    assert isinstance(bench.engine, PagedEngine)
    assert bench.engine._stores is not None
    return {tier.name: tier for tier in bench.engine._stores._tiers}


def written(bench: EngineBench, blocks: int, tier: str = "node") -> None:
    """Wait until so many blocks of this worker are in the tier."""
    bench.wait_load(lambda: tiers(bench)[tier].counts().written >= blocks)


def has_last(bench: EngineBench, request_id: str) -> Callable[[], bool]:
    return lambda: bench.last(request_id) is not None


# --- zero prefill, same text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 11}])
def test_a_dead_workers_prompt_is_not_computed_again(make: Make, sampling: dict[str, Any]) -> None:
    first = make(Role.AGGREGATED)
    expected, _ = first.decode(make_request("a", PROMPT, **sampling))
    written(first, 4)
    second = make(Role.AGGREGATED)
    first.engine.close()
    tokens, report = second.decode(make_request("b", PROMPT, **sampling))
    assert tokens == expected
    assert (report.prefix.node_tokens, report.computed_tokens, report.reused_tokens) == (64, 10, 0)
    assert report.prefix.bytes == 4 * second.engine.info.layout.block_bytes
    assert report.prefix.ms > 0


def test_a_prefill_worker_reads_and_hands_over_what_it_has_read(make: Make) -> None:
    one, two, decode = make(Role.PREFILL), make(Role.PREFILL), make(Role.DECODE)
    first = one.prefill(make_request("a", PROMPT))
    written(one, 4)
    second = two.prefill(make_request("b", PROMPT))
    assert first.token_id == second.token_id
    assert (second.prefix.node_tokens, second.computed_tokens, second.reused_tokens) == (64, 11, 0)
    tokens, report = decode.decode(make_request("d", PROMPT, [second.token_id]), second.ticket)
    assert (report.received_tokens, report.digest, report.prefix.tokens) == (len(PROMPT), "verified", 0)
    alone, _ = make(Role.AGGREGATED, StoreConfig()).decode(make_request("alone", PROMPT))
    assert [second.token_id, *tokens] == alone


def test_the_answer_is_stored_for_the_next_turn(make: Make) -> None:
    one, two = make(Role.AGGREGATED), make(Role.AGGREGATED)
    answer, _ = one.decode(make_request("a", PROMPT, max_tokens=30))
    written(one, 6)
    _, report = two.decode(make_request("b", [*PROMPT, *answer, 5, 6, 7]))
    assert report.prefix.node_tokens == 96


def test_the_pool_comes_first_and_the_store_continues_it(make: Make) -> None:
    one, two = make(Role.AGGREGATED), make(Role.AGGREGATED)
    expected, _ = one.decode(make_request("a", PROMPT))
    written(one, 4)
    two.decode(make_request("b", PROMPT[:40], max_tokens=1))
    tokens, report = two.decode(make_request("c", PROMPT))
    assert tokens == expected
    assert (report.reused_tokens, report.prefix.node_tokens, report.computed_tokens) == (32, 32, 10)


def test_a_handoff_that_fails_falls_back_on_the_store(make: Make) -> None:
    prefill, decode = make(Role.PREFILL), make(Role.DECODE, faults={"drop": 1.0})
    done = prefill.prefill(make_request("p", PROMPT))
    written(prefill, 4)
    tokens, report = decode.decode(make_request("d", PROMPT, [done.token_id]), done.ticket)
    assert report.digest == RefusalReason.TRANSFER_FAILED.value
    assert (report.received_tokens, report.prefix.node_tokens, report.recomputed_tokens) == (0, 64, 11)
    expected, _ = make(Role.AGGREGATED, StoreConfig()).decode(make_request("ref", PROMPT))
    assert [done.token_id, *tokens] == expected
    decode.assert_nothing_held()


def test_a_bad_ticket_falls_back_on_the_store(make: Make) -> None:
    prefill, decode = make(Role.PREFILL), make(Role.DECODE)
    done = prefill.prefill(make_request("p", PROMPT))
    written(prefill, 4)
    _, report = decode.decode(make_request("d", PROMPT, [done.token_id]), b"nonsense")
    assert (report.digest, report.prefix.node_tokens) == (RefusalReason.BAD_SIGNATURE.value, 64)


# --- the remote store ---------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


def remote(server: RedisServer, node_mib: int = 0, **options: Any) -> StoreConfig:
    return StoreConfig(
        node_mib=node_mib, remote=RemoteStoreConfig(servers=(server.url,)), **({"read_timeout_s": 2.0} | options)
    )


def test_a_dead_workers_prompt_comes_from_redis(make: Make, server: RedisServer) -> None:
    first = make(Role.AGGREGATED, remote(server))
    expected, _ = first.decode(make_request("a", PROMPT))
    written(first, 4, "remote")
    second = make(Role.AGGREGATED, remote(server))
    first.engine.close()
    tokens, report = second.decode(make_request("b", PROMPT))
    assert tokens == expected
    assert (report.prefix.remote_tokens, report.prefix.node_tokens, report.computed_tokens) == (64, 0, 10)


def test_what_comes_from_redis_is_in_the_node_store_afterwards(make: Make, server: RedisServer) -> None:
    first = make(Role.AGGREGATED, remote(server))
    expected, _ = first.decode(make_request("a", PROMPT))
    written(first, 4, "remote")
    second = make(Role.AGGREGATED, remote(server, node_mib=8))
    assert second.decode(make_request("b", PROMPT))[1].prefix.remote_tokens == 64
    written(second, 4)
    server.kill()
    third = make(Role.AGGREGATED, remote(server, node_mib=8))
    tokens, report = third.decode(make_request("c", PROMPT))
    assert tokens == expected
    assert (report.prefix.node_tokens, report.prefix.remote_tokens) == (64, 0)


def test_a_waiting_prompt_is_prefetched(make: Make, server: RedisServer) -> None:
    first = make(Role.AGGREGATED, remote(server))
    expected, _ = first.decode(make_request("a", PROMPT))
    written(first, 4, "remote")
    second = make(Role.AGGREGATED, remote(server, node_mib=8), kv_pool_mib=1)
    for turn in range(4):  # each takes nearly all of the pool
        hog = tokens_of(9 + turn, second.engine.info.max_context - 60)
        second.engine.decode(make_request(f"hog{turn}", hog, max_tokens=40), None)
    second.wait_load(lambda: second.engine.load().running_requests == 1)
    second.engine.decode(make_request("b", PROMPT), None)
    second.wait_load(lambda: tiers(second)["node"].count(_hashes(second, PROMPT), time.monotonic() + 1) == 4)
    tokens, report = second.result("b")
    assert tokens == expected
    assert (report.prefix.node_tokens, report.prefix.remote_tokens) == (64, 0)


def _hashes(bench: EngineBench, tokens: list[int]) -> list[BlockHash]:
    return block_hashes(tokens, BLOCK, chain_root(bench.engine.info.fingerprint, ""))


@pytest.mark.parametrize("trouble", ["killed", "stopped", "flushed", "corrupt", "nobody there"])
def test_redis_in_trouble_costs_hits_and_not_the_text(make: Make, server: RedisServer, trouble: str) -> None:
    config = remote(server, read_timeout_s=0.2)
    first, second = make(Role.AGGREGATED, config), make(Role.AGGREGATED, config)
    expected, _ = first.decode(make_request("a", PROMPT))
    written(first, 4, "remote")
    client = server.client()
    if trouble == "killed":
        server.kill()
    elif trouble == "stopped":
        server.signal(signal.SIGSTOP)
    elif trouble == "flushed":
        client.flushall()
    elif trouble == "corrupt":
        for key in client.scan_iter():
            client.setrange(key, 5000, b"damage")
    else:
        server.close()
    began = time.monotonic()
    tokens, report = second.decode(make_request("b", PROMPT))
    assert time.monotonic() - began < 5
    assert tokens == expected
    assert (report.prefix.tokens, report.computed_tokens) == (0, 74)
    second.assert_nothing_held()


# --- what must not be found --------------------------------------------------------------------------------------------


def test_tenants_do_not_share(make: Make) -> None:
    one, two = make(Role.AGGREGATED), make(Role.AGGREGATED)
    one.decode(make_request("a", PROMPT, salt="tenant a"))
    written(one, 4)
    _, report = two.decode(make_request("b", PROMPT, salt="tenant b"))
    assert (report.prefix.tokens, report.computed_tokens) == (0, 74)


def test_other_weights_are_another_model(make: Make, tmp_path: Path) -> None:
    one, two = make(Role.AGGREGATED), make(Role.AGGREGATED, model=write_tiny_llama(tmp_path / "other", seed=1))
    if one.engine.info.fingerprint == two.engine.info.fingerprint:
        pytest.skip("this engine has no weights")
    one.decode(make_request("a", PROMPT))
    written(one, 4)
    _, report = two.decode(make_request("b", PROMPT))
    assert report.prefix.tokens == 0


def test_damaged_blocks_are_computed_again(make: Make) -> None:
    one, two = make(Role.AGGREGATED), make(Role.AGGREGATED)
    expected, _ = one.decode(make_request("a", PROMPT))
    written(one, 4)
    node: Any = tiers(two)["node"]
    node._blocks[2, 5] ^= 1
    tokens, report = two.decode(make_request("b", PROMPT))
    assert tokens == expected
    assert (report.prefix.node_tokens, report.computed_tokens) == (32, 42)
    assert node.counts().corrupt == 1


# --- when blocks are stored --------------------------------------------------------------------------------------------


def test_evict_stores_what_leaves_the_pool(make: Make) -> None:
    store = StoreConfig(node_mib=8, fill="evict", read_timeout_s=2.0)
    one, two = make(Role.AGGREGATED, store, kv_pool_mib=1), make(Role.AGGREGATED, store)
    expected, _ = one.decode(make_request("a", PROMPT))
    time.sleep(0.1)
    assert tiers(one)["node"].counts().written == 0, "stored although the pool has room"
    for i in range(16):
        one.decode(make_request(f"f{i}", tokens_of(10 + i, 100)))
        time.sleep(0.02)  # what is near eviction is written before the next prompt takes its place
    one.wait_load(lambda: tiers(one)["node"].count(_hashes(one, PROMPT), time.monotonic() + 1) == 4)
    tokens, report = two.decode(make_request("b", PROMPT))
    assert tokens == expected
    assert report.prefix.node_tokens == 64


def test_a_pool_several_times_too_small_is_served_by_the_store(make: Make) -> None:
    """Blocks come and go while they are stored and loaded; the text stays the same."""
    small, roomy = make(Role.AGGREGATED, kv_pool_mib=1), make(Role.AGGREGATED, StoreConfig(), kv_pool_mib=32)
    prompts = [tokens_of(i, 20 + i * 8) for i in range(12)] * 3
    for bench in (small, roomy):
        for i, prompt in enumerate(prompts):
            bench.engine.decode(make_request(f"r{i}", prompt, max_tokens=40, seed=i, temperature=0.7), None)
    assert [small.result(f"r{i}")[0] for i in range(36)] == [roomy.result(f"r{i}")[0] for i in range(36)]
    small.assert_nothing_held()


# --- nobody waits ------------------------------------------------------------------------------------------------------


class SlowTier:
    """Has everything, and takes its time with it: zeros, which the engine would notice in the text."""

    def __init__(self, tier: StoreTier, seconds: float) -> None:
        self._tier = tier
        self._seconds = seconds
        self.name = tier.name

    def read(self, hashes: Any, into: Any, blocks: Any, deadline: float) -> int:
        time.sleep(min(self._seconds, max(0.0, deadline - time.monotonic())))
        return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tier, name)


def slow_down(bench: EngineBench, seconds: float) -> None:
    assert isinstance(bench.engine, PagedEngine)
    assert bench.engine._stores is not None
    bench.engine._stores._tiers[:] = [SlowTier(tier, seconds) for tier in bench.engine._stores._tiers]


def test_running_streams_do_not_wait_for_a_slow_store(make: Make) -> None:
    bench = make(Role.AGGREGATED)
    bench.engine.decode(make_request("stream", PROMPT, max_tokens=2000 - 75), None)
    bench.wait(lambda: len(bench.outputs.get("stream", [])) > 5)
    slow_down(bench, 1.0)
    before = len(bench.outputs["stream"])
    began = time.monotonic()
    bench.engine.decode(make_request("x", PROMPT[::-1]), None)
    bench.wait(lambda: len(bench.outputs["stream"]) > before + 20)
    assert time.monotonic() - began < 0.9, "the stream stood still while the store was read"
    assert bench.result("x")[1].computed_tokens == 74
    bench.engine.abort(RequestId("stream"))
    bench.assert_nothing_held()


def test_abort_while_reading_gives_everything_back(make: Make) -> None:
    bench = make(Role.AGGREGATED)
    slow_down(bench, 0.4)
    bench.engine.decode(make_request("x", PROMPT), None)
    bench.wait_load(lambda: bench.engine.load().held_blocks > 0)
    bench.engine.abort(RequestId("x"))
    bench.assert_nothing_held()
    assert bench.last("x") is None


def test_closing_stores_what_was_published_last(make: Make) -> None:
    one, two = make(Role.AGGREGATED), make(Role.AGGREGATED)
    expected, _ = one.decode(make_request("a", PROMPT))
    one.engine.close()
    tokens, report = two.decode(make_request("b", PROMPT))
    assert tokens == expected
    assert report.prefix.node_tokens == 64


def test_bytes_in_the_pool_are_those_of_the_first_worker(make: Make) -> None:
    one, two = make(Role.AGGREGATED), make(Role.AGGREGATED)
    one.decode(make_request("a", PROMPT, max_tokens=1))
    written(one, 4)
    two.decode(make_request("b", PROMPT, max_tokens=1))
    engines = [bench.engine for bench in (one, two)]
    pools = [engine for engine in engines if isinstance(engine, PagedEngine)]
    hashes = pools[0]._pool.hashes()
    for hash_ in hashes:
        blocks = [memory_of(engine).blocks[engine._pool.reuse([hash_])[0]] for engine in pools]
        assert np.array_equal(*blocks)
    assert len(hashes) == 4
