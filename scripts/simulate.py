"""Simulates a fleet: the router as it is, over workers whose work takes simulated time. Hours pass in minutes.

    scripts/simulate --workload mixed --rate 20 --workers 8
    scripts/simulate --trace conversation.jsonl --fleets 2:6,4:4,8 --modes adaptive,always-remote --plot out.png
    scripts/simulate --validate                 # how near is it to a real server on this machine?

A fleet is PREFILL:DECODE workers, or a single number of aggregated ones.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import msgspec
from rich.console import Console

from python_backends.core.config import EngineConfig, RouterConfig, SloConfig
from python_backends.core.errors import BatonError, ConfigError
from python_backends.core.paths import repository_root
from python_backends.core.types import Role
from scripts.simulation.hardware import Rates, load_catalogue, load_rates
from scripts.simulation.report import Summary, print_table, summarise, write_json, write_plot
from scripts.simulation.simulator import Scenario, simulate
from scripts.simulation.validation import print_comparison, validate
from scripts.simulation.workload import Workload, generate, read_trace
from scripts.terminal import print_error
from scripts.tritonserver import TritonServer

MODES = ("adaptive", "always-remote", "always-local")
_CATALOGUE = repository_root() / "configs" / "simulation" / "gpus.yaml"
_VALIDATED = repository_root() / "configs" / "default.yaml"
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
    rates: Rates,
    slo: SloConfig,
    engine: EngineConfig,
    queue_tokens: int = _UNBOUNDED,
) -> list[Plan]:
    """Every fleet in every mode; of aggregated workers there is only one."""
    plans = []
    for fleet in fleets:
        for mode in modes if Role.DECODE in fleet else ["aggregated"]:
            router = RouterConfig(
                mode="adaptive" if mode == "aggregated" else mode,  # type: ignore[arg-type]  # checked by _parse
                slo=slo,
                max_requests=_UNBOUNDED,
                max_queued_tokens=queue_tokens,
            )
            plans.append(Plan(Scenario(mode, dict(fleet), dict.fromkeys(fleet, rates), router, engine), workload))
    return plans


def choose_workload(options: argparse.Namespace) -> Workload:
    """As the options say. Raises ConfigError."""
    random = Random(options.seed)
    if options.trace is not None:
        workload = read_trace(options.trace, random).scaled(options.speed, options.length, options.requests)
    else:
        seconds = options.requests / options.rate if options.requests else options.minutes * 60
        workload = generate(options.workload, options.rate, seconds, random, options.tenants)
        workload = workload.scaled(length=options.length, most=options.requests)
    if not workload.arrivals:
        raise ConfigError("the workload has no requests; give a longer time or a higher rate")
    return workload


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("workload")
    what.add_argument(
        "--trace", type=Path, metavar="FILE", help="Mooncake JSON lines, or CSV as Azure's; else a workload is drawn"
    )
    what.add_argument(
        "--workload", default="mixed", help="mixed, chat, code, conversation: with the statistics of public traces"
    )
    what.add_argument("--rate", type=_positive, default=10.0, help="requests per second of a drawn workload")
    what.add_argument("--minutes", type=_positive, default=10.0, help="length of a drawn workload")
    what.add_argument("--requests", type=int, default=0, metavar="N", help="only so many; 0 is all")
    what.add_argument("--speed", type=_positive, default=1.0, help="a trace's arrivals come so many times faster")
    what.add_argument("--length", type=_positive, default=1.0, help="prompts and outputs are so many times longer")
    what.add_argument("--tenants", type=int, default=1, help="that a drawn workload's requests belong to")
    what.add_argument("--seed", type=int, default=0)


def add_hardware_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_argument_group("workers")
    which.add_argument("--workers", type=int, default=8, help="shared out among the roles in several ways")
    which.add_argument("--fleets", default="", metavar="LIST", help="instead: for example 2:6,4:4,8")
    which.add_argument("--catalogue", type=Path, default=_CATALOGUE, metavar="FILE", help="figures of GPUs and models")
    which.add_argument("--gpu", default="h100-80gb", help="of the catalogue")
    which.add_argument("--model", default="llama-3.1-8b", help="of the catalogue")
    which.add_argument("--gpus-per-worker", type=int, default=1)
    which.add_argument("--rates", type=Path, metavar="FILE", help="measured ones instead, as --validate writes them")
    which.add_argument("--step-tokens", type=int, default=2048, help="engine.step_tokens")
    which.add_argument("--max-batch", type=int, default=256, help="engine.max_batch")
    which.add_argument("--ttft-ms", type=float, default=0.0, help="router.slo.ttft_ms; 0 is no target")
    which.add_argument("--itl-ms", type=float, default=0.0, help="router.slo.itl_ms; 0 is no target")


def choose_rates(options: argparse.Namespace) -> Rates:
    """Raises ConfigError."""
    if options.rates is not None:
        return load_rates(options.rates)
    return load_catalogue(options.catalogue).rates(options.gpu, options.model, options.gpus_per_worker)


def _positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _modes(text: str) -> list[str]:
    modes = text.split(",")
    for mode in modes:
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"{mode!r} is not one of {', '.join(MODES)}")
    return modes


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_workload_options(parser)
    add_hardware_options(parser)
    parser.add_argument("--validate", action="store_true", help="compare with a real server of --config on this machine")
    parser.add_argument("--config", type=Path, default=_VALIDATED, metavar="FILE", help="--validate: the deployment")
    parser.add_argument("--load", type=_positive, default=0.6, help="--validate: how busy the workers are to be")
    parser.add_argument("--warm-up", type=_positive, default=30.0, metavar="S", help="--validate: for so long, to learn from")
    parser.add_argument("--save-rates", type=Path, metavar="FILE", help="--validate: write what was learned, for --rates")
    parser.add_argument(
        "--modes", type=_modes, default=list(MODES), metavar="LIST", help=f"of {', '.join(MODES)}; default: all"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time; default: one per core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw TTFT, ITL and goodput: a .png, .svg or .pdf")
    return parser.parse_args(arguments)


def _validate(options: argparse.Namespace, console: Console) -> int:
    """Raises BatonError."""
    workload = choose_workload(options)
    with TritonServer(options.config) as server:
        validation = validate(server, workload, options.modes, options.load, options.warm_up, console)
    print_comparison(console, validation)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(validation.comparisons), indent=1))
    if options.save_rates:
        rates = validation.rates.get(Role.DECODE) or next(iter(validation.rates.values()))
        options.save_rates.write_bytes(msgspec.json.format(msgspec.json.encode(rates), indent=1))
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console()
    try:
        if options.validate:
            return _validate(options, console)
        workload = choose_workload(options)
        fleets = (
            [parse_fleet(text) for text in options.fleets.split(",")] if options.fleets else default_fleets(options.workers)
        )
        slo = SloConfig(ttft_ms=options.ttft_ms, itl_ms=options.itl_ms)
        engine = EngineConfig(step_tokens=options.step_tokens, max_batch=options.max_batch)
        plans = make_plans(workload, fleets, options.modes, choose_rates(options), slo, engine)
        arrivals = workload.arrivals
        console.print(
            f"{workload.name}: {len(arrivals)} requests in {arrivals[-1].at_s:.0f} s, {len(plans)} runs", highlight=False
        )
        summaries = run_all(plans, options.jobs)
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    print_table(console, summaries)
    if options.json:
        write_json(options.json, summaries)
    if options.plot:
        write_plot(options.plot, summaries, workload.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
