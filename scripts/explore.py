"""Lives through random interleavings of what happens to requests, leases and workers, and looks at every promise in each.

A world is made from a seed: the same seed is the same world, to the last message. Its time and chance are pretended, so
seconds of waiting take none. Three worlds, from the narrow and quick to the wide and slow:

leases    lifecycle, leases and blocks of a few requests on two workers
workers   whole prefill and decode workers, with signed work, tickets and transfers
router    a whole router with its workers and clients
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from random import Random

import msgspec
from rich.console import Console
from rich.table import Table

from scripts.exploration.clock import VirtualTime, pretended
from scripts.exploration.leases import explore_leases
from scripts.exploration.router import explore_router
from scripts.exploration.workers import explore_workers

WORLDS: dict[str, Callable[[VirtualTime, Random], Counter[str]]] = {
    "leases": explore_leases,
    "workers": explore_workers,
    "router": explore_router,
}
_AT_ONCE = 100  # lives of one task of a process
_MOST_VIOLATIONS = 20  # that are kept, with their traces; all are counted


@dataclass
class Violated:
    seed: int
    promise: str
    trace: str


@dataclass
class Result:
    """What was seen in the lives of one world. `violations`: the first of them."""

    world: str
    first: int
    lives: int = 0
    broken: int = 0
    seconds: float = 0.0
    happened: dict[str, int] = field(default_factory=dict)
    violations: list[Violated] = field(default_factory=list)

    def add(self, other: Result) -> None:
        self.lives += other.lives
        self.broken += other.broken
        self.happened = dict(Counter(self.happened) + Counter(other.happened))
        self.violations = (self.violations + other.violations)[:_MOST_VIOLATIONS]


def live_through(world: str, seeds: range) -> Result:
    """One life per seed. A broken promise is a result, not an error."""
    result = Result(world, seeds.start)
    happened: Counter[str] = Counter()
    for seed in seeds:
        result.lives += 1
        try:
            with pretended(seed) as clock:
                happened += WORLDS[world](clock, Random(seed))
        except Exception as error:  # whatever it is, the life ended otherwise than it should
            result.broken += 1
            result.violations.append(Violated(seed, _promise_of(error), traceback.format_exc()))
    result.happened = dict(happened)
    return result


def explore(world: str, first: int, lives: int, processes: int, until: float = float("inf")) -> Result:
    """`lives` from the seed `first` on, or fewer when it is later than `until` (monotonic, s)."""
    began = time.monotonic()
    total = Result(world, first)
    with _same_order(), ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for part in _spread(pool, world, first, lives, 2 * processes, until):
            total.add(part)
    total.seconds = time.monotonic() - began
    return total


@contextmanager
def _same_order() -> Iterator[None]:
    """For processes that begin in here: sets of strings have the same order in all of them, so a seed is one world."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "0"
    try:
        yield
    finally:
        del os.environ["PYTHONHASHSEED"]
        if before is not None:
            os.environ["PYTHONHASHSEED"] = before


def _portions(first: int, lives: int) -> Iterator[range]:
    end = first + lives
    for start in range(first, end, _AT_ONCE):
        yield range(start, min(start + _AT_ONCE, end))


def _spread(pool: ProcessPoolExecutor, world: str, first: int, lives: int, at_once: int, until: float) -> Iterator[Result]:
    """A few portions at a time, so that the end of the time is soon the end."""
    portions = _portions(first, lives)
    running: set[Future[Result]] = set()
    while True:
        while len(running) < at_once and time.monotonic() < until and (seeds := next(portions, None)):
            running.add(pool.submit(live_through, world, seeds))
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def _promise_of(error: BaseException) -> str:
    """The words of the promise that was broken first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _print(console: Console, results: Sequence[Result]) -> None:
    table = Table("world", "lives", "broken promises", "seconds", "seen", title="Random interleavings")
    for result in results:
        seen = ", ".join(f"{what} {count}" for what, count in sorted(result.happened.items(), key=lambda item: -item[1])[:8])
        table.add_row(result.world, f"{result.lives:,}", str(result.broken), f"{result.seconds:.0f}", seen)
    console.print(table)
    for result in results:
        for violated in result.violations:
            console.print(violated.trace, markup=False, highlight=False)
            again = f"scripts/explore {result.world} --first {violated.seed} --lives 1"
            console.print(
                f"{result.world}, seed {violated.seed}: {violated.promise}; again: {again}", markup=False, soft_wrap=True
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/explore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("worlds", nargs="*", metavar="WORLD", help="leases, workers, router; all of them if none is named")
    parser.add_argument("--lives", type=_positive, default=10_000, help="of each world (default: %(default)s)")
    parser.add_argument(
        "--first", type=int, default=0, metavar="SEED", help="seed of the first life; the others count on from it"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long, in all")
    parser.add_argument("--processes", type=_positive, default=os.cpu_count() or 1, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 when a promise was broken."""
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = [world for world in options.worlds if world not in WORLDS]
    if unknown:
        parser.error(f"there is no world {unknown[0]}; there are {', '.join(WORLDS)}")
    until = time.monotonic() + options.minutes * 60
    results = [
        explore(world, options.first, options.lives, options.processes, until) for world in options.worlds or list(WORLDS)
    ]
    _print(Console(), results)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")
    return 1 if any(result.broken for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
