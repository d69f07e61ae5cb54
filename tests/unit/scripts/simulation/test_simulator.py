"""The real router over simulated workers: what must come out exactly, what must hold at any load, what the router is for."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import msgspec
import pytest

from python_backends.core.config import EngineConfig, RouterConfig, SloConfig, TransferConfig
from python_backends.core.types import BlockHash, FinishReason, Role
from scripts.simulation.clock import VirtualClock, VirtualLoop
from scripts.simulation.hardware import Rates
from scripts.simulation.simulator import Result, Scenario, Simulation, simulate
from scripts.simulation.worker import SimulatedWorker
from scripts.simulation.workload import Arrival, Workload, generate

P, D, A = Role.PREFILL, Role.DECODE, Role.AGGREGATED
SIMPLE = Rates(
    (10.0, 0.1, 0.0, 1.0, 0.0), token_bytes=1000, pool_tokens=100_000, link_bytes_per_ms=1e6, link_ms=3.0, hop_ms=2.0
)
GPU = Rates((7.8, 0.032, 1.8e-6, 0.05, 5.6e-5), 131_072, 420_000, 4e7, 0.5, 1.0)
ENGINE = EngineConfig(step_tokens=2048, max_batch=256)


def scenario(
    workers: Mapping[Role, int],
    mode: str = "adaptive",
    rates: Rates = SIMPLE,
    slo: SloConfig = SloConfig(),  # noqa: B008 (immutable)
    engine: EngineConfig = EngineConfig(step_tokens=1000, max_batch=64),  # noqa: B008
    **transfer: float,
) -> Scenario:
    router = msgspec.convert({"mode": mode, "max_requests": 10**6, "max_queued_tokens": 10**9}, RouterConfig)
    router = msgspec.structs.replace(router, slo=slo)
    return Scenario(mode, workers, dict.fromkeys(Role, rates), router, engine, TransferConfig(**transfer))  # type: ignore[arg-type]


def load(*arrivals: tuple[float, int, int], hashes: Sequence[Sequence[int]] = ()) -> Workload:
    """(seconds, prompt, output); hashes: of each prompt's blocks of 100 tokens."""
    named = [tuple(BlockHash(bytes([number])) for number in numbers) for numbers in hashes] or [()] * len(arrivals)
    return Workload("made up", [Arrival(*each, blocks) for each, blocks in zip(arrivals, named, strict=True)], 100)


def run(setting: Scenario, workload: Workload) -> tuple[Result, Simulation]:
    loop = VirtualLoop()
    try:
        simulation = Simulation(setting, workload, VirtualClock(loop))
        result = loop.run_until_complete(simulation.run())
    finally:
        loop.close()
    assert_nothing_held(simulation)
    return result, simulation


def assert_nothing_held(simulation: Simulation) -> None:
    door = simulation.house.admission
    assert (door.requests, door.queued_tokens, door.waiting) == (0, 0, 0)
    for view in simulation.house.fleet:
        assert (view.requests, view.streams, view.prefill_tokens, view.context_tokens) == (0, 0, 0, 0)
        assert (view.kv._prompts, view.kv._expected) == (0, 0)
    for worker in simulation.workers.values():
        load = worker.heartbeat().load
        assert (load.held_blocks, load.running_requests, load.queued_requests) == (0, 0, 0), worker.id
        assert load.active_leases == 0


# --- exact times -------------------------------------------------------------------------------------------------------


def test_one_request_takes_what_its_steps_take() -> None:
    result, _ = run(scenario({A: 1}), load((0.0, 500, 11)))
    assert result.ttft.mean == pytest.approx(2 + 10 + 50)
    assert result.itl.count == 10
    assert result.itl.mean == pytest.approx(11)
    assert result.tpot.mean == pytest.approx(11)
    assert (result.completed, result.output_tokens) == (1, 11)


