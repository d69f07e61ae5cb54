"""Everything that is compared with something, in one run: one table, a picture of each part, one JSON file.

    scripts/bench all                                       # Baton and its own aggregated mode: about half an hour
    scripts/bench all engine mixed --against installed      # beside every rival that scripts/rivals has installed
    scripts/bench all --repetitions 7 --against transformers,vllm,vllm-disaggregated --out results

All on the demo model, on all cores that this process may use. Whoever is compared is measured in turns within one run, in
alternating order; the table shows medians, least and most, and the median of the ratios to the first contender. What can't be
measured here is left out, with the reason at the end; Ctrl-C keeps what was measured. Results: bench.json and a picture of each
part in --out; the runs of the mixed load are below it, in mixed.

engine    the CPU engine without a server: prefill by length, decode steps by batch and context, the machine's limits
mixed     steady streams and a long prompt every 12 s: Baton, its aggregated mode and rivals' servers
serving, prefix, handoff, scale, start    see scripts/bench served --help
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from loadtest.comparison import MEASURES, Measure, Side
from loadtest.options import Options
from loadtest.summary import ALL
from loadtest.tables import milliseconds
from python_backends.core.paths import repository_root
from scripts.benchmarks import engine, mixed, served
from scripts.benchmarks.figures import Figure
from scripts.benchmarks.parts import Bench, Part, Taken, add_options, read_options, run_parts
from scripts.compare import Runs, read_targets, run_rounds
from scripts.loadtest import resolved
from scripts.rivalry.engine import ENGINES
from scripts.rivalry.environments import ENVIRONMENTS
from scripts.rivalry.servers import RIVALS

_LOAD = Options(period=12.0, duration=60.0, warmup=8.0, slo="ttft=8000,itl=200")
_CONFIG = repository_root() / "configs" / "1p1d.yaml"
_WITH_BATON = ("torch", "transformers")  # they are installed with it
_ENGINES = tuple(name for name in ENGINES if name in ENVIRONMENTS)  # as they are; variants have other weights
_INSTALLED = "installed"
_PARTS = ("engine", "mixed", *served.PARTS)


def measure_mixed(bench: Bench, taken: Taken, against: Sequence[str], parsed: argparse.Namespace) -> None:
    """A value for each round. The aggregated mode always stands beside Baton."""
    out = parsed.out.absolute() / "mixed"
    targets = read_targets(mixed.sides(_CONFIG, None, ["aggregated", *against], out))
    runs: Runs = {target.name: [] for target in targets}
    try:
        run_rounds(
            targets, resolved(_LOAD, out), bench.repetitions, "grpc", parsed.command, bench.console, runs, taken.leave_out
        )
    finally:
        taken.extend(mixed_figures(taken.part, [Side(name, found) for name, found in runs.items() if found]))


def mixed_figures(part: str, sides: Sequence[Side]) -> Iterator[Figure]:
    """All measures of all kinds of requests; sides may have different numbers of rounds."""
    kinds = dict.fromkeys(kind for side in sides for run, _ in side.runs for kind in (*run.slos, ALL))
    for kind in kinds:
        for measure in MEASURES:
            if measure.needs_second_slo or (kind == ALL and measure.of_one_kind):
                continue
            for side in sides:
                values = tuple(float(measure.value(found)) for found in side.figures_of(kind))
                yield Figure(part, f"{kind}: {measure.name.removesuffix(' per second')}", side.name, _unit(measure), values)


def _unit(measure: Measure) -> str:
    if measure.show is milliseconds:
        return "ms"
    if measure.name == "failed":
        return "requests"
    return "tokens/s" if measure.name.startswith("tokens") else "requests/s"


def known_rivals() -> list[str]:
    """Engines and servers, in an order to be measured in."""
    return list(dict.fromkeys((*_WITH_BATON, *_ENGINES, *RIVALS)))


def installed_rivals() -> list[str]:
    environments = {name: name for name in _ENGINES} | {name: rival.environment for name, rival in RIVALS.items()}
    return [*_WITH_BATON, *(name for name, environment in environments.items() if ENVIRONMENTS[environment].is_installed)]


def _against(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in (_INSTALLED, *known_rivals())]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join((_INSTALLED, *known_rivals()))}")
    found = [one for name in names for one in (installed_rivals() if name == _INSTALLED else [name])]
    return list(dict.fromkeys(found))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, _PARTS)
    names = ", ".join(known_rivals())
    parser.add_argument(
        "--against", type=_against, default=[], metavar="NAMES", help=f"comma-separated: {_INSTALLED}, or some of {names}"
    )
    parsed = read_options(parser, _PARTS, arguments)
    threads = len(os.sched_getaffinity(0))
    engines = [name for name in parsed.against if name in (*_WITH_BATON, *_ENGINES)]
    servers = [name for name in parsed.against if name in RIVALS]
    parts: dict[str, Part] = {
        "engine": partial(engine.measure_engine, threads=threads, against=engines),
        "mixed": partial(measure_mixed, against=servers, parsed=parsed),
        **served.PARTS,
    }
    return run_parts(parts, parsed)


if __name__ == "__main__":
    sys.exit(main())
