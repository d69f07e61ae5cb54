"""Fleets that grow and shrink: the real router over simulated workers that come and go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import msgspec
import pytest

from python_backends.core.config import EngineConfig, RouterConfig, SloConfig
from python_backends.core.types import BlockHash, Role
from scripts.simulation.autoscaler import Metric, Rules, Spec
from scripts.simulation.clock import VirtualClock, VirtualLoop
from scripts.simulation.hardware import Rates
from scripts.simulation.manifests import PreStop
from scripts.simulation.scaling import Scaling
from scripts.simulation.simulator import Result, Scenario, Simulation
from scripts.simulation.timeline import needs
from scripts.simulation.workload import Arrival, Day, Workload, generate

GPU = Rates((39.0, 0.16, 9e-6, 0.25, 2.8e-4), 131_072, 420_000, 4e7, 0.5, 1.0)  # a slow one: few requests keep it busy
ENGINE = EngineConfig(step_tokens=512, max_batch=16)
BUSY = Metric("External", "baton_prefill_busy_ratio", 0.7, per_pod=False)
FULL = Metric("External", "baton_decode_full_workers", 0.7)


def spec(name: str, *metrics: Metric, down_s: float = 60.0, most: int = 20) -> Spec:
    plain = Spec(name, 1, most, metrics)
    return replace(plain, down=Rules(down_s, plain.down.policies))


SPECS = {"prefill": spec("prefill", BUSY), "decode": spec("decode", FULL)}


def run(
    workload: Workload,
    begin: Mapping[str, int],
    specs: Mapping[str, Spec] | None = None,
    rates: Rates = GPU,
    ttft_ms: float = 0.0,
    pre_stop: PreStop | None = None,
) -> tuple[Result, Simulation]:
    hooks = dict.fromkeys(SPECS, pre_stop) if pre_stop else {}
    scaling = Scaling(specs or SPECS, begin, start_s=40.0, metrics_age_s=15.0, pre_stop=hooks)
    slo = SloConfig(ttft_ms=ttft_ms)
    router = RouterConfig(mode="always-remote", max_requests=10**6, max_queued_tokens=10**9, slo=slo)
    setting = Scenario("scaled", {}, dict.fromkeys((Role.PREFILL, Role.DECODE), rates), router, ENGINE, scaling=scaling)
    loop = VirtualLoop()
    try:
        simulation = Simulation(setting, workload, VirtualClock(loop))
        return loop.run_until_complete(simulation.run()), simulation
    finally:
        loop.close()


def ready(result: Result, role: Role) -> list[int]:
    return [moment.ready.get(role.value, 0) for moment in result.timeline]


def test_a_fleet_follows_its_load_up_and_down() -> None:
    """Every request is answered whole, also those whose worker was taken away under them."""
    day = Day(swing=6, seconds=800)
    workload = generate("chat", 2.4, day.load_s(800), Random(1)).through(day)
    result, simulation = run(workload, {"prefill": 1, "decode": 1})
    assert result.completed == result.arrived == len(workload.arrivals)
    assert result.output_tokens == sum(arrival.output_length for arrival in workload.arrivals)
    decode = ready(result, Role.DECODE)
    peak = decode.index(max(decode))
    need = needs(workload, {Role.PREFILL: GPU, Role.DECODE: GPU}, SloConfig(), ENGINE, 60.0)[Role.DECODE]
    assert max(decode) >= max(need)
    assert decode[0] < max(decode) > min(decode[peak:])
    assert result.errors["retried"] > 0
    paid = result.worker_seconds[Role.DECODE]
    assert sum(need) * 60 < paid < max(decode) * 800
    for worker in simulation.workers.values():
        load = worker.load()
        assert (load.held_blocks, load.running_requests, load.queued_requests, load.active_leases) == (0, 0, 0, 0)
    door = simulation.house.admission
    assert (door.requests, door.queued_tokens, door.waiting) == (0, 0, 0)
    for view in simulation.house.fleet:
        assert (view.requests, view.streams, view.prefill_tokens) == (0, 0, 0)
        assert (view.kv._prompts, view.kv._expected) == (0, 0)


@pytest.mark.parametrize(("grace_s", "moves"), [(600.0, False), (2.0, True)])
def test_a_drained_pod_ends_with_its_last_request_or_hands_over_what_takes_too_long(grace_s: float, moves: bool) -> None:
    day = Day(swing=6, seconds=800)
    workload = generate("chat", 2.4, day.load_s(800), Random(1)).through(day)
    result, _ = run(workload, {"prefill": 1, "decode": 1}, pre_stop=PreStop(grace_s, drains=True))
    decode = ready(result, Role.DECODE)
    assert max(decode) > min(decode[decode.index(max(decode)) :]), "some were taken away"
    assert result.completed == result.arrived == len(workload.arrivals)
    assert result.output_tokens == sum(arrival.output_length for arrival in workload.arrivals)
    assert (result.errors["retried"] > 0) is moves
    if not moves:  # nobody waits for a pod that has nothing left
        bound = run(workload, {"prefill": 1, "decode": 1}, pre_stop=PreStop(grace_s))[0]
        assert result.worker_seconds[Role.DECODE] < bound.worker_seconds[Role.DECODE]


def test_a_pod_takes_its_time_to_start_and_to_be_seen_to_be_needed() -> None:
    """16 streams fill a worker, and 0.7 is wanted; what is so after 15 s is seen at 30 s, and a start takes until 70 s."""
    workload = Workload("burst", [Arrival(0.0, 100, 20_000) for _ in range(16)], 256)
    result, _ = run(workload, {"prefill": 1, "decode": 1})
    assert result.timeline[0].pods["decode"] == 2
    assert ready(result, Role.DECODE)[:2] == [1, 2]


def test_a_fleet_whose_pools_are_full_grows_although_nothing_waits() -> None:
    """With a target for the first token the door refuses what would wait. Answers of 20,000 tokens, of which nine are in a
    pool at a time; nobody waits, no batch is full and no pool is ever held for more than two thirds."""
    small = msgspec.structs.replace(GPU, pool_tokens=100_000)
    workload = Workload("long", [Arrival(4.0 * number, 100, 20_000) for number in range(900)], 256)
    result, _ = run(workload, {"prefill": 1, "decode": 4}, SPECS | {"decode": spec("decode", FULL, most=99)}, small, 8000.0)
    need = needs(workload, dict.fromkeys((Role.PREFILL, Role.DECODE), small), SloConfig(), ENGINE, 60.0)[Role.DECODE]
    assert max(ready(result, Role.DECODE)) > 0.9 * max(need) > 20
    half, end = result.timeline[30], result.timeline[59]
    assert half.refused > 100, "at first there are too few"
    assert end.refused - half.refused < 0.02 * (end.arrived - half.arrived)


def test_in_overload_queues_are_in_the_router_and_a_rule_on_them_sees_it_when_one_on_workers_does_not() -> None:
    """Workers are given two steps' worth of prompts in advance: 8,192 tokens never wait there."""
    workload = generate("chat", 9, 61, Random(1))
    wanted = {}
    for name in ("baton_prefill_queued_tokens", "baton_waiting_prompt_tokens"):
        rule = Metric("External", name, 8192.0)
        result, _ = run(workload, {"prefill": 2, "decode": 4}, SPECS | {"prefill": spec("prefill", rule)})
        wanted[name] = result.timeline[0].pods["prefill"]
    assert wanted["baton_prefill_queued_tokens"] <= 2
    assert wanted["baton_waiting_prompt_tokens"] > 4


