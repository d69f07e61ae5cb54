"""Puts the same load on two deployments in turn, several times, and writes one report about both.

Each side is NAME=TARGET: a deployment file, which is started for each of its runs and stopped after it, or the URL of a
running server (grpc://HOST:PORT, http://HOST:PORT, or http://HOST:PORT/v1 for any server that speaks OpenAI's API).
The order is A B, B A, A B ... The load of a round is the same for both sides; from round to round the seed goes on.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.comparison import Side, columns, compare, rows, write_comparison
from loadtest.options import Options, add_options, read_options
from loadtest.record import Record, Run, read_run, write_meta
from loadtest.report import write_report
from python_backends.core.errors import BatonError, ConfigError, Unavailable
from scripts.loadtest import (
    INTERRUPTED,
    PROTOCOLS,
    command_line,
    interrupt_on_signals,
    new_directory,
    resolved,
    run_load,
    started,
)
from scripts.terminal import print_error


@dataclass(frozen=True, slots=True)
class Target:
    """One side as it was asked for. `config` or `url`."""

    name: str
    config: Path | None
    url: str


def read_target(text: str) -> Target:
    """`NAME=TARGET`. Raises ConfigError that says what is wrong."""
    name, equals, where = text.partition("=")
    if not (name and equals and where):
        raise ConfigError(f"{text!r} is not NAME=TARGET, such as aggregated=configs/aggregated.yaml")
    if "://" in where:
        return Target(name, None, where)
    if not Path(where).is_file():
        raise ConfigError(f"{name}: {where} is neither a deployment file nor a URL")
    return Target(name, Path(where), "")


def run_rounds(
    targets: tuple[Target, Target], options: Options, rounds: int, protocol: str, command: str, console: Console
) -> tuple[Side, Side]:
    """All runs, alternating who is first. Raises BatonError when a server does not start or answers nothing at all."""
    runs: dict[str, list[tuple[Run, list[Record]]]] = {target.name: [] for target in targets}
    for number in range(rounds):
        for target in targets if number % 2 == 0 else targets[::-1]:
            console.print(f"round {number + 1} of {rounds}: {target.name}", highlight=False, markup=False)
            out = Path(options.out) / f"{target.name}-{number + 1}"
            own = msgspec.structs.replace(options, seed=options.seed + number, out=str(out))
            _run_once(target, own, protocol, command, console)
            runs[target.name].append(read_run(out))
    first, second = (Side(target.name, runs[target.name]) for target in targets)
    return first, second


def _run_once(target: Target, options: Options, protocol: str, command: str, console: Console) -> None:
    out = Path(options.out)
    with started(target.config, console) if target.config else nullcontext() as server:
        address = target.url if server is None else PROTOCOLS[protocol](server)
        run_load(address, options, command, quiet=True)
    run, records = read_run(out)
    if target.config:
        write_meta(out, msgspec.structs.replace(run, deployment=target.config.read_text()))
    write_report(out)
    answered = sum(record.ok for record in records)
    console.print(f"  {answered} of {len(records)} requests answered", highlight=False)
    if not answered:
        raise Unavailable(f"{target.name} answered no request: {records[0].error if records else 'none was sent'}")


def _show(sides: tuple[Side, Side], console: Console) -> None:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for heading in ("", *columns(sides)):
        table.add_column(heading, overflow="fold")
    for row in rows(compare(sides)):
        table.add_row(row.name, *row.values)
    console.print(table)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/compare", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("first", metavar="NAME=TARGET", help="what the other is compared with")
    parser.add_argument("second", metavar="NAME=TARGET")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each side")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="grpc", help="how started deployments are asked")
    add_options(parser.add_argument_group("the load"), out="")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_options(arguments)
    interrupt_on_signals()
    console = Console()
    command = command_line("compare", arguments)
    try:
        targets = (read_target(parsed.first), read_target(parsed.second))
        if parsed.rounds < 1 or targets[0].name == targets[1].name:
            raise ConfigError("--rounds must be 1 or more, and the two names different")
        options = read_options(parsed)
        options = resolved(options, Path(options.out) if options.out else new_directory("compare"))
        sides = run_rounds(targets, options, parsed.rounds, parsed.protocol, command, console)
        _show(sides, console)
        page = write_comparison(Path(options.out), sides, command)
    except KeyboardInterrupt:
        console.print("\nInterrupted")
        return INTERRUPTED
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    console.print(f"Report: {page}", highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