def test_a_handed_over_request_waits_for_its_kv_between_the_first_tokens() -> None:
    result, _ = run(scenario({P: 1, D: 1}, "always-remote"), load((0.0, 500, 3)))
    assert result.ttft.mean == pytest.approx(2 + 10 + 50)
    gaps = sorted(gap for gap in (result.itl.quantile(0.01), result.itl.quantile(0.99)))
    assert gaps[0] == pytest.approx(11, rel=0.02)
    assert gaps[1] == pytest.approx(2 + 0.5 + 3 + 11, rel=0.02)  # hop, bytes, latency, step
    assert result.ways == {"remote": 1}


def test_streams_wait_a_moment_for_who_joins_them() -> None:
    """Its KV comes 3.5 ms after the step in which it was asked for: it does not wait for all of the next one as well."""
    slow = msgspec.structs.replace(SIMPLE, coefficients=(100.0, 0.0, 0.0, 1.0, 0.0))
    result, _ = run(scenario({P: 1, D: 1}, "always-remote", slow), load((0.0, 500, 20), (0.45, 500, 10)))
    assert result.itl.quantile(1.0) < 100 + 3.5 + 102
    assert result.itl.quantile(0.5) == pytest.approx(102, rel=0.02)


def test_who_comes_while_streams_wait_for_another_waits_for_one_step() -> None:
    """Not for the many that streams alone would take at once."""
    slow = msgspec.structs.replace(SIMPLE, coefficients=(100.0, 0.0, 0.0, 1.0, 0.0), link_ms=40.0)
    arrivals = load((0.0, 500, 100), (0.45, 500, 90), (0.57, 500, 5))
    result, _ = run(scenario({P: 2, D: 1}, "always-remote", slow), arrivals)
    assert result.completed == 3
    assert result.itl.quantile(1.0) < 3 * 103


def test_streams_that_join_late_shorten_the_steps_that_workers_are_filled_up_to() -> None:
    """First gaps are up to two steps, so steps of 80% of the target are too long for them."""
    slo = SloConfig(ttft_ms=3000, itl_ms=100)
    rates = msgspec.structs.replace(SIMPLE, coefficients=(30.0, 0.02, 0.0, 3.0, 0.0))
    many = load(*((0.05 * number, 200, 40) for number in range(1500)))
    result, simulation = run(scenario({P: 2, D: 2}, "always-remote", rates, slo), many)
    steps = {name: worker.load().step_ms for name, worker in simulation.workers.items()}
    assert max(ms for name, ms in steps.items() if name.startswith("decode")) < 0.75 * slo.itl_ms
    assert result.itl.quantile(0.98) < slo.itl_ms
    assert all(ms == 0 for name, ms in steps.items() if name.startswith("prefill"))


def test_a_long_prompt_is_computed_in_chunks_which_streams_wait_for() -> None:
    result, _ = run(scenario({A: 1}), load((0.0, 10, 100), (0.2, 2500, 1)))
    assert result.itl.quantile(1.0) == pytest.approx(10 + 99.9 + 1, rel=0.02)
    assert result.itl.quantile(0.5) == pytest.approx(11, rel=0.02)


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    blocks = list(range(10))
    result, _ = run(scenario({A: 1}), load((0.0, 1000, 2), (5.0, 1050, 2), hashes=[blocks, blocks]))
    assert result.reused_tokens == 1000
    assert result.ttft.quantile(0.5) == pytest.approx(2 + 10 + 5, rel=0.02)


def test_output_of_one_token_never_reaches_a_decode_worker() -> None:
    result, simulation = run(scenario({P: 1, D: 1}, "always-remote"), load((0.0, 100, 1)))
    assert result.completed == 1
    assert result.itl.count == 0
    decode = next(worker for worker in simulation.workers.values() if worker.role is D)
    assert decode.busy_s == 0


