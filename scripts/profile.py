"""Says whether disaggregation would cure what a load suffers from, and shows why.

It puts the load on an aggregated deployment - its own, or with --server one that runs - and measures: what prompts in prefill
do to running streams, how much of the machine's arithmetic and memory bandwidth is used, what a prefix cache could save, and
the tails. The last line is the path of a page with the picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.options import Options, add_options, read_options
from loadtest.record import Record, Run, read_run, write_meta
from loadtest.report import write_report
from python_backends.core.config import Deployment, load_deployment
from python_backends.core.errors import BatonError, Unavailable
from python_backends.core.paths import repository_root
from python_backends.core.types import Role
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
from scripts.profile_measures import Limits, Model, limits_of, model_of, profile_of, served_by
from scripts.profile_picture import table, write_profile
from scripts.profile_verdict import Level, Profile, Verdict, judge
from scripts.terminal import print_error

_STYLES = {Level.YES: "bold green", Level.PARTLY: "bold yellow", Level.NO: "bold cyan", Level.UNKNOWN: "bold yellow"}
_DEFAULT = repository_root() / "configs" / "aggregated.yaml"


class Found(msgspec.Struct, frozen=True):
    """All that --json prints. Rates per second; 0 where they were not measured."""

    verdict: Verdict
    profile: Profile
    bandwidth_limit: float
    matrix_limit: float
    remarks: list[str]
    page: str


def profile_load(parsed: argparse.Namespace, options: Options, command: str, console: Console) -> Found:
    """Measure, load, judge, draw. Raises BatonError when nothing can be started, asked or answered."""
    config = parsed.config or (None if parsed.server else _DEFAULT)
    deployment = load_deployment(config) if config else None
    limits, model, remarks = _size_up(deployment, parsed.no_measuring, console)
    out = Path(options.out)
    with started(config, console) if config and not parsed.server else nullcontext() as server:
        address = parsed.server if server is None else PROTOCOLS[parsed.protocol](server)
        console.print(f"Load on {address} for {options.duration:g} s", highlight=False, markup=False)
        run_load(address, options, command, quiet=True)
    run, records = read_run(out)
    if config:
        run = msgspec.structs.replace(run, deployment=config.read_text())
        write_meta(out, run)
    if not any(record.ok for record in records):
        raise Unavailable(f"no request was answered: {records[0].error if records else 'none was sent'}")
    return _judge(run, records, deployment, limits, model, remarks)


def _size_up(
    deployment: Deployment | None, no_measuring: bool, console: Console
) -> tuple[Limits | None, Model | None, list[str]]:
    """Limits and model as far as they can be told, and in a sentence each what can't be."""
    if deployment is None:
        return None, None, ["What of the machine's limits is used is not known: --config says what runs at the server."]
    if no_measuring:
        return None, None, []
    worker = served_by(deployment)
    try:
        model = model_of(deployment, worker)
        with console.status("Measuring this machine"):
            limits = limits_of(worker)
    except BatonError as error:
        return None, None, [f"{error}."]
    console.print(
        f"Limits of {limits.device}: {limits.bandwidth / 2**30:.1f} GiB/s of reads, {limits.matrix / 1e9:,.0f} Gflop/s",
        highlight=False,
    )
    return limits, model, []


def _judge(
    run: Run,
    records: Sequence[Record],
    deployment: Deployment | None,
    limits: Limits | None,
    model: Model | None,
    remarks: list[str],
) -> Found:
    step_tokens = deployment.engine.step_tokens if deployment else 1
    aggregated = [worker for worker in deployment.workers if worker.role is Role.AGGREGATED] if deployment else []
    profile = profile_of(run, records, limits, model, step_tokens, max(1, len(aggregated)))
    verdict = judge(profile)
    if profile.use is not None and max(msgspec.structs.astuple(profile.use)) > 1:
        remarks = [*remarks, "Shares above 100%: other work held this machine up while its limits were measured."]
    out = Path(run.options.out)
    write_report(out)
    page = write_profile(out, run, records, profile, verdict, remarks)
    return Found(verdict, profile, limits.bandwidth if limits else 0.0, limits.matrix if limits else 0.0, remarks, str(page))


def show(found: Found, console: Console) -> None:
    figures = Table(box=None, padding=(0, 2), pad_edge=False, show_header=False)
    for row in table(found.profile):
        figures.add_row(row.name, *row.values)
    console.print(figures, highlight=False)
    console.print()
    console.print(found.verdict.headline, style=_STYLES[found.verdict.level], highlight=False, markup=False)
    for line in (*found.verdict.reasons, *found.remarks):
        console.print(f"- {line}", highlight=False, markup=False)
    console.print("What to do:", highlight=False)
    for line in found.verdict.advice:
        console.print(f"- {line}", highlight=False, markup=False)
    console.print(f"Page: {found.page}", highlight=False, markup=False, soft_wrap=True)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/profile", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="a running server: grpc://HOST:PORT, http://HOST:PORT (generate_stream) or http://HOST:PORT/v1 (OpenAI)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the deployment to start; none: configs/aggregated.yaml. With --server: what runs there, on this machine",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="grpc", help="how a started deployment is asked")
    parser.add_argument("--no-measuring", action="store_true", help="leave out the machine's limits")
    parser.add_argument("--json", action="store_true", help="print the result as JSON; progress goes to stderr")
    add_options(parser.add_argument_group("the load"), out="")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_options(arguments)
    interrupt_on_signals()
    console = Console(stderr=parsed.json)
    try:
        options = read_options(parsed)
        options = resolved(options, Path(options.out) if options.out else new_directory("profile"))
        found = profile_load(parsed, options, command_line("profile", arguments), console)
    except KeyboardInterrupt:
        console.print("\nInterrupted")
        return INTERRUPTED
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    if parsed.json:
        print(msgspec.json.encode(found).decode())
    else:
        show(found, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
