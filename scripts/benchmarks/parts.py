"""Parts of a benchmark, run one after the other: what they have in common, and what becomes of what they measured.

What was measured outlives everything: a part that can't go on, Ctrl-C, and (in bench.json) a crash.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.progress import Progress

from loadtest.machine import this_machine
from python_backends.core.errors import BatonError
from scripts.benchmarks.asking import prompt
from scripts.benchmarks.figures import Figure, Report, draw, table
from scripts.client import Client
from scripts.loadtest import INTERRUPTED, interrupt_on_signals
from scripts.tritonserver import TritonServer

_FILE_COLUMNS = 160  # of a table that goes to a file
_BUSY = 0.1  # share of the cores: more of it, used by others, is worth a warning


class Taken:
    """What one part has measured so far, and who could not be measured and why."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.left_out: dict[str, str] = {}
        self._values: dict[tuple[str, str, str], list[float]] = {}
        self._whole: list[Figure] = []

    def add(self, quantity: str, contender: str, unit: str, value: float) -> None:
        """One more value. The first of each figure is the warm-up, and is left out."""
        self._values.setdefault((quantity, contender, unit), []).append(value)

    def extend(self, figures: Iterable[Figure]) -> None:
        """Figures without a warm-up among their values."""
        self._whole += [figure for figure in figures if figure.known]

    def leave_out(self, name: str, error: BatonError) -> None:
        """A contender, named as --against has it."""
        self.left_out[f"{self.part}: {name}"] = str(error)

    def figures(self) -> list[Figure]:
        added = (
            Figure(self.part, quantity, contender, unit, tuple(values[1:]))
            for (quantity, contender, unit), values in self._values.items()
        )
        return [*self._whole, *(figure for figure in added if figure.known)]


@dataclass
class Bench:
    """What parts need: where to put files, how often to repeat, whom to tell, and a source of new prompts."""

    directory: Path
    repetitions: int
    console: Console
    rng: random.Random

    @contextmanager
    def server(self, deployment: str) -> Iterator[tuple[TritonServer, Client]]:
        """A server with the deployment of this YAML."""
        path = self.directory / f"{len(list(self.directory.iterdir()))}.yaml"  # several servers may run at once
        path.write_text(deployment)
        with TritonServer(path) as server, Client(f"{server.host}:{server.grpc_port}") as client:
            client.wait_ready()
            yield server, client

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        return [prompt(self.rng, tokens) for _ in range(count)]

    def repeated(self, *calls: Callable[[], None]) -> None:
        """Call them in turn, from either end alternately, so often as is asked for; once before that, to warm up."""
        with Progress(console=self.console, transient=True, refresh_per_second=1) as progress:
            task = progress.add_task("warm-up", total=len(calls) * (1 + self.repetitions))
            for number in range(-1, self.repetitions):
                for call in calls if number % 2 == 0 or number < 0 else calls[::-1]:
                    call()
                    progress.update(task, advance=1, description=f"repetition {number + 1} of {self.repetitions}")


Part = Callable[[Bench, Taken], None]
"""Measures, until it is done or raises: BatonError when it can't go on here, KeyboardInterrupt."""


@dataclass
class _Run:
    """Parts, from the first one on."""

    command: str
    began: str
    busy: float
    out: Path
    figures: list[Figure] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def take(self, part: Part, bench: Bench, taken: Taken) -> None:
        """Run one of them, and keep what it has measured however it ends."""
        began = time.monotonic()
        bench.console.print(f"{taken.part} ...", highlight=False)
        try:
            part(bench, taken)
        except BatonError as error:
            self.left_out[taken.part] = str(error)
        finally:
            self.figures += taken.figures()
            self.left_out |= taken.left_out
            bench.console.print(f"{taken.part}: {time.monotonic() - began:.0f} s", highlight=False)
            self.write()

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        report = Report(self.command, self.began, this_machine(), self.busy, self.figures, self.left_out)
        (self.out / "bench.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def add_options(parser: argparse.ArgumentParser, parts: Iterable[str]) -> None:
    """Of everything that runs parts."""
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; all when none is given")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="of everything (default: 5)")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("bench"), metavar="DIR", help="for bench.json and pictures")


def read_options(parser: argparse.ArgumentParser, parts: Iterable[str], arguments: Sequence[str] | None) -> argparse.Namespace:
    """Ends the process, with a sentence, when they are wrong."""
    parsed = parser.parse_args(arguments)
    known = list(parts)
    if unknown := [part for part in parsed.parts if part not in known]:
        parser.error(f"PART {unknown[0]!r} is unknown; known are {', '.join(known)}")
    if parsed.repetitions < 1:
        parser.error("--repetitions must be 1 or more")
    parsed.parts = parsed.parts or known
    parsed.command = " ".join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
    return parsed


def run_parts(parts: Mapping[str, Part], parsed: argparse.Namespace) -> int:
    """Those that were asked for (read_options): a table of all, and files. Returns the process's code.

    130 after Ctrl-C, 1 when a part or a contender could not be measured.
    """
    interrupt_on_signals()
    console, code = Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS), 0
    busy = psutil.cpu_percent(interval=2.0) / 100
    if busy > _BUSY:
        console.print(f"warning: others use {busy:.0%} of this machine's cores; figures will be unlike a quiet one's")
    run = _Run(parsed.command, datetime.now().astimezone().isoformat(timespec="seconds"), busy, parsed.out)
    try:
        with tempfile.TemporaryDirectory() as directory:
            bench = Bench(Path(directory), parsed.repetitions, console, random.Random(parsed.seed))
            for name in parsed.parts:
                run.take(parts[name], bench, Taken(name))
    except KeyboardInterrupt:
        console.print("\nInterrupted; this is what was measured before:")
        code = INTERRUPTED
    console.print(table(run.figures))
    for name, why in run.left_out.items():
        console.print(f"left out: {name}: {why}", highlight=False, markup=False, soft_wrap=True)
    pictures = draw(run.figures, run.out)
    console.print(str(this_machine()), highlight=False)
    console.print(f"Written: {', '.join(map(str, [run.out / 'bench.json', *pictures]))}", highlight=False, soft_wrap=True)
    return code or bool(run.left_out)
