"""Puts load on a deployment and writes a report: an HTML page, a Markdown table and CSV files.

Without --server it starts a deployment on this machine and stops it afterwards. The load comes from Locust in a process
of its own. The last line is the path of the page.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.options import Options, add_options, flags, read_options
from loadtest.record import RUN_FILE, read_run, write_meta
from loadtest.report import warnings, write_report
from loadtest.summary import figures
from loadtest.tables import client_line, rows
from python_backends.core.errors import BatonError, Unavailable
from python_backends.core.paths import repository_root
from scripts.serve import start_with_progress
from scripts.terminal import print_error
from scripts.tritonserver import TritonServer

PROTOCOLS: dict[str, Callable[[TritonServer], str]] = {
    "grpc": lambda server: f"grpc://{_host(server)}:{server.grpc_port}",
    "generate": lambda server: f"http://{_host(server)}:{server.http_port}",
}
"""How a server that is started here can be asked: the address, as loadtest.protocols takes it."""
_WEB_HOST, _WEB_PORT = "127.0.0.1", 8089
_SPARE_S = 60.0  # that the load's process may take beyond its run
INTERRUPTED = 130  # what shells report for SIGINT


@contextmanager
def started(config: Path, console: Console) -> Iterator[TritonServer]:
    """A server with the deployment of a file, stopped at the end. Raises ConfigError or Unavailable."""
    server = TritonServer(config)
    try:
        start_with_progress(server, console)
        yield server
    finally:
        server.stop()


def _host(server: TritonServer) -> str:
    return f"[{server.host}]" if ":" in server.host else server.host


def run_load(address: str, options: Options, command: str, *, web: int | None = None, quiet: bool = False) -> None:
    """One run in a process of its own; its files are in `options.out`, a directory that is absolute.

    `web`: Locust's page on that port, until it is interrupted. `quiet`: nothing is printed. Raises Unavailable with the
    process's own words when it fails, KeyboardInterrupt after it has written what there was.
    """
    directory = Path(options.out)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RUN_FILE).unlink(missing_ok=True)  # of an earlier run there
    locustfile = repository_root() / "loadtest" / "locustfile.py"
    arguments = [sys.executable, "-m", "locust", "-f", str(locustfile), "--host", address, "--loglevel", "WARNING"]
    arguments += ["--web-host", _WEB_HOST, "--web-port", str(web)] if web else ["--headless", "--only-summary"]
    # With a file for its statistics Locust does not print them; failed requests are the report's matter.
    arguments += ["--json-file", str(directory / "locust"), "--exit-code-on-error", "0", *flags(options)]
    with subprocess.Popen(
        arguments,
        cwd=directory,  # Locust reads a locust.conf of the working directory
        env=_environment(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=None if web else subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for this process alone, which passes it on once
    ) as process:
        said = _wait(process, None if web else options.duration + options.drain + _SPARE_S)
    if process.returncode and not web:
        raise Unavailable(said.removeprefix("error: ") or f"the load's process ended with code {process.returncode}")


def _wait(process: subprocess.Popen[str], timeout_s: float | None) -> str:
    """What it said on stderr. Ctrl-C ends the run; what was measured is written."""
    try:
        return (process.communicate(timeout=timeout_s)[1] or "").strip()
    except BaseException:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=_SPARE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.communicate()
        raise


def _environment(command: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    paths = os.pathsep.join([str(repository_root()), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**own, "LOCUST_SKIP_MONKEY_PATCH": "1", "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "BATON_COMMAND": command}


def report(directory: Path, deployment: str, console: Console) -> Path:
    """Write the report of a run and show its figures. Returns the page's path."""
    run, records = read_run(directory)
    if deployment:
        run = msgspec.structs.replace(run, deployment=deployment)
        write_meta(directory, run)
    found = figures(run, records)
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("")
    for kind in found:
        table.add_column(kind.kind, overflow="fold")
    for row in rows(found):
        table.add_row(row.name, *row.values)
    console.print(table)
    for line in (*warnings(run, records), client_line(run, sum(sum(record.arrival_tokens) for record in records))):
        console.print(line, highlight=False, markup=False)
    if not any(record.ok for record in records):
        raise Unavailable("no request was answered; the lines above say why")
    return write_report(directory)


def new_directory(name: str) -> Path:
    """Under build/loadtest of the repository, named by the time."""
    return repository_root() / "build" / "loadtest" / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def resolved(options: Options, out: Path) -> Options:
    """With paths that hold in any working directory."""
    scenario = Path(options.scenario)
    return msgspec.structs.replace(
        options, out=str(out.absolute()), scenario=str(scenario.absolute()) if scenario.is_file() else options.scenario
    )


def command_line(verb: str, arguments: Sequence[str] | None) -> str:
    return shlex.join([f"scripts/{verb}", *(sys.argv[1:] if arguments is None else arguments)])


def _load_test(parsed: argparse.Namespace, command: str, console: Console) -> Path:
    options = read_options(parsed)
    options = resolved(options, Path(options.out) if options.out else new_directory(Path(options.scenario).stem))
    if parsed.server:
        _run(parsed.server, options, command, parsed.web, console)
        return report(Path(options.out), "", console)
    with started(parsed.config, console) as server:
        _run(PROTOCOLS[parsed.protocol](server), options, command, parsed.web, console)
    return report(Path(options.out), parsed.config.read_text(), console)


def _run(address: str, options: Options, command: str, web: int | None, console: Console) -> None:
    if web:
        console.print(f"Locust's page is at http://{_WEB_HOST}:{web}; Ctrl-C ends it", highlight=False)
    try:
        run_load(address, options, command, web=web)
    except KeyboardInterrupt:
        if not (Path(options.out) / RUN_FILE).exists():
            raise
        console.print("\nInterrupted; this is what there is", highlight=False)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/loadtest", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default = repository_root() / "configs" / "default.yaml"
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--server",
        metavar="URL",
        help="a running server: grpc://HOST:PORT, http://HOST:PORT (generate_stream) or http://HOST:PORT/v1 (OpenAI)",
    )
    where.add_argument("--config", type=Path, default=default, metavar="FILE", help="the deployment to start")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="grpc", help="how a started deployment is asked")
    parser.add_argument(
        "--web",
        type=int,
        nargs="?",
        const=_WEB_PORT,
        metavar="PORT",
        help=f"start and watch runs in Locust's page; without a PORT at {_WEB_PORT}",
    )
    add_options(parser.add_argument_group("the load"), out="")
    return parser.parse_args(arguments)


def interrupt_on_signals() -> None:
    """Both signals that end a script raise KeyboardInterrupt, also where a parent shell has SIGINT ignored."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_options(arguments)
    interrupt_on_signals()
    console = Console()
    try:
        page = _load_test(parsed, command_line("loadtest", arguments), console)
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