# --- any load ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["adaptive", "always-remote", "always-local"])
def test_every_request_is_answered_whole_and_nothing_is_left(mode: str) -> None:
    workload = generate("mixed", 12, 40, Random(1))
    result, _ = run(scenario({P: 2, D: 2}, mode, GPU, engine=ENGINE), workload)
    assert result.completed == result.arrived == len(workload.arrivals)
    assert result.output_tokens == sum(arrival.output_length for arrival in workload.arrivals)
    assert result.itl.count == sum(arrival.output_length - 1 for arrival in workload.arrivals)
    assert sum(result.ways.values()) == result.completed
    assert result.failed == result.refused == 0


def test_the_same_seed_gives_the_same_run() -> None:
    workload = generate("mixed", 12, 30, Random(1))
    noisy = msgspec.structs.replace(GPU, noise=0.1)
    results = [simulate(scenario({P: 2, D: 2}, rates=noisy, engine=ENGINE), workload) for _ in range(2)]
    assert results[0].ttft.quantiles() == results[1].ttft.quantiles()
    assert results[0].itl.quantiles() == results[1].itl.quantiles()
    assert results[0].ways == results[1].ways


def test_streams_that_outgrow_the_pool_are_preempted_and_come_to_their_end() -> None:
    small = msgspec.structs.replace(SIMPLE, pool_tokens=6000)
    workload = load(*((0.01 * i, 400, 300) for i in range(30)))
    result, _ = run(scenario({P: 1, D: 1}, "always-remote", small), workload)
    assert (result.completed, result.output_tokens) == (30, 30 * 300)


def test_kv_that_comes_too_late_is_computed_again() -> None:
    slow = msgspec.structs.replace(SIMPLE, link_bytes_per_ms=10.0)
    result, _ = run(scenario({P: 1, D: 1}, "always-remote", slow, timeout_s=0.5), load((0.0, 500, 5), (0.1, 500, 5)))
    assert result.completed == 2
    assert result.itl.quantile(1.0) > 500


def test_a_bug_in_the_router_ends_the_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("router.run.Run._take", broken)
    with pytest.raises(ZeroDivisionError):
        simulate(scenario({A: 1}), load((0.0, 10, 5), (1.0, 10, 5)))


