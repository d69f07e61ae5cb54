"""Would disaggregation help? Says yes or no, with how many workers of which kind, what it gains, and why.

    scripts/advise --trace azure.csv --workers 8 --gpu h100-80gb --model llama-3.1-8b
    scripts/advise --workload chat --rate 40 --workers 4 --itl-ms 40
    scripts/advise --server 127.0.0.1:8002      # a running server: what it has measured of its own requests and workers

Simulates the workload on so many aggregated workers and on several splits of them (scripts/simulate).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from random import Random

import msgspec
from rich.console import Console

from python_backends.core.config import EngineConfig, SloConfig
from python_backends.core.errors import BatonError
from python_backends.core.types import Role
from scripts.simulation.advice import Advice, advise
from scripts.simulation.fleets import run_all
from scripts.simulation.hardware import Rates
from scripts.simulation.measured import MeasuredServer, read_metrics
from scripts.simulation.options import add_hardware_options, add_workload_options, choose_rates, choose_workload
from scripts.simulation.report import print_table
from scripts.simulation.workload import Workload
from scripts.terminal import print_error

_TTFT_MS, _ITL_MS = 2000.0, 50.0  # aimed at when nothing is said
_MOST_REQUESTS = 4000  # of a trace; more would tell the same


def print_advice(console: Console, advice: Advice) -> None:
    print_table(console, advice.summaries)
    if advice.disaggregate:
        console.print(
            f"[green]Yes[/green]: {advice.fleet}, {advice.gain:.2f}x the answers that keep the targets", highlight=False
        )
        if advice.threshold:
            console.print(
                f"Prompts of more than about {advice.threshold} uncached tokens go to prefill workers", highlight=False
            )
    else:
        console.print(
            f"[yellow]No[/yellow]: stay with {advice.fleet}; the best split has {advice.gain:.2f}x its goodput", highlight=False
        )
    for reason in advice.reasons:
        console.print(f"- {reason}", highlight=False, markup=False, soft_wrap=True)


def _of_server(options: argparse.Namespace, console: Console) -> Advice:
    """Raises Unavailable."""
    with console.status(f"Looking at {options.server} for {options.watch:.0f} s"):
        before, began = read_metrics(options.server), time.monotonic()
        time.sleep(options.watch)
        server = MeasuredServer(before, read_metrics(options.server), time.monotonic() - began)
    console.print(
        f"{server.rate:.2f} requests/s on {server.workers} workers, {server.reused:.0%} of the prompt tokens reused",
        highlight=False,
    )
    workload = server.workload(max(options.minutes * 60, 60.0), Random(options.seed))
    return _advise(options, workload, options.workers or server.workers, server.rates())


def _advise(options: argparse.Namespace, workload: Workload, workers: int, rates: Mapping[Role, Rates]) -> Advice:
    slo = SloConfig(ttft_ms=options.ttft_ms or _TTFT_MS, itl_ms=options.itl_ms or _ITL_MS)
    engine = EngineConfig(step_tokens=options.step_tokens, max_batch=options.max_batch)
    return advise(workload, workers, rates, slo, engine, partial(run_all, jobs=options.jobs))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/advise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_workload_options(parser)
    add_hardware_options(parser)
    parser.set_defaults(requests=_MOST_REQUESTS)
    parser.add_argument("--server", metavar="HOST:PORT", help="metrics port of a running server: its requests and its workers")
    parser.add_argument("--watch", type=float, default=30.0, metavar="S", help="--server: how long to count requests")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time; default: one per core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the advice there, too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console()
    try:
        if options.server:
            advice = _of_server(options, console)
        else:
            advice = _advise(options, choose_workload(options), options.workers or 8, choose_rates(options))
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    print_advice(console, advice)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(advice), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
