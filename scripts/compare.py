"""Puts the same load on several deployments in turn, several times, and writes one report about all of them.

Each side is NAME=TARGET: a deployment file, which is started for each of its runs and stopped after it, the URL of a
running server (grpc://HOST:PORT, http://HOST:PORT, or http://HOST:PORT/v1 for any server that speaks OpenAI's API), or a
rival of scripts/rivals, whose name alone will do. Rivals serve the model of the first deployment, are started once, and
stand still while others are measured. Every round begins with another side. Its load is the same for all; from round to
round the seed goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.comparison import MOST_SIDES, Side, columns, compare, rows, write_comparison
from loadtest.options import Options, add_options, read_options
from loadtest.record import Record, Run, read_run, write_meta
from loadtest.report import write_report
from python_backends.core.config import load_deployment
from python_backends.core.errors import BatonError, ConfigError, Unavailable
from python_backends.core.paths import resolve_model
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
from scripts.rivalry.servers import Rival, RivalServer, find_rival
from scripts.terminal import print_error


@dataclass(frozen=True, slots=True)
class Target:
    """One side as it was asked for. `config`, `rival` or `url`."""

    name: str
    config: Path | None = None
    url: str = ""
    rival: Rival | None = None


def read_target(text: str) -> Target:
    """`NAME=TARGET`, or a rival's name. Raises ConfigError that says what is wrong."""
    name, equals, where = text.partition("=")
    rival = find_rival(where if equals else name)
    if name and rival is not None:
        return Target(name, rival=rival)
    if not (name and equals and where):
        raise ConfigError(
            f"{text!r} is neither NAME=TARGET, such as aggregated=configs/aggregated.yaml, nor a rival of scripts/rivals"
        )
    if "://" in where:
        return Target(name, url=where)
    if not Path(where).is_file():
        raise ConfigError(f"{name}: {where} is neither a deployment file nor a URL nor a rival of scripts/rivals")
    return Target(name, Path(where))


def read_targets(texts: Sequence[str]) -> list[Target]:
    """Raises ConfigError."""
    targets = [read_target(text) for text in texts]
    if len({target.name for target in targets}) < len(targets):
        raise ConfigError("the sides' names must differ")
    if not 2 <= len(targets) <= MOST_SIDES:
        raise ConfigError(f"give 2 to {MOST_SIDES} sides")
    return targets


def order(targets: Sequence[Target], number: int) -> list[Target]:
    """Who goes after whom in a round: each begins in turn."""
    first = number % len(targets)
    return [*targets[first:], *targets[:first]]


Runs = dict[str, list[tuple[Run, list[Record]]]]
"""By side, one per round."""
Failed = Callable[[str, BatonError], None]
"""Is told of a side that does not start or answers nothing at all, by name: goes on without it, or raises."""


def run_rounds(
    targets: Sequence[Target],
    options: Options,
    rounds: int,
    protocol: str,
    command: str,
    console: Console,
    runs: Runs,
    failed: Failed,
) -> None:
    """Fill `runs`, which has a list for each side, run by run. Who fails is left alone from then on."""
    with _rivals(targets, Path(options.out), console, failed) as rivals:
        targets = [target for target in targets if target.rival is None or target.name in rivals]
        gone = set()
        for number in range(rounds):
            for target in order(targets, number):
                if target.name in gone:
                    continue
                console.print(f"round {number + 1} of {rounds}: {target.name}", highlight=False, markup=False)
                out = Path(options.out) / f"{target.name}-{number + 1}"
                own = msgspec.structs.replace(options, seed=options.seed + number, out=str(out))
                try:
                    with _serving(target, rivals.get(target.name), own, protocol, console) as (address, asked, deployment):
                        run_load(address, asked, command, quiet=True)
                    runs[target.name].append(_read(target.name, out, deployment, console))
                except BatonError as error:
                    failed(target.name, error)
                    gone.add(target.name)


def _give_up(name: str, error: BatonError) -> None:
    raise error


@contextmanager
def _rivals(targets: Sequence[Target], out: Path, console: Console, failed: Failed) -> Iterator[dict[str, RivalServer]]:
    """All rivals among the sides that start, by name: one after the other, each standing still."""
    rivals = {}
    with ExitStack() as stack:
        for target in targets:
            if target.rival is None:
                continue
            out.mkdir(parents=True, exist_ok=True)
            try:
                server = RivalServer(target.rival, _model(targets, target.name), out / f"{target.name}.log")
                console.print(f"starting {target.name}: {server.description}", highlight=False, markup=False, soft_wrap=True)
                server.start()
            except BatonError as error:
                failed(target.name, error)
                continue
            stack.callback(server.stop)
            rivals[target.name] = server
        yield rivals


def _model(targets: Sequence[Target], asking: str) -> Path:
    config = next((target.config for target in targets if target.config), None)
    if config is None:
        raise ConfigError(f"{asking}: none of the sides is a deployment file, which would say what model it is to serve")
    return resolve_model(load_deployment(config).model.path).absolute()


@contextmanager
def _serving(
    target: Target, rival: RivalServer | None, options: Options, protocol: str, console: Console
) -> Iterator[tuple[str, Options, str]]:
    """(where it is asked, how, what it is) while it runs."""
    if rival is not None:
        with rival.awake() as address:
            yield address, rival.rival.options(options), rival.description
    elif target.config is not None:
        with started(target.config, console) as server:
            yield PROTOCOLS[protocol](server), options, target.config.read_text()
    else:
        yield target.url, options, ""


def _read(name: str, out: Path, deployment: str, console: Console) -> tuple[Run, list[Record]]:
    """What a run left; its own report is written."""
    run, records = read_run(out)
    run = msgspec.structs.replace(run, deployment=deployment)
    write_meta(out, run)
    write_report(out)
    answered = sum(record.ok for record in records)
    console.print(f"  {answered} of {len(records)} requests answered", highlight=False)
    if not answered:
        raise Unavailable(f"{name} answered no request: {records[0].error if records else 'none was sent'}")
    return run, records


def _show(sides: Sequence[Side], console: Console) -> None:
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
    parser.add_argument("sides", metavar="NAME=TARGET", nargs="+", help="two or more; the others are compared with the first")
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
        targets = read_targets(parsed.sides)
        if parsed.rounds < 1:
            raise ConfigError("--rounds must be 1 or more")
        options = read_options(parsed)
        options = resolved(options, Path(options.out) if options.out else new_directory("compare"))
        runs: Runs = {target.name: [] for target in targets}
        run_rounds(targets, options, parsed.rounds, parsed.protocol, command, console, runs, _give_up)
        sides = [Side(target.name, runs[target.name]) for target in targets]
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
