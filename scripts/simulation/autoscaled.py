"""A fleet scaled by its manifests against fixed ones, over the same load: `scripts/simulate --autoscale`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from python_backends.core.config import EngineConfig, RouterConfig, SloConfig
from python_backends.core.errors import ConfigError
from python_backends.core.types import Role
from scripts.simulation.autoscaler import Spec
from scripts.simulation.fleets import Plan
from scripts.simulation.hardware import Rates
from scripts.simulation.manifests import load_autoscalers, pre_stop
from scripts.simulation.report import Summary
from scripts.simulation.scaling import ROUTER, SCALED, Scaling, check_metrics
from scripts.simulation.simulator import Scenario
from scripts.simulation.timeline import WATCH_S, Moment, needs
from scripts.simulation.workload import Workload

_ROLES = (Role.PREFILL, Role.DECODE)
_AT_FIRST = 0.7  # how busy the fleet begins
_ROWS = 24
_UNBOUNDED = 10**9
# docs/scaling.md, "Unit costs": seconds of a router's core
_ROUTER_REQUEST_S, _ROUTER_TOKEN_S = 1.7e-3, 64e-6

Run = Callable[[Sequence[Plan]], list[Summary]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """autoscaled first, then fixed fleets: as large as it was at its largest, and with as many worker-hours as it had."""

    summaries: Sequence[Summary]
    needs: Mapping[Role, Sequence[float]]  # per WATCH_S
    gpus_per_worker: int


def read_scaling(path: Path, most: int, start_s: float, metrics_age_s: float) -> Scaling:
    """As the manifests say, but for `most` workers of a role, if that is not 0. Raises ConfigError."""
    found = {target.removeprefix("baton-"): spec for target, spec in load_autoscalers(path).items()}
    specs = {name: spec for name, spec in found.items() if name in SCALED}
    for role in _ROLES:
        if role.value not in specs:
            raise ConfigError(f"{path}: no HorizontalPodAutoscaler scales baton-{role.value}; there are {', '.join(found)}")
    check_metrics(specs)
    if most:
        specs |= {role.value: replace(specs[role.value], most=most) for role in _ROLES}
    hooks = {name: pre_stop(path, f"baton-{name}") for name in specs}
    return Scaling(specs, {name: spec.least for name, spec in specs.items()}, start_s, metrics_age_s, hooks)


def compare(
    workload: Workload,
    scaling: Scaling,
    rates: Mapping[Role, Rates],
    slo: SloConfig,
    engine: EngineConfig,
    gpus_per_worker: int,
    run: Run,
    *,
    alone: bool = False,
) -> Comparison:
    """Begins with as many workers as the load needs then. alone: without fixed fleets."""
    need = needs(workload, rates, slo, engine, WATCH_S)
    begin = dict(scaling.begin) | {
        role.value: _bounded(scaling.specs[role.value], math.ceil(_first(need[role]) / _AT_FIRST)) for role in _ROLES
    }
    router = RouterConfig(slo=slo, max_requests=_UNBOUNDED, max_queued_tokens=_UNBOUNDED)
    scaled = Scenario("autoscaled", {}, {role: rates[role] for role in _ROLES}, router, engine)
    scaled = replace(scaled, scaling=replace(scaling, begin=begin))
    (first,) = run([Plan(scaled, workload)])
    if alone:
        return Comparison([first], need, gpus_per_worker)
    peak = {role: max(moment.ready.get(role.value, 1) for moment in first.timeline) for role in _ROLES}
    mean = {role: max(round(first.worker_hours[role.value] * 3600 / first.seconds), 1) for role in _ROLES}
    fixed = [replace(scaled, name=name, workers=fleet, scaling=None) for name, fleet in (("peak", peak), ("mean", mean))]
    return Comparison([first, *run([Plan(each, workload) for each in fixed])], need, gpus_per_worker)


def _first(need: Sequence[float], periods: int = 10) -> float:
    return sum(need[:periods]) / len(need[:periods])


def _bounded(spec: Spec, count: int) -> int:
    return min(max(count, spec.least), spec.most)


# --- telling ---


def print_scaled(console: Console, comparison: Comparison) -> None:
    _print_day(console, comparison)
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("fleet", no_wrap=True)
    for heading in ("GPU-hours", "good/s", "kept", "refused", "TTFT p90", "p99", "busy P", "D", "moved"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in comparison.summaries:
        table.add_row(
            f"{each.mode} {each.fleet}".strip(),
            f"{sum(each.worker_hours.values()) * comparison.gpus_per_worker:,.0f}",
            f"{each.goodput:.2f}",
            f"{each.in_target:.1%}",
            f"{(each.refused + each.failed) / max(each.requests, 1):.1%}",
            *(f"{each.ttft_ms[share]:,.0f}" for share in ("p90", "p99")),
            *(f"{each.busy[role.value]:.0%}" for role in _ROLES),
            f"{each.retried:,}",
        )
    table.caption = "ms; kept: answers in target; moved: requests whose worker went under them"
    console.print(table)


def _print_day(console: Console, comparison: Comparison) -> None:
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for heading in (
        "hour",
        "requests/s",
        "need P",
        "ready P",
        "need D",
        "ready D",
        "routers",
        "cores",
        "TTFT p90",
        "refused/s",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    scaled = comparison.summaries[0]
    moments = [_start(), *scaled.timeline]
    step = max(len(moments) // _ROWS, 1)
    for index in range(step, len(moments), step):
        before, now = moments[index - step], moments[index]
        passed = now.at_s - before.at_s
        prefill, decode = (_mean(comparison.needs[role][index - step : index]) for role in _ROLES)
        routers = now.pods.get(ROUTER, 1)
        table.add_row(
            f"{now.at_s / 3600:.2f}",
            f"{(now.arrived - before.arrived) / passed:.1f}",
            f"{prefill:.1f}",
            f"{now.ready.get('prefill', 0)}",
            f"{decode:.1f}",
            f"{now.ready.get('decode', 0)}",
            f"{routers}",
            f"{_router_cores(before, now) / routers:.0%}",
            f"{max(moment.ttft_p90_ms for moment in moments[index - step + 1 : index + 1]):,.0f}",
            f"{(now.refused - before.refused) / passed:.2f}",
        )
    table.caption = "need: workers fully at work; cores: of routers; TTFT p90: ms, worst minute"
    console.print(table)
    console.print()


def _start() -> Moment:
    return Moment(0.0, {}, {}, 0, 0, 0, 0, 0, 0, 0, 0.0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _router_cores(before: Moment, now: Moment) -> float:
    """Of all routers together."""
    cost_s = (now.completed - before.completed) * _ROUTER_REQUEST_S + (now.tokens - before.tokens) * _ROUTER_TOKEN_S
    return cost_s / (now.at_s - before.at_s)


def plot_scaled(path: Path, comparison: Comparison, title: str) -> None:
    """Workers against need, answers against requests, and the time to first token, over the time."""
    import matplotlib as mpl  # only now: most runs need no plot, and it takes its time

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    moments = [_start(), *comparison.summaries[0].timeline]
    hours = [moment.at_s / 3600 for moment in moments[1:]]
    figure, axes = plt.subplots(4, 1, figsize=(10, 11), sharex=True, layout="constrained")
    for axis, role in zip(axes, _ROLES, strict=False):
        need = list(comparison.needs[role])[: len(hours)]
        axis.plot(hours, [moment.ready.get(role.value, 0) for moment in moments[1:]], label="ready", drawstyle="steps-post")
        axis.plot(hours, [moment.pods.get(role.value, 0) for moment in moments[1:]], ":", label="wanted")
        axis.plot(hours[: len(need)], need, label="need", alpha=0.7)
        axis.set_ylabel(f"{role.value} workers")
    for name in ("arrived", "good", "refused"):
        rates = [(getattr(now, name) - getattr(before, name)) / (now.at_s - before.at_s) for before, now in pairwise(moments)]
        axes[2].plot(hours, rates, label=name)
    axes[2].set_ylabel("requests/s")
    axes[3].plot(hours, [moment.ttft_p90_ms for moment in moments[1:]], label="TTFT p90")
    axes[3].set_yscale("log")
    axes[3].set_ylabel("ms")
    axes[3].set_xlabel("hours")
    for axis in axes:
        axis.grid(visible=True, alpha=0.3)
        axis.legend(loc="upper left")
        if axis is not axes[3]:
            axis.set_ylim(bottom=0)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
