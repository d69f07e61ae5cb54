"""Which fleets to simulate, in which modes, and running them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal, cast

from python_backends.core.config import EngineConfig, RouterConfig, SloConfig
from python_backends.core.errors import ConfigError
from python_backends.core.types import Role
from scripts.simulation.hardware import Rates
from scripts.simulation.report import Summary, summarise
from scripts.simulation.simulator import Scenario, simulate
from scripts.simulation.workload import Workload

MODES = ("adaptive", "always-remote", "always-local")
_UNBOUNDED = 10**9


@dataclass(frozen=True, slots=True)
class Plan:
    """One run, as a process of its own can make it."""

    scenario: Scenario
    workload: Workload


def run_all(plans: Sequence[Plan], jobs: int) -> list[Summary]:
    """In order of the plans, whatever ran when."""
    if jobs == 1 or len(plans) == 1:
        return [_run(plan) for plan in plans]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(_run, plans))


def _run(plan: Plan) -> Summary:
    return summarise(simulate(plan.scenario, plan.workload))


def parse_fleet(text: str) -> Mapping[Role, int]:
    """`2:6` or `8`. Raises ConfigError."""
    try:
        numbers = [int(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and numbers[0] > 0:
        return {Role.AGGREGATED: numbers[0]}
    if len(numbers) == 2 and numbers[0] >= 0 and numbers[1] > 0:
        return {Role.PREFILL: numbers[0], Role.DECODE: numbers[1]}
    raise ConfigError(f"--fleets: {text!r} is neither PREFILL:DECODE, such as 2:6, nor a number of aggregated workers")


def default_fleets(workers: int) -> list[Mapping[Role, int]]:
    """All aggregated, and a quarter, half, three quarters of them for prefill."""
    fleets: list[Mapping[Role, int]] = [{Role.AGGREGATED: workers}]
    for prefill in sorted({max(workers * quarters // 4, 1) for quarters in (1, 2, 3)}):
        if prefill < workers:
            fleets.append({Role.PREFILL: prefill, Role.DECODE: workers - prefill})
    return fleets


def make_plans(
    workload: Workload,
    fleets: Sequence[Mapping[Role, int]],
    modes: Sequence[str],
    rates: Mapping[Role, Rates],
    slo: SloConfig,
    engine: EngineConfig,
) -> list[Plan]:
    """Every fleet in every mode of MODES; aggregated workers have only one."""
    plans = []
    for fleet in fleets:
        for name in modes if Role.DECODE in fleet else ["aggregated"]:
            mode = cast(Literal["adaptive", "always-remote", "always-local"], "adaptive" if name == "aggregated" else name)
            router = RouterConfig(mode=mode, slo=slo, max_requests=_UNBOUNDED, max_queued_tokens=_UNBOUNDED)
            plans.append(Plan(Scenario(name, dict(fleet), {role: rates[role] for role in fleet}, router, engine), workload))
    return plans
