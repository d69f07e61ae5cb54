"""Restarts the workers of the server on this machine one after the other, under load: each is drained, loaded anew, and used
again once it has passed a canary. Nothing is lost; where a worker is the only one of its kind, its streams pause meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console

from python_backends.core.errors import Unavailable
from scripts.router_door import LOAD_S, RouterDoor, add_door_options, at_door


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/rolling-restart", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("workers", nargs="*", metavar="WORKER", help="in this order; none: all")
    add_door_options(parser, grace_help="for what a worker has begun")
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
        door.manage("restart", worker, grace_s, grace_s + LOAD_S)
        seconds = time.monotonic() - began
        console.print(f"{number}/{len(workers)} {worker} was restarted in {seconds:.1f} s", highlight=False)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    return at_door(options.run_dir, lambda door, console: rolling_restart(door, options.workers, options.grace, console))


if __name__ == "__main__":
    sys.exit(main())
