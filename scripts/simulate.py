"""Simulates a fleet: the router as it is, over workers whose work takes simulated time. Hours pass in minutes.

    scripts/simulate --workload mixed --rate 20 --workers 8
    scripts/simulate --trace conversation.jsonl --fleets 2:6,4:4,8 --modes adaptive,always-remote --plot out.png
    scripts/simulate --autoscale configs/kubernetes/overlays/gpu-trtllm --day 24 --rate 40 --max-replicas 100 --plot day.png
    scripts/simulate --validate                 # how near is it to a real server on this machine?

A fleet is PREFILL:DECODE workers, or a single number of aggregated ones. With --autoscale the fleet grows and shrinks as its
manifests say, and fixed ones are run for comparison: one of its largest size, one of its mean size.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import msgspec
from rich.console import Console

from python_backends.core.config import EngineConfig, SloConfig
from python_backends.core.errors import BatonError
from python_backends.core.paths import repository_root
from python_backends.core.types import Role
from scripts.simulation.autoscaled import compare, plot_scaled, print_scaled, read_scaling
from scripts.simulation.fleets import MODES, default_fleets, make_plans, parse_fleet, run_all
from scripts.simulation.options import (
    add_hardware_options,
    add_scaling_options,
    add_workload_options,
    choose_rates,
    choose_workload,
    positive,
)
from scripts.simulation.report import print_table, write_json, write_plot
from scripts.simulation.validation import print_comparison, validate
from scripts.terminal import print_error
from scripts.tritonserver import TritonServer

_VALIDATED = repository_root() / "configs" / "default.yaml"


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
    add_scaling_options(parser)
    parser.add_argument("--validate", action="store_true", help="compare with a real server of --config on this machine")
    parser.add_argument("--config", type=Path, default=_VALIDATED, metavar="FILE", help="--validate: the deployment")
    parser.add_argument("--load", type=positive, default=0.6, help="--validate: how busy the workers are to be")
    parser.add_argument("--warm-up", type=positive, default=30.0, metavar="S", help="--validate: for so long, to learn from")
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


def _autoscale(options: argparse.Namespace, console: Console) -> int:
    """Raises BatonError."""
    scaling = read_scaling(options.autoscale, options.max_replicas, options.start_s, options.metrics_age_s)
    workload, rates = choose_workload(options), choose_rates(options)
    console.print(f"{workload.name}: {len(workload.arrivals)} requests", highlight=False)
    comparison = compare(
        workload,
        scaling,
        rates,
        SloConfig(ttft_ms=options.ttft_ms, itl_ms=options.itl_ms),
        EngineConfig(step_tokens=options.step_tokens, max_batch=options.max_batch),
        options.gpus_per_worker,
        lambda plans: run_all(plans, options.jobs),
        alone=options.alone,
    )
    print_scaled(console, comparison)
    if options.json:
        write_json(options.json, comparison.summaries)
    if options.plot:
        plot_scaled(options.plot, comparison, workload.name)
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console()
    logging.getLogger("router").setLevel(logging.ERROR)  # that requests go on elsewhere is counted
    try:
        if options.validate:
            return _validate(options, console)
        if options.autoscale:
            return _autoscale(options, console)
        workload = choose_workload(options)
        fleets = (
            [parse_fleet(text) for text in options.fleets.split(",")]
            if options.fleets
            else default_fleets(options.workers or 8)
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
