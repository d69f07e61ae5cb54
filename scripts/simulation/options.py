"""What scripts/simulate and scripts/advise are told alike: a workload, and the workers that are to serve it."""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

from python_backends.core.errors import ConfigError
from python_backends.core.paths import repository_root
from python_backends.core.types import Role
from scripts.simulation.hardware import Rates, load_catalogue, load_rates
from scripts.simulation.workload import Day, Workload, generate, read_trace

_CATALOGUE = repository_root() / "configs" / "simulation" / "gpus.yaml"


def choose_workload(options: argparse.Namespace) -> Workload:
    """As the options say. Raises ConfigError."""
    random, day = Random(options.seed), Day(options.swing)
    day_s = day.load_s(options.day * 3600)
    if options.trace is not None:
        workload = read_trace(options.trace, random).scaled(options.speed, options.length, options.requests)
        if day_s and workload.arrivals:
            workload = workload.filling(day_s)
    else:
        seconds = options.requests / options.rate if options.requests else options.minutes * 60
        workload = generate(options.workload, options.rate, day_s or seconds, random, options.tenants)
        workload = workload.scaled(length=options.length, most=options.requests)
    if not workload.arrivals:
        raise ConfigError("the workload has no requests; give a longer time or a higher rate")
    return workload.through(day) if day_s else workload


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("workload")
    what.add_argument(
        "--trace", type=Path, metavar="FILE", help="Mooncake JSON lines, or CSV as Azure's; else a workload is drawn"
    )
    what.add_argument(
        "--workload", default="mixed", help="mixed, chat, code, conversation: with the statistics of public traces"
    )
    what.add_argument("--rate", type=positive, default=10.0, help="requests per second of a drawn workload")
    what.add_argument("--minutes", type=positive, default=10.0, help="length of a drawn workload")
    what.add_argument("--requests", type=int, default=0, metavar="N", help="only so many; 0 is all")
    what.add_argument(
        "--day",
        type=float,
        default=0.0,
        metavar="HOURS",
        help="instead: so much of a day, with quiet nights; a trace is repeated",
    )
    what.add_argument("--swing", type=positive, default=4.0, help="--day: the rate at 16 o'clock in terms of that at 4")
    what.add_argument("--speed", type=positive, default=1.0, help="a trace's arrivals come so many times faster")
    what.add_argument("--length", type=positive, default=1.0, help="prompts and outputs are so many times longer")
    what.add_argument("--tenants", type=int, default=1, help="that a drawn workload's requests belong to")
    what.add_argument("--seed", type=int, default=0)


def add_hardware_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_argument_group("workers")
    which.add_argument("--workers", type=int, default=0, help="shared out among the roles in several ways; default 8")
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


def add_scaling_options(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("scaling")
    how.add_argument(
        "--autoscale", type=Path, metavar="PATH", help="HorizontalPodAutoscalers: a kustomize folder, or a file of them"
    )
    how.add_argument("--alone", action="store_true", help="don't run fixed fleets for comparison")
    how.add_argument("--max-replicas", type=int, default=0, metavar="N", help="of workers of a role, instead of the manifests'")
    how.add_argument("--start-s", type=positive, default=120.0, metavar="S", help="a pod's start: node, image and model")
    how.add_argument("--metrics-age-s", type=float, default=30.0, metavar="S", help="of what the autoscaler sees")


def choose_rates(options: argparse.Namespace) -> dict[Role, Rates]:
    """The same for every role. Raises ConfigError."""
    if options.rates is not None:
        rates = load_rates(options.rates)
    else:
        rates = load_catalogue(options.catalogue).rates(options.gpu, options.model, options.gpus_per_worker)
    return dict.fromkeys(Role, rates)


def positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