def test_a_stream_alone_takes_its_steps_many_at_once_however_long_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would have to give way to it when the pool is full, so nothing changes from one step to the next."""
    ends, end = 0, SimulatedWorker._end

    def counted(worker: SimulatedWorker) -> None:
        nonlocal ends
        ends += 1
        end(worker)

    monkeypatch.setattr(SimulatedWorker, "_end", counted)
    small = msgspec.structs.replace(SIMPLE, pool_tokens=1000)
    result, _ = run(scenario({A: 1}, rates=small), load((0.0, 500, 20_000)))
    assert (result.completed, result.itl.count) == (1, 19_999)
    assert ends < 30


# --- what the router is for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", ["chat", "code", "conversation", "mixed"])
def test_deciding_is_never_much_worse_than_the_better_fixed_way_and_streams_keep_their_target(workload: str) -> None:
    """The bar: at most 5% in p90 TTFT; and better than both on mixed load."""
    rates = {"chat": 22, "code": 18, "conversation": 4, "mixed": 10}
    seconds = {"chat": 25, "code": 25}.get(workload, 80)
    requests = generate(workload, rates[workload], seconds, Random(5))
    slo = SloConfig(itl_ms=60)
    p90, itl = {}, {}
    for mode in ("adaptive", "always-remote", "always-local"):
        result = simulate(scenario({P: 2, D: 2}, mode, GPU, slo, ENGINE), requests)
        p90[mode], itl[mode] = result.ttft.quantile(0.9), result.itl.quantile(0.99)
    best = min(p90["always-remote"], p90["always-local"])
    assert p90["adaptive"] <= best * 1.05
    assert itl["adaptive"] <= 60
    if workload == "mixed":
        assert p90["adaptive"] < 0.95 * best


def test_at_three_times_what_can_be_served_the_accepted_are_on_time_and_the_others_refused_at_once() -> None:
    requests = generate("chat", 150, 20, Random(2))
    slo = SloConfig(ttft_ms=1500, itl_ms=60)
    result, simulation = run(scenario({P: 2, D: 2}, "adaptive", GPU, slo, ENGINE), requests)
    assert result.refused > 0.4 * result.arrived
    assert result.failed == 0
    assert result.refusal.quantile(1.0) < 50
    assert result.good > 0.9 * result.completed
    assert result.itl.quantile(0.99) < 60
    assert result.most_waiting < 400
    assert simulation.house.admission.waiting == 0


def test_a_greedy_tenant_does_not_keep_the_others_waiting() -> None:
    greedy = [Arrival(0.001 * i, 2000, 20, tenant="greedy") for i in range(300)]
    modest = [Arrival(2.0 + i, 500, 20, tenant="modest") for i in range(8)]
    requests = Workload("unfair", sorted([*greedy, *modest], key=lambda arrival: arrival.at_s), 256)
    result, _ = run(scenario({P: 1, D: 1}, "always-remote", GPU, engine=ENGINE), requests)
    assert result.completed == 308
    assert result.ttft_by_tenant["modest"].quantile(1.0) < 1000
    assert result.ttft_by_tenant["greedy"].quantile(0.9) > 5000


def test_a_hot_prefix_spreads_over_the_workers_when_one_is_not_enough() -> None:
    """All prompts begin alike. At first one worker has the prefix; in the end several do."""
    blocks = list(range(80))
    requests = load(*((0.004 * i, 8100, 2) for i in range(400)), hashes=[blocks] * 400)
    result, simulation = run(scenario({P: 4, D: 4}, "always-remote", GPU, engine=ENGINE), requests)
    busy = sorted(worker.busy_s for worker in simulation.workers.values() if worker.role is P)
    assert result.reused_tokens > 0.9 * 400 * 8000
    assert busy[-2] > 0.2 * busy[-1]


def test_conversations_come_back_to_who_has_them() -> None:
    requests = generate("conversation", 2, 200, Random(3))
    result, _ = run(scenario({P: 2, D: 2}, "adaptive", GPU, engine=ENGINE), requests)
    shared = sum(len(arrival.hashes) for arrival in requests.arrivals) - len({b for a in requests.arrivals for b in a.hashes})
    available = shared * requests.block_size / sum(arrival.input_length for arrival in requests.arrivals)
    assert result.reused_tokens / result.input_tokens > 0.7 * available


def test_of_long_answers_the_router_hears_before_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would take all to be short as long as none has ended."""
    told: list[bool] = []
    say = SimulatedWorker._say_tokens

    def count(worker: SimulatedWorker, sequence: Any, finish: FinishReason | None) -> None:
        told.append(finish is not None)
        say(worker, sequence, finish)

    monkeypatch.setattr(SimulatedWorker, "_say_tokens", count)
    result, simulation = run(scenario({P: 1, D: 1}), load(*((0.1 * number, 100, 20_000) for number in range(4))))
    assert result.completed == 4
    assert result.output_tokens == 4 * 20_000
    assert 4 * 5 < len(told) < 4 * 25
    assert sum(told) == 4
    assert simulation.house.output_tokens.value == pytest.approx(20_000 * 4 / 5, rel=0.1)  # and a first guess


def test_a_thousand_workers_are_no_trouble() -> None:
    requests = generate("chat", 2000, 0.5, Random(0))
    result, _ = run(scenario({P: 400, D: 600}, "adaptive", GPU, engine=ENGINE), requests)
    assert result.completed == len(requests.arrivals)
    assert result.ttft.quantile(0.99) < 1500


def test_the_loop_is_left_as_it_was() -> None:
    simulate(scenario({A: 1}), load((0.0, 10, 5)))
    assert asyncio.run(asyncio.sleep(0, "still works")) == "still works"