def test_at_its_bounds_a_fleet_stays() -> None:
    workload = generate("chat", 2, 120, Random(1))
    bounds = {name: replace(each, least=2, most=2) for name, each in SPECS.items()}
    result, _ = run(workload, {"prefill": 2, "decode": 2}, bounds)
    assert set(ready(result, Role.PREFILL)) == set(ready(result, Role.DECODE)) == {2}
    assert result.errors["retried"] == 0


def test_a_day_has_its_quietest_hour_at_four_and_its_busiest_at_sixteen() -> None:
    day = Day(swing=4)
    assert day.load_s(86_400) == pytest.approx(86_400)
    hours = [day.load_s((hour + 0.5) * 3600) - day.load_s((hour - 0.5) * 3600) for hour in range(1, 24)]
    assert hours.index(min(hours)) + 1 == 4
    assert hours.index(max(hours)) + 1 == 16
    assert max(hours) / min(hours) == pytest.approx(4, rel=0.05)
    times = day.when([day.load_s(at) for at in (60.0, 4000.0, 50_000.0, 86_000.0)])
    assert times == pytest.approx([60, 4000, 50_000, 86_000], rel=1e-3)


def test_a_trace_is_repeated_to_fill_a_day() -> None:
    trace = Workload("trace", [Arrival(10.0 * i, 100, 10) for i in range(1, 7)], 256)
    day = trace.filling(200)
    assert len(day.arrivals) == 17
    assert day.arrivals[-1].at_s < 200


def test_what_is_needed_is_the_work_that_arrives() -> None:
    """A prompt of eight steps and ten tokens in each minute; three quarters of the second prompt were in the first."""
    known = tuple(BlockHash(bytes([number])) for number in range(12))
    arrivals = [Arrival(0.5, 4096, 10, known), Arrival(60.5, 4096, 10, known)]
    first = Workload("w", arrivals, 256)
    need = needs(first, {Role.PREFILL: GPU, Role.DECODE: GPU}, SloConfig(), ENGINE, 60.0)
    all_s = (8 * 39 + 0.16 * 4096 + 9e-6 * 4096 * 2048) / 1e3
    rest_s = (2 * 39 + 0.16 * 1024 + 9e-6 * 1024 * (3072 + 512)) / 1e3
    assert need[Role.PREFILL] == pytest.approx([all_s / 60, rest_s / 60], rel=0.01)
    step_s = (39 + 16 * (0.25 + 2.8e-4 * (4096 + 5))) / 1e3
    assert need[Role.DECODE] == pytest.approx([10 * step_s / 16 / 60] * 2, rel=0.01)


def test_a_bug_in_what_scales_ends_the_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("scripts.simulation.autoscaler.Autoscaler.decide", broken)
    with pytest.raises(ZeroDivisionError):
        run(generate("chat", 5, 60, Random(1)), {"prefill": 1, "decode": 1})
