"""Drains workers of the server on this machine, so that they can be taken away: they get no new requests and finish those they
have. What is not finished in the grace period goes on at other workers, at the very next token. --resume uses them again.

Workers that are named are drained by the server's router, wherever they are. Without a name a server's own workers are told
themselves, all of them, as before it is stopped; of a server that has a router only with --all.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from python_backends.core.errors import BatonError, InvalidRequest, Unavailable
from python_backends.triton.home import channels
from python_backends.worker.door import WorkersDoor
from scripts.router_door import ROUTER, WORKERS, RouterDoor, add_door_options, at_door, find_server
from scripts.terminal import print_error

_MARGIN_S = 20.0  # over the grace period; the router's own sentence comes first


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/drain", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("workers", nargs="*", metavar="WORKER", help="names as in the deployment file, such as decode_1")
    parser.add_argument("--all", action="store_true", help="of a server with a router, too: all of its own workers")
    parser.add_argument("--resume", action="store_true", help="use drained workers again")
    add_door_options(parser, grace_help="for what they have begun")
    return parser.parse_args(arguments)


def drain_own(run_dir: Path, grace_s: float, resume: bool, console: Console, *, beside_router: bool = False) -> None:
    """All workers of the server, without its router. Raises Unavailable, and InvalidRequest where it has one unasked for."""
    if not beside_router and any(run_dir.glob(ROUTER[0])):
        raise InvalidRequest("this server has a router: name the workers, such as decode_1, or give --all for all of its own")
    workers, began = channels(run_dir), time.monotonic()
    with WorkersDoor(workers) as door:
        if resume:
            door.resume()
        elif at_work := door.drain(grace_s):
            raise Unavailable(f"{', '.join(at_work)}: still at work after {time.monotonic() - began:.0f} s")
    done = "used again" if resume else f"drained, after {time.monotonic() - began:.1f} s"
    console.print(f"{', '.join(workers)}: {done}", highlight=False)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    if not options.workers:
        console = Console(stderr=True)
        try:
            run_dir = find_server(options.run_dir, WORKERS)
            drain_own(run_dir, options.grace, options.resume, console, beside_router=options.all)
        except BatonError as error:
            print_error(console, error)
            return 1
        return 0

    def drain(door: RouterDoor, console: Console) -> None:
        for worker in options.workers:
            began = time.monotonic()
            door.manage("resume" if options.resume else "drain", worker, options.grace, options.grace + _MARGIN_S)
            done = "is used again" if options.resume else f"is drained, after {time.monotonic() - began:.1f} s"
            console.print(f"{worker} {done}", highlight=False)

    return at_door(options.run_dir, drain)


if __name__ == "__main__":
    sys.exit(main())
