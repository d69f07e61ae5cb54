"""Restarts the workers of the server on this machine one after the other, under load: each is drained, loaded anew, and used
again once it has passed a canary. Nothing is lost; where a worker is the only one of its kind, its streams pause meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from python_backends.core.errors import BatonError, Unavailable
from scripts.router_door import RouterDoor, find_server
from scripts.terminal import print_error

_LOAD_S = 400.0  # for one worker to load its weights


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/rolling-restart", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("workers", nargs="*", metavar="WORKER", help="in this order; none: all")
    parser.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="for what a worker has begun")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="of the server, where several run")
    return parser.parse_args(arguments)


def rolling_restart(door: RouterDoor, workers: list[str], grace_s: float, console: Console) -> None:
    """All workers that are known when `workers` is empty. Raises Unavailable at the first that does not come back."""
    if not workers:
        news = door.news()
        if news is None:
            raise Unavailable("the router does not answer; try again in a moment")
        workers = [worker.id for worker in news.workers]
    for number, worker in enumerate(workers, start=1):
        began = time.monotonic()
        door.manage("restart", worker, grace_s, grace_s + _LOAD_S)
        seconds = time.monotonic() - began
        console.print(f"{number}/{len(workers)} {worker} was restarted in {seconds:.1f} s", highlight=False)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    console = Console(stderr=True)
    try:
        with RouterDoor(find_server(options.run_dir)) as door:
            rolling_restart(door, options.workers, options.grace, console)
    except BatonError as error:
        print_error(console, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
